"""Below which density is it faster to solve the flow on stored edges only?

Random causal graphs in float32, made before the clock starts. `sparse` solves along the stored
edges, `made_dense` makes the same graph dense first; `backend="auto"` chooses between these two
(`Backend.crossover`). `dense` is a graph that was dense before. Each library is compared with
itself: numpy with scipy's CSR on the CPU, torch with its own CSR, on the GPU if there is one. In
the sparsest graphs the question may not reach the answer; the work is the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import torch

import flowtracer_plugin as ft
from benchmarks.graphs import ends, random_attention
from benchmarks.harness import Report, Row, Ways
from benchmarks.models import device

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = "sparse"
DENSITIES = (1.0, 0.3, 0.1, 0.05, 0.03, 0.01, 0.003)
CASES = [
    {"library": library, "tokens": tokens, "density": density}
    for library in ("numpy", "torch")
    for tokens in (512, 2048, 8192)
    for density in DENSITIES
]
TARGETS = ()


def ways(*, library: str, tokens: int, density: float) -> Ways:
    arrays = random_attention(tokens, density=density), *ends(tokens)
    if library == "torch":
        arrays = tuple(torch.from_numpy(array).to(device()) for array in arrays)
    dense = ft.FlowGraph.from_attention(*arrays)
    sparse = dense.to_sparse()
    return {
        "sparse": lambda: ft.solve_graph(sparse, unreached="zero", backend="sparse").throughput,
        "made_dense": lambda: ft.solve_graph(sparse, unreached="zero", backend="dense").throughput,
        "dense": lambda: ft.solve_graph(dense, unreached="zero").throughput,
    }


def curves(rows: Sequence[Row]) -> Iterator[tuple[str, int, dict[float, float]]]:
    """For each library and length, ratios of seconds, sparse to made dense, by falling density."""

    def size(row: Row) -> tuple[str, int]:
        return row["case"]["library"], row["case"]["tokens"]

    for (library, tokens), group in groupby(sorted(rows, key=size), key=size):
        ratios = {row["case"]["density"]: row["ratios"]["seconds"]["made_dense"] for row in group}
        yield library, tokens, dict(sorted(ratios.items(), reverse=True))


def crossover(ratios: Mapping[float, float]) -> float | None:
    """The density below which sparse was always faster; `None` if there is none.

    Between two measured densities, the ratio is interpolated as a power of the density.
    """
    points = sorted(ratios.items())
    if points[0][1] >= 1:
        return None
    for (low, below), (high, above) in pairwise(points):
        if above >= 1:
            share = -math.log(below) / (math.log(above) - math.log(below))
            return low * (high / low) ** share
    return points[-1][0]


def remarks(rows: Sequence[Row]) -> list[str]:
    return [_remark(*curve) for curve in curves(rows)]


def _remark(library: str, tokens: int, ratios: Mapping[float, float]) -> str:
    found = crossover(ratios)
    subject = f"{library}, {tokens} tokens: crossover"
    if found is None:
        return f"{subject} below {min(ratios):.2g}, the sparsest graph measured"
    if found == max(ratios):
        return f"{subject} at {found:.2g}: sparse is faster at every density"
    return f"{subject} at a density of {found:.2g}"


def plots(report: Report) -> dict[str, Figure]:
    """The ratio over the density, a panel per library."""
    from benchmarks.plots import panels, tick

    libraries = sorted({row["case"]["library"] for row in report["rows"]})
    figure, axes = panels(len(libraries))
    for axis, library in zip(axes, libraries, strict=True):
        for name, tokens, ratios in curves(report["rows"]):
            if name == library:
                axis.plot(*zip(*ratios.items(), strict=True), "o-", label=f"{tokens} tokens")
        axis.axhline(1, color="0.5", linestyle=":")
        axis.set(xlabel="density", ylabel="seconds, sparse : made dense", title=library)
        axis.legend()
        tick(axis, sorted({row["case"]["density"] for row in report["rows"]}))
    return {"sparse_against_dense": figure}
