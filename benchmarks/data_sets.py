"""How fast is a data set traced in bulk, next to a loop of traces?

Stories and their solutions, given to the embedded reasoner and to SmolLM2-135M-Instruct, with the
default preset. `loop` traces one after another and writes nothing; `bulk` is `trace_dataset` in
batches of eight, with its tables, its checks and the hash of the weights. `workers` does the same
in two processes of one thread each, which start, import torch and load the model within the time
that is measured; with more rows this start counts less. Megabytes are those of the process that
asks; what a worker holds is below the table.

    FLOWTRACER_MODELS=folder python -m benchmarks data_sets
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import flowtracer_plugin as ft
from benchmarks.harness import Row, Target, Ways
from benchmarks.models import SMOLLM2, load, pretrained
from examples.reasoner.problems import make_problems
from examples.reasoner.train import MODEL_DIR
from flowtracer_plugin.trace.tracer import FlowTracer

REASONER = "embedded reasoner"
OURS = "bulk"
CASES = [{"model": REASONER, "rows": 256}, {"model": SMOLLM2, "rows": 32}]
TARGETS = [
    Target(other="loop", measure="seconds", ratio=0.7, where={"model": REASONER}),
    Target(other="loop", measure="seconds", ratio=1.0, where={"model": SMOLLM2}),
]


def ways(*, model: str, rows: int) -> Ways:
    data = [
        {"prompt": one.prompt, "response": one.response, "answer": one.answer}
        for one in make_problems(rows, seed=0)
    ]
    make = partial(tracer_of, model)
    tracer = make()

    def loop() -> None:
        for row in data:
            tracer.trace(row["prompt"], row["response"])

    def bulk(source: Any, workers: int) -> None:
        with TemporaryDirectory() as folder:
            size = max(1, rows // 8)
            ft.trace_dataset(source, data, folder, shard_size=size, workers=workers)

    return {"bulk": partial(bulk, tracer, 1), "loop": loop, "workers": partial(bulk, make, 2)}


def tracer_of(model: str) -> FlowTracer:
    folder = MODEL_DIR if model == REASONER else pretrained(model)
    return ft.wrap(*load(Path(folder)), answer="last_number")


def aside(ways: Ways, samples: Any) -> tuple[dict[str, Any], list[str]]:
    """How much memory the largest worker held."""
    held = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {}, [f"a worker held {held:,.0f} MB at most, model and libraries included"]


def remarks(rows: Sequence[Row]) -> list[str]:
    """Rows per second, for each case."""
    return [
        f"{row['case']['model']}: "
        + ", ".join(
            f"{row['case']['rows'] / seconds:.3g} rows/s by `{way}`"
            for way, seconds in row["seconds"].items()
        )
        for row in rows
    ]
