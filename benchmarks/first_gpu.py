"""What happens on a real GPU? Tests, models, waits, long texts and a training, in one file to send.

No GPU was at hand when this package was written. One command runs all that waits for one, writes
`build/first_gpu.json` and prints a table. It works in parts and writes the file after each, so that
it can be stopped at any time; the next call goes on with the parts that are missing.

    make gpu                  # sets up, keeps an installed CUDA torch, and runs all parts
    make gpu ARGS="--minutes 10"

Without a CUDA device it says so, and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import flowtracer_plugin as ft
from benchmarks.harness import MIB, machine, versions
from benchmarks.models import SMALL, build, forward, number_tokenizer
from flowtracer_plugin.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "first_gpu.json"
LENGTHS = (1024, 4096, 16384, 65536, 131072)
PRESETS = ("paper", "decided", "derivation")
FAMILIES = ("llama", "mistral", "gemma3_text", "qwen3", "gpt_oss")
IMPLEMENTATIONS = ("sdpa", "flash_attention_2")

Left = Callable[[], float]
"""The seconds that are left."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="stop after so many minutes")
    parser.add_argument("--out", type=Path, default=OUT, help="the file to write, or to go on with")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"all, or some of {[*PARTS]}")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        parser.exit(
            1,
            f"wanted a CUDA device, found none: torch is {torch.__version__}. On a machine with a "
            "GPU, install the CUDA build of torch first (https://pytorch.org/get-started), then "
            "run `make gpu` again; it keeps the torch that it finds\n",
        )
    found = run(arguments.parts or list(PARTS), arguments.out, arguments.minutes)
    print(table(found))
    print(f"\nPlease send {arguments.out}")


def run(parts: list[str], out: Path, minutes: float) -> dict[str, Any]:
    """The results of the parts, old ones included; the file is written after each part."""
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    found |= {"machine": machine(), "versions": versions()}
    end = perf_counter() + 60 * minutes
    for name in parts:
        done = name in found and "failed" not in found[name]
        if done or end - perf_counter() < 30:
            continue
        started = perf_counter()
        try:
            result = PARTS[name](lambda: end - perf_counter())
        except Exception as error:  # noqa: BLE001 - whatever breaks here is what we want to know
            result = {"failed": f"{type(error).__name__}: {error}"}
        found[name] = {**result, "seconds": round(perf_counter() - started, 1)}
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps(found, indent=2).encode())
        print(f"{name}: {found[name]}", flush=True)
    return found


def table(found: Mapping[str, Any]) -> str:
    """The parts in rows; those without a result are missing."""
    lines = ["| part | result |", "| --- | --- |"]
    for name in PARTS:
        result = found.get(name, {"missing": "run it again with more minutes"})
        said = "; ".join(f"{key}: {value}" for key, value in result.items())
        lines.append(f"| {name} | {said.replace('|', '/')} |")
    return "\n".join(lines)


def tests(left: Left) -> dict[str, Any]:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--tb=short"]
    environment = {**os.environ, "FLOWTRACER_REQUIRE": "gpu"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, timeout=left(), capture_output=True, text=True
    )
    said = done.stdout.strip().splitlines()
    return {"said": said[-1] if said else "", "tail": said[-40:] if done.returncode else []}


def models(_left: Left) -> dict[str, Any]:
    """Families of models in bfloat16, by each implementation of attention that is there."""
    from tests.families import tiny_model

    found: dict[str, Any] = {}
    for family in FAMILIES:
        for implementation in IMPLEMENTATIONS:
            name = f"{family}, {implementation}"
            if implementation.startswith("flash") and find_spec("flash_attn") is None:
                found[name] = "flash_attn is not installed"
                continue
            try:
                model = tiny_model(family).to(torch.bfloat16).cuda()
                model.set_attn_implementation(implementation)
                ft.wrap(model, preset="paper").reader.verify()
                found[name] = "read as the model computes it"
            except Exception as error:  # noqa: BLE001 - as in `run`
                found[name] = f"{type(error).__name__}: {error}"
    return found


def waits(_left: Left) -> dict[str, Any]:
    """How often PyTorch itself says that the host waits in a trace, to hold against our count."""
    found = {}
    for name in PRESETS:
        tracer, prompt, response = _traced(name, 256)
        tracer.trace_tokens(prompt, response)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                tracer.trace_tokens(prompt, response)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        ours = [one for one in caught if "flowtracer" in one.filename]
        found[name] = f"{len(ours)} of ours, {len(caught) - len(ours)} of others"
    return found


def lengths(left: Left) -> dict[str, Any]:
    """Seconds and memory of traces of a random Llama of 12 layers, up to 131,072 tokens."""
    found: dict[str, Any] = {}
    for tokens in LENGTHS:
        for preset in PRESETS:
            if left() < 60:
                return found
            tracer, prompt, response = _traced(preset, tokens)
            ids = torch.tensor([[*prompt, *response]], device="cuda")
            row = {}
            for name, work in (
                ("trace", lambda: tracer.trace_tokens(prompt, response)),  # noqa: B023
                ("forward", lambda: forward(tracer.model, ids, logits_to_keep=1)),  # noqa: B023
            ):
                row[name] = _measured(work)
            found[f"{tokens} tokens, {preset}"] = row
    return found


def training(left: Left) -> dict[str, Any]:
    """The demo: a small policy trained with flow credit."""
    done = subprocess.run(
        [sys.executable, "examples/demo.py"],
        cwd=ROOT,
        timeout=left(),
        capture_output=True,
        text=True,
    )
    return {"code": done.returncode, "tail": (done.stdout + done.stderr).splitlines()[-15:]}


def _traced(preset: str, tokens: int) -> tuple[ft.FlowTracer, list[int], list[int]]:
    config = SMALL.__class__(**{**SMALL.to_dict(), "max_position_embeddings": max(LENGTHS)})
    model = build(config).to(torch.bfloat16).cuda()
    ids = torch.randint(3, SMALL.vocab_size, (tokens,)).tolist()
    tracer = ft.wrap(model, number_tokenizer(), preset=preset, backend="interface")
    return tracer, ids[: tokens // 4], ids[tokens // 4 :]


def _measured(work: Callable[[], Any]) -> str:
    """Seconds of the second run, and the memory that it took on the device."""
    try:
        work()
        torch.cuda.synchronize()
        before, started = torch.cuda.memory_allocated(), perf_counter()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
    except (MemoryError, torch.OutOfMemoryError, ft.TooLittleMemoryError) as error:
        torch.cuda.empty_cache()
        return f"does not fit: {str(error).splitlines()[0]}"
    seconds = perf_counter() - started
    return f"{seconds:.3f} s, {(torch.cuda.max_memory_allocated() - before) / MIB:,.0f} MB"


PARTS: Mapping[str, Callable[[Left], dict[str, Any]]] = {
    "models": models,
    "waits": waits,
    "lengths": lengths,
    "training": training,
    "tests": tests,
}
"""The parts, the shortest first."""

if __name__ == "__main__":
    main()
