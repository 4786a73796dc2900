"""Traces on disk: safetensors with a JSON header. Reading one never runs code."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from flowtracer_plugin.spans import Spans
from flowtracer_plugin.trace import FlowOptions, FlowTrace

FORMAT = "flowtracer.trace"
VERSION = 1
_ARRAYS = ("token_ids", "reach", "throughput")
_MASKS = ("question", "answer", "target")


def save(trace: FlowTrace, path: Path) -> Path:
    """Write `trace` to `path`, whole or not at all, and return `path`."""
    arrays = {name: getattr(trace, name) for name in _ARRAYS}
    arrays |= {name: getattr(trace.spans, name) for name in _MASKS}
    # Above the diagonal there is nothing: half the file.
    arrays["attention"] = trace.attention[np.tril_indices(len(trace.attention))]
    header = {
        "tokens": trace.tokens,
        "prompt_length": trace.spans.prompt_length,
        "rule": trace.spans.rule,
        "answer_text": trace.spans.answer_text,
        "model": trace.model,
        "options": asdict(trace.options),
        "layers": trace.layers,
    }
    metadata = {"format": FORMAT, "version": str(VERSION), "trace": json.dumps(header)}
    write_atomically(path, to_bytes(arrays, metadata))
    return path


def load(path: str | Path) -> FlowTrace:
    """Read a trace that `FlowTrace.save` wrote; every number comes back bit for bit.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a trace, is damaged, or was written by a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no trace at {str(path)!r}")
    try:
        return _read(path)
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"cannot read {str(path)!r} as a trace: {error}") from error


def _read(path: Path) -> FlowTrace:
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(
                "wanted a file that FlowTrace.save() wrote, this one is something else"
            )
        if int(metadata["version"]) > VERSION:
            raise ValueError(
                f"it has format version {metadata['version']}, this flowtracer-plugin reads "
                f"versions up to {VERSION}; upgrade flowtracer-plugin"
            )
        arrays = {name: file.get_tensor(name) for name in (*_ARRAYS, *_MASKS, "attention")}
    return _assemble(json.loads(metadata["trace"]), arrays)


def _assemble(header: dict[str, Any], arrays: dict[str, Any]) -> FlowTrace:
    if {len(arrays[name]) for name in (*_ARRAYS, *_MASKS)} != {len(header["tokens"])}:
        raise ValueError("its header and its arrays differ in length")
    options = header["options"]
    layers = options["layers"]
    options["layers"] = layers if isinstance(layers, str) else tuple(layers)
    return FlowTrace(
        token_ids=arrays["token_ids"],
        tokens=tuple(header["tokens"]),
        spans=Spans(
            prompt_length=header["prompt_length"],
            rule=header["rule"],
            answer_text=header["answer_text"],
            **{name: arrays[name] for name in _MASKS},
        ),
        attention=_unpack(arrays["attention"], len(arrays["token_ids"])),
        reach=arrays["reach"],
        throughput=arrays["throughput"],
        model=header["model"],
        options=FlowOptions(**options),
        layers=tuple(header["layers"]),
    )


def _unpack(packed: Float[np.ndarray, " edge"], length: int) -> Float[np.ndarray, "query key"]:
    attention = np.zeros((length, length), packed.dtype)
    attention[np.tril_indices(length)] = packed
    return attention


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a crash leaves the old file or the new one, never half.

    A link is followed, an existing file keeps its permissions, and a device or pipe is written to.

    Raises:
        IsADirectoryError: `path` is a directory.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(f"wanted the name of a file, found the directory {str(path)!r}")
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are for their owner alone, and a result is as readable as any other.
    temporary = path.parent / f".{token_hex(8)}.part"
    try:
        with temporary.open("xb") as file:
            file.write(content)
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
