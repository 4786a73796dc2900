"""What happens on a real GPU? Tests, models, questions of speed, and a training, in one file.

No GPU was at hand when this package was written. This command runs all that waits for one, writes
`build/first_gpu.json` and prints a table. It works in steps of at most a few minutes and writes the
file after each, so that it can be stopped at any time; the next call goes on with what is missing.

    make gpu                                      # sets up, keeps a CUDA torch, runs all parts
    make gpu ARGS="--minutes 10"                  # ten minutes of it; again, for the next ten
    make gpu ARGS="models lengths"                # these parts
    python -m benchmarks.first_gpu --rehearse     # tiny sizes on this machine's CPU

Without a CUDA device it says so, and runs nothing but a rehearsal. `make gpu` installs nothing if
the CUDA build of torch that it finds is of a version that this package does not work with.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.gpu_parts import FULL, PARTS, REHEARSAL, Left, Step
from benchmarks.harness import ROOT, machine, versions
from flowtracer_plugin.files import write_atomically

OUT = ROOT / "build" / "first_gpu.json"
SHORTEST = 30
"""Seconds that must be left for a step to begin."""

Found = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=60, help="stop after so many minutes")
    parser.add_argument("--out", type=Path, help=f"the file to write; by default {OUT.name}")
    parser.add_argument("--again", action="store_true", help="also repeat the steps that failed")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"all, or some of {[*PARTS]}")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not (arguments.rehearse or torch.cuda.is_available()):
        parser.exit(
            1,
            f"wanted a CUDA device, found none: torch is {torch.__version__}. On a machine with a "
            "GPU, install the CUDA build of torch first (https://pytorch.org/get-started), then "
            "run `make gpu` again; it keeps the torch that it finds\n",
        )
    out = arguments.out or (OUT.with_stem("rehearsal") if arguments.rehearse else OUT)
    size = REHEARSAL if arguments.rehearse else FULL
    steps = {name: PARTS[name](size) for name in arguments.parts or PARTS}
    try:
        found = run(steps, out, 60 * arguments.minutes, again=arguments.again)
    except ValueError as error:
        parser.error(str(error))
    print(table(found, steps))
    print(f"\n{'A rehearsal:' if arguments.rehearse else 'Please send'} {out}")


def run(
    parts: Mapping[str, Mapping[str, Step]], out: Path, seconds: float, *, again: bool = False
) -> Found:
    """The results of all steps so far, which are in the file after each step.

    Steps that have a result are not repeated. One that the time limit ended has none.

    Args:
        parts: The steps of each part, by their names.
        out: The file; what it holds is kept.
        seconds: The time limit. No step begins in the last half minute.
        again: Also repeat steps that failed.

    Raises:
        ValueError: The file holds results of another machine.
    """
    found: Found = json.loads(out.read_text()) if out.exists() else {}
    here = {"machine": machine(), "versions": versions(), "missing": missing()}
    if found and found["machine"]["gpu"] != here["machine"]["gpu"]:
        raise ValueError(
            f"{str(out)!r} holds results of {found['machine']['gpu']}, and this machine has "
            f"{here['machine']['gpu']}; name another file with --out"
        )
    found |= here
    end = perf_counter() + seconds
    waiting = [
        (part, name, step)
        for part, steps in parts.items()
        for name, step in steps.items()
        if (held := found.get(part, {}).get(name)) is None or (again and "failed" in held)
    ]
    for part, name, step in (bar := tqdm(waiting, unit="step")):
        bar.set_postfix_str(f"{part}: {name}")
        if end - perf_counter() < SHORTEST:
            break
        started = perf_counter()
        result = _result(step, lambda: end - perf_counter())
        if result is None:
            break
        taken = round(perf_counter() - started, 1)
        found.setdefault(part, {})[name] = {**result, "seconds": taken}
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps(found, indent=1).encode())
    return found


def _result(step: Step, left: Left) -> Mapping[str, Any] | None:
    """What a step returns, or how it fails; None if the time limit ended it."""
    try:
        return step(left)
    except subprocess.TimeoutExpired:
        return None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - what breaks is what we want to know
        return {"failed": f"{type(error).__name__}: {error}"[:2000]}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def missing() -> list[str]:
    """What this machine lacks, in words."""
    cuda = torch.cuda.is_available()
    wanted = {
        "CUDA": cuda,
        "bfloat16 on the GPU": cuda and torch.cuda.is_bf16_supported(),
        "the package flash_attn": find_spec("flash_attn") is not None,
        "FLOWTRACER_MODELS, a folder with pretrained models": "FLOWTRACER_MODELS" in os.environ,
    }
    return [name for name, there in wanted.items() if not there]


def table(found: Found, parts: Mapping[str, Mapping[str, Step]]) -> str:
    """What is missing, a row for each part, and one for each step."""
    lines = [f"missing here: {', '.join(found['missing']) or 'nothing'}", ""]
    lines += ["| part | steps done | failed |", "| --- | --: | --: |"]
    for part, steps in parts.items():
        done = found.get(part, {})
        failed = sum("failed" in result for result in done.values())
        lines.append(f"| {part} | {len(done)} of {len(steps)} | {failed} |")
    lines += ["", "| part | step | result |", "| --- | --- | --- |"]
    for part in parts:
        for name, result in found.get(part, {}).items():
            lines.append(f"| {part} | {name} | {_said(result).replace('|', '/')} |")
    return "\n".join(lines)


def _said(result: Mapping[str, Any]) -> str:
    """The numbers and the first lines of the texts of a result."""
    short = {name: value for name, value in result.items() if isinstance(value, int | float | str)}
    return "; ".join(f"{name}: {_line(value)}" for name, value in short.items())


def _line(value: object) -> str:
    return str(value).partition("\n")[0][:200]


if __name__ == "__main__":
    main()
