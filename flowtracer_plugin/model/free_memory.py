"""How much memory is free for this process, on any device."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

ROOT = Path("/")
"""The root of Linux's `proc` and `sys` folders."""


def free_memory(device: torch.device) -> int:
    """Free bytes on a device; on the host, within the limits of container and process."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    room = [psutil.virtual_memory().available, *_group_room(), *_process_room()]
    return max(0, min(room))


def _process_room() -> Iterator[int]:
    """The bytes that each limit of `ulimit` leaves."""
    if sys.platform == "win32":
        return
    import resource

    taken = psutil.Process().memory_info()
    fields = {"RLIMIT_AS": "vms", "RLIMIT_DATA": "data"}
    for limit, field in fields.items():
        most, _ = resource.getrlimit(getattr(resource, limit))
        if most != resource.RLIM_INFINITY and hasattr(taken, field):
            yield most - getattr(taken, field)


def _group_room() -> Iterator[int]:
    """The bytes that each control group of this process leaves, in either version of cgroups."""
    for group, limit, usage, cached in _groups():
        most, taken = _number(group / limit), _number(group / usage)
        if most is not None and taken is not None:
            yield most - taken + _cached_files(group / "memory.stat", cached)


def _groups() -> Iterator[tuple[Path, str, str, str]]:
    """The control groups of this process, outer ones included, and the names of their files."""
    base = ROOT / "sys/fs/cgroup"
    for line in _lines(ROOT / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, names = base, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            mount = base / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        inner = mount / path.lstrip("/")
        for group in (inner, *inner.parents):
            if group.is_relative_to(mount):
                yield (group, *names)


def _cached_files(path: Path, prefix: str) -> int:
    """Bytes of cached files, which count as taken but are freed when memory is needed."""
    fields = dict(line.split() for line in _lines(path))
    return sum(int(fields.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))


def _number(path: Path) -> int | None:
    text = "".join(_lines(path))
    return int(text) if text.isdecimal() else None  # there may be none, or "max"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("ascii").splitlines()
    except OSError:
        return []
