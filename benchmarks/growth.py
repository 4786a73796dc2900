"""How do time and memory of a trace grow?

One axis at a time, the others at 512 tokens, one sequence, four layers read and a hidden size of
512; the model is a random Llama of twelve layers, float32. Layers are the last ones, so that the
forward pass is the same whichever are read; batches are of 256 tokens. `trace` includes the flow,
`forward` is the plain forward pass. Exponents are slopes on logarithmic axes, by least squares over
the larger half of an axis, at least three sizes: 1 is linear, 2 is quadratic.

What to expect: over tokens, linear layers take time in proportion and attention by the square, so
that exponents lie between 1 and 2; the map of a dense trace grows with the square, all else in
proportion (`long_sequences` is about traces without a map). Over batches everything is in
proportion. Over the layers that are read nothing grows, since reading one is a small part of a
forward pass, and they share one map. Over the hidden size, linear layers take time by the square
and attention, whose heads become more, in proportion; memory is in proportion.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import linear_regression
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import LlamaConfig

import flowtracer_plugin as ft
from benchmarks.harness import Case, Ways, measured, write
from benchmarks.models import SMALL, build, device, forward

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUESTION = "How do time and memory of a trace grow?"
OURS = "trace"
TARGETS = ()

BASE = {"tokens": 512, "batch": 1, "layers": 4, "hidden": 512}
# A way that goes further than the others extends an axis: `ways` leaves out those that do not.
AXES: Mapping[str, Sequence[Mapping[str, int]]] = {
    "tokens": [{"tokens": 2**power} for power in range(8, 14)],
    "batch": [{"tokens": 256, "batch": 2**power} for power in range(7)],
    "layers": [{"layers": layers} for layers in (1, 2, 3, 4, 6, 8, 12)],
    "hidden": [{"hidden": hidden} for hidden in (128, 256, 512, 768)],
}
CASES = [{"axis": axis, **BASE, **size} for axis, sizes in AXES.items() for size in sizes]
MEASURES = {"seconds": "seconds", "peak_mb": "peak megabytes"}

Row = Mapping[str, Any]
Curve = Mapping[int, float]


def ways(*, axis: str, tokens: int, batch: int, layers: int, hidden: int) -> Ways:
    config = sized(hidden)
    model = build(config).to(device())
    ids = torch.randint(0, config.vocab_size, (batch, tokens), device=device())
    place = torch.arange(tokens, device=device()).expand(batch, tokens)
    question, answer = (place > 0) & (place < tokens // 4), place >= tokens - 4
    last = range(config.num_hidden_layers - layers, config.num_hidden_layers)
    tracer = ft.wrap(model, layers=last)
    return {
        "trace": lambda: ft.solve_flow(tracer.attention(ids), question, answer),
        "forward": lambda: forward(model, ids),
    }


def sized(hidden: int) -> LlamaConfig:
    """`SMALL` with another width, and heads of the same size."""
    config = copy.deepcopy(SMALL)
    share = hidden / config.hidden_size
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(config, name, round(getattr(config, name) * share))
    return config


def run(module: ModuleType, *, rounds: int = 5, cases: Sequence[Case] | None = None) -> Path:
    """As the harness, and the exponents beside the rows."""
    rows = []
    for case in tqdm(cases or CASES, desc="growth", unit="case"):
        rows.append(measured(module, case, rounds=rounds))
        tqdm.write(f"{case}: {rows[-1]['seconds']}, {rows[-1]['peak_mb']}")
    return write(module, rows, rounds=rounds, exponents=exponents(rows))


def curves(rows: Sequence[Row], measure: str) -> Iterator[tuple[str, str, Curve]]:
    """Each way along each axis: the values by size."""
    for axis, group in groupby(rows, key=lambda row: row["case"]["axis"]):
        found: dict[str, dict[int, float]] = {}
        for row in group:
            for way, value in row[measure].items():
                found.setdefault(way, {})[row["case"][axis]] = value
        for way, curve in found.items():
            yield axis, way, curve


def exponents(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """By axis, measure and way; none for less than three sizes that were seen to take any."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for measure in MEASURES:
        for axis, way, curve in curves(rows, measure):
            slope = exponent(curve)
            if slope is not None:
                found.setdefault(axis, {}).setdefault(measure, {})[way] = slope
    return found


def exponent(curve: Curve) -> float | None:
    """The slope of the larger half, on logarithmic axes."""
    sizes = sorted(curve)[-max(3, math.ceil(len(curve) / 2)) :]
    if len(sizes) < 3 or min(curve[size] for size in sizes) <= 0:
        return None
    logarithms = [math.log(size) for size in sizes]
    slope = linear_regression(logarithms, [math.log(curve[size]) for size in sizes]).slope
    return round(slope, 2) + 0.0  # without the sign of a zero


def remarks(rows: Sequence[Row]) -> list[str]:
    return [
        f"over {axis}, {MEASURES[measure]}: "
        + ", ".join(f"`{way}` grows with exponent {slope:.2f}" for way, slope in found.items())
        for axis, measures in exponents(rows).items()
        for measure, found in measures.items()
    ]


def plots(report: Mapping[str, Any]) -> dict[str, Figure]:
    """A figure for each axis, time beside memory."""
    from benchmarks.plots import panels, tick

    found: dict[str, Figure] = {}
    for axis in dict.fromkeys(row["case"]["axis"] for row in report["rows"]):
        figure, panes = panels(2)
        cases = (row["case"] for row in report["rows"])
        sizes = sorted({case[axis] for case in cases if case["axis"] == axis})
        for pane, (measure, label) in zip(panes, MEASURES.items(), strict=True):
            for along, way, curve in curves(report["rows"], measure):
                if along == axis:
                    slope = exponent(curve)
                    name = way if slope is None else f"{way}, exponent {slope:.2f}"
                    pane.plot(list(curve), list(curve.values()), "o-", label=name)
            pane.set(xlabel=axis, ylabel=label)
            pane.legend()
            tick(pane, sizes)
        found[f"growth_{axis}"] = figure
    return found
