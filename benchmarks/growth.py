"""How do time and memory of a trace grow?

One axis grows at a time; the others stay at 512 tokens, one sequence, four layers read and a hidden
size of 512. The model is a random Llama of twelve layers, float32. The last layers are read, so
that the forward pass is always the same; batches have 256 tokens. `trace` includes the flow,
`forward` is the plain forward pass. Exponents are slopes on logarithmic axes, by least squares over
the larger half of an axis, at least three sizes: 1 is linear, 2 is quadratic.

What to expect:

* Tokens: linear layers take linear time and attention quadratic time, so exponents lie between 1
  and 2. The attention map of a dense trace grows quadratically, all other memory linearly
  (`long_sequences` is about traces without a map).
* Batch: everything is linear.
* Layers read: nothing grows, since reading a layer is a small part of a forward pass, and all
  layers share one map.
* Hidden size: linear layers take quadratic time; attention, which has more heads, linear time;
  memory is linear.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import linear_regression
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from transformers import LlamaConfig

import flowtracer_plugin as ft
from benchmarks.graphs import ends
from benchmarks.harness import Report, Row, Ways, rows_of, write
from benchmarks.models import SMALL, build, device, forward

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = "trace"
TARGETS = ()

BASE = {"tokens": 512, "batch": 1, "layers": 4, "hidden": 512}
AXES: Mapping[str, Sequence[Mapping[str, int]]] = {
    "tokens": [{"tokens": 2**power} for power in range(8, 14)],
    "batch": [{"tokens": 256, "batch": 2**power} for power in range(7)],
    "layers": [{"layers": layers} for layers in (1, 2, 3, 4, 6, 8, 12)],
    "hidden": [{"hidden": hidden} for hidden in (128, 256, 512, 768)],
}
CASES = [{"axis": axis, **BASE, **size} for axis, sizes in AXES.items() for size in sizes]
MEASURES = {"seconds": "seconds", "peak_mb": "peak megabytes"}

Curve = Mapping[int, float]


def ways(*, axis: str, tokens: int, batch: int, layers: int, hidden: int) -> Ways:
    config = sized(hidden)
    model = build(config).to(device())
    ids = torch.randint(0, config.vocab_size, (batch, tokens), device=device())
    masks = [torch.from_numpy(mask).to(device()).expand(batch, tokens) for mask in ends(tokens)]
    last = range(config.num_hidden_layers - layers, config.num_hidden_layers)
    tracer = ft.wrap(model, layers=last, preset="paper")
    return {
        "trace": lambda: ft.solve_flow(tracer.attention(ids), *masks),
        "forward": lambda: forward(model, ids),
    }


def sized(hidden: int) -> LlamaConfig:
    """`SMALL` with another width, and with heads of the same size."""
    config = copy.deepcopy(SMALL)
    share = hidden / config.hidden_size
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(config, name, round(getattr(config, name) * share))
    return config


def run(module: ModuleType, *, rounds: int) -> Path:
    """Measure as the harness does, and write the exponents with the rows."""
    rows = rows_of(module, rounds=rounds)
    return write(module, rows, rounds=rounds, exponents=exponents(rows))


def by_axis(rows: Sequence[Row]) -> dict[str, list[Row]]:
    axes = dict.fromkeys(row["case"]["axis"] for row in rows)
    return {axis: [row for row in rows if row["case"]["axis"] == axis] for axis in axes}


def curves(rows: Sequence[Row], axis: str, measure: str) -> dict[str, Curve]:
    """For each way, the values by size along the axis."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for way, value in row[measure].items():
            found.setdefault(way, {})[row["case"][axis]] = value
    return found


def exponents(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Exponents by axis, measure and way; none for fewer than three sizes, or without a rise."""
    return {
        axis: {
            measure: {
                way: slope
                for way, curve in curves(group, axis, measure).items()
                if (slope := exponent(curve)) is not None
            }
            for measure in MEASURES
        }
        for axis, group in by_axis(rows).items()
    }


def exponent(curve: Curve) -> float | None:
    """The slope over the larger half of the sizes, on logarithmic axes."""
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
        if found
    ]


def plots(report: Report) -> dict[str, Figure]:
    """A figure for each axis."""
    groups = by_axis(report["rows"])
    return {f"growth_{axis}": plot(rows, axis, slopes=True) for axis, rows in groups.items()}


def plot(rows: Sequence[Row], axis: str, *, slopes: bool) -> Figure:
    """Time beside memory of every way along an axis, with exponents in the legend or without."""
    from benchmarks.plots import panels, tick

    figure, panes = panels(2)
    for pane, (measure, label) in zip(panes, MEASURES.items(), strict=True):
        for way, curve in curves(rows, axis, measure).items():
            slope = exponent(curve) if slopes else None
            name = way if slope is None else f"{way}, exponent {slope:.2f}"
            pane.plot(list(curve), list(curve.values()), "o-", label=name)
        pane.set(xlabel=axis, ylabel=label)
        pane.legend()
        tick(pane, sorted(row["case"][axis] for row in rows))
    return figure
