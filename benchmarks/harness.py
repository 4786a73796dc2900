"""How the benchmarks measure: several ways to do the same thing, side by side.

A benchmark is a module whose docstring begins with its question in one line, with

    OURS        the way that is compared with all others
    CASES       keyword arguments of `ways`, one mapping for each row
    TARGETS     a `Target` for each promise
    ways        case -> {name: function without arguments}

and, where needed,

    aside       ways, seconds -> more ratios, and notes
    remarks     rows -> sentences about the table
    plots       report -> {name: figure}
    run         in place of the harness's own

`ways` leaves out a way that would take too long in a case. A way that needs more time or memory
than there is raises `UnbearableError`, and the row's notes say so. Everything runs on one thread.
Seconds: all ways of a case take turns in one process, so that other load hits all of them; after
one run to warm up, the median of at least five. Memory: each way runs in its own process; we
count how far its second run rises above what the process held before, on the GPU if it uses one.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from benchmarks.elsewhere import ROOT, Elsewhere, UnbearableError

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "nnsight", "numpy", "scipy", "networkx", "trl")
MIB = 2**20
SEEN_MB = 1.0
"""Smallest rise that ratios use: the allocator's own pages change by less."""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Silences the measuring processes, which would repeat their messages for every way and case."""

Ways = Mapping[str, Callable[[], object]]
Case = Mapping[str, Any]
Row = Mapping[str, Any]
Report = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A promise: our `measure` is at most `ratio` times that of `other`."""

    other: str
    measure: str
    ratio: float
    where: Mapping[str, Any] | None = None

    def concerns(self, case: Case) -> bool:
        return all(case.get(name) == value for name, value in (self.where or {}).items())


def run(module: ModuleType, *, rounds: int) -> Path:
    """Measure every case of a benchmark and write its result."""
    return write(module, rows_of(module, rounds=rounds), rounds=rounds)


def rows_of(module: ModuleType, *, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for case in tqdm(module.CASES, desc=name_of(module), unit="case"):
        rows.append(measured(module, case, rounds=rounds))
        tqdm.write(f"{dict(case)}: {rows[-1]['ratios']}")
    return rows


def name_of(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def question_of(module: ModuleType) -> str:
    return (module.__doc__ or "").partition("\n")[0]


def measured(module: ModuleType, case: Case, *, rounds: int) -> dict[str, Any]:
    """The row of one case: seconds and peak memory of each way, ratios, and notes."""
    seconds, ratios, notes = _child(module, "seconds", case, rounds=rounds)
    names = [name for name, values in seconds.items() if not isinstance(values, str)]
    peaks = {name: _child(module, "memory", case, way=name) for name in names}
    row = _row(module.OURS, case, *_bearable(seconds, peaks))
    row["ratios"].update(ratios)
    row["notes"] += notes
    return row


def once(module: ModuleType, case: Case, way: str) -> dict[str, Any]:
    """The row of a case in which one way runs once, because more would take too long."""
    seconds, peak, resident, notes = _child(module, "once", case, way=way)
    row = _row(module.OURS, case, {way: [seconds]}, {way: peak})
    row["notes"] = [*notes, f"one run; the process held {resident:,.0f} MB at most, model included"]
    return row


def write(module: ModuleType, rows: Sequence[Mapping[str, Any]], **more: Any) -> Path:
    """Write rows with the machine, the versions and the command that they come from."""
    name = name_of(module)
    report = {
        "question": question_of(module),
        "ours": module.OURS,
        "command": f"python -m benchmarks {name}",
        "machine": machine(),
        "versions": versions(),
        **more,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    return path


def _bearable(*measures: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Seconds and peaks of the ways that could run, and notes on the others."""
    seconds, peaks = (
        {name: value for name, value in measure.items() if not isinstance(value, str)}
        for measure in measures
    )
    notes = [
        f"{name}: {value}"
        for measure in measures
        for name, value in measure.items()
        if isinstance(value, str)
    ]
    return seconds, peaks, notes


def _row(
    ours: str,
    case: Case,
    samples: Mapping[str, list[float]],
    peaks: Mapping[str, float],
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    seconds = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "case": dict(case),
        "seconds": seconds,
        "peak_mb": peaks,
        "samples": samples,
        "ratios": {
            "seconds": _ratios(ours, seconds, 0.0),
            "peak_mb": _ratios(ours, peaks, SEEN_MB),
        },
        "notes": list(notes),
    }


def _ratios(ours: str, values: Mapping[str, float], seen: float) -> dict[str, float]:
    """Ratios of ours to each other way whose value is above `seen`."""
    if ours not in values:
        return {}
    others = {name: value for name, value in values.items() if name != ours and value > seen}
    return {name: round(values[ours] / value, 3) for name, value in others.items()}


def machine() -> dict[str, Any]:
    """The machine on which the figures were measured."""
    import psutil
    import torch

    cpus = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in cpus if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "gpu": gpu,
    }


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _child(module: ModuleType, what: str, case: Case, **more: Any) -> Any:
    """The result of `main` for one case, in a fresh process, which prints why if it fails."""
    task = json.dumps({"module": module.__name__, "what": what, "case": dict(case), **more})
    environment = {**os.environ, **ONE_THREAD, **QUIET}
    if what != "seconds":
        # Freed blocks go back to the system at once, so that they do not hide a peak.
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.harness", task],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{module.__name__} failed with code {done.returncode} on {task}")
    return json.loads(done.stdout.splitlines()[-1])


def interleaved(ways: Ways, rounds: int) -> dict[str, list[float] | str]:
    """Seconds of each way, taken in turn after one run of each; or in words why there are none."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    reasons: dict[str, str] = {}
    for turn in range(rounds + 1):
        for name in (name for name in ways if name not in reasons):
            try:
                seconds = seconds_of(ways[name])
            except UnbearableError as error:
                reasons[name] = str(error)
            else:
                samples[name] += [seconds] if turn else []  # the first run warms up
    return {**samples, **reasons}


def seconds_of(way: Callable[[], object]) -> float:
    _wait_for_device()
    started = time.perf_counter()
    way()
    _wait_for_device()
    return time.perf_counter() - started


def peak_of(way: Callable[[], object]) -> float:
    """MiB by which the second run rises above what the process held before it."""
    if isinstance(way, Elsewhere):
        return way.peak()
    device = peak_on_device(way)
    gc.collect()
    if device:
        return peak_on_device(way)
    ctypes.CDLL(None).malloc_trim(0)
    before = _reset_peak()
    way()
    return (_resident("VmHWM") - before) / 1024


def _reset_peak() -> int:
    """Reset the process's high-water mark; kilobytes that it holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak_on_device(way: Callable[[], object]) -> float:
    """Run it; MiB by which the GPU's memory rises, 0 if it uses no GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        way()
        return 0.0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    way()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1])


def _wait_for_device() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Make one measurement in this process; the last line of the output is its result."""
    task = json.loads(sys.argv[1])
    module = importlib.import_module(task["module"])
    ways: Ways = module.ways(**task["case"])
    if task["what"] == "once":
        print(json.dumps(_first_run(module, ways, task["way"])))
    elif task["what"] == "seconds":
        samples = interleaved(ways, task["rounds"])
        more = module.aside(ways, samples) if hasattr(module, "aside") else ({}, [])
        print(json.dumps([samples, *more]))
    else:
        print(json.dumps(_peak_or_reason(ways[task["way"]])))


def _first_run(module: ModuleType, ways: Ways, way: str) -> tuple[float, float, float, list[str]]:
    """Seconds, the peak above what the process held before, its whole peak, and notes."""
    gc.collect()
    before = _reset_peak()
    seconds = seconds_of(ways[way])
    peak = _resident("VmHWM")
    _, notes = module.aside(ways, {way: [seconds]})
    return seconds, round((peak - before) / 1024, 1), peak / 1024, notes


def _peak_or_reason(way: Callable[[], object]) -> float | str:
    try:
        return round(peak_of(way), 1)
    except UnbearableError as error:
        return str(error)


if __name__ == "__main__":
    main()
