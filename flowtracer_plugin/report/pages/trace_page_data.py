"""The numbers that the script of a trace's page works with."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8

from flowtracer_plugin.flow.backbone import StrongEdges
from flowtracer_plugin.report.display import ShownTrace
from flowtracer_plugin.report.drawing import RiverDrawing, StepDrawing
from flowtracer_plugin.report.pages.trace_page_marks import Marks

EDGES_PER_UNIT = 5
"""Sources, and as many targets, that the page holds for each unit, so that the page grows with the
length of the text and not with its square."""

LONG, EDGES_IF_LONG = 16_384, 3
"""Texts with more units than `LONG` hold fewer edges, so that their pages still load."""

SHARE_BITS = 10
"""Bits of a packed edge for its share of the throughput in thousandths. The other bits hold the
distance, which fits into 14 bits unless a text is long."""


def edges_per_unit(units: int) -> int:
    """The number of sources, and of targets, that a page holds for each of its `units`."""
    return EDGES_PER_UNIT if units <= LONG else EDGES_IF_LONG


def page_data(
    shown: ShownTrace,
    steps: StepDrawing,
    river: RiverDrawing,
    scores: Mapping[str, Float[np.ndarray, " token"]],
    marks: Mapping[str, Marks],
) -> dict[str, Any]:
    """The data that the page's script reads, by unit.

    `marks` are those without `plain` units, and those among all units.

    `throughput` is float32. `scores` holds one string for each other score, with the heat of each
    unit as a digit. `sources` and `targets` hold `perUnit` edges for each unit, the strongest
    first; an edge has `width` bytes with its distance in units and its share of the unit's
    throughput in thousandths. Numbers are little-endian, in base64.
    """
    trace, units, starts = shown.trace, shown.units, shown.starts
    backbone = trace.backbone
    return {
        "tokens": list(trace.tokens),
        "starts": None if len(starts) == len(trace.tokens) else starts.tolist(),
        "promptUnits": shown.prompt_units,
        "regions": "".join(unit.region[0] for unit in units),
        "marks": {name: one.places for name, one in marks.items()},
        "plain": np.flatnonzero(shown.plain).tolist(),
        "throughput": _base64(shown.throughput.astype("<f4")),
        "scores": [
            "".join(map(str, shown.heats(np.asarray(values, np.float64)).tolist()))
            for values in scores.values()
        ],
        "injected": _nonzero(np.add.reduceat(backbone.source, starts)),
        "absorbed": _nonzero(np.add.reduceat(backbone.sink, starts)),
        "edges": {
            "perUnit": edges_per_unit(len(units)),
            "width": _width(len(units)),
            "sources": _base64(_strongest(backbone.sources, shown)),
            "targets": _base64(_strongest(backbone.targets, shown)),
        },
        "steps": {
            "total": steps.total,
            "flows": [(first, second, _round(flow)) for first, second, flow in steps.flows],
        },
        "river": {
            "cuts": shown.river.cuts.tolist(),
            "layers": np.round(river.layers, 4).tolist(),
            "passing": np.round(shown.river.passing, 4).tolist(),
        },
    }


def _base64(values: Shaped[np.ndarray, "..."]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _width(units: int) -> int:
    return 3 if units <= LONG else 4


def _strongest(edges: StrongEdges, shown: ShownTrace) -> UInt8[np.ndarray, "unit edge byte"]:
    """The distance and share of the strongest edges of each unit; 0 where there are fewer."""
    count = len(shown.units)
    unit, other, flows = _between_units(edges, shown.unit_numbers, count)
    # By flow, and the nearer of equal ones: the page must not depend on how ties were broken.
    order = np.lexsort((np.abs(unit - other), -flows, unit))
    unit, other, flows = unit[order], other[order], flows[order]
    place = np.arange(len(unit)) - np.searchsorted(unit, unit)
    shares = np.rint(1000 * flows / np.where(shown.throughput > 0, shown.throughput, 1)[unit])
    kept = (place < edges_per_unit(count)) & (shares > 0)
    packed = np.zeros((count, edges_per_unit(count)), dtype="<u4")
    distance = np.abs(unit - other)[kept]
    packed[unit[kept], place[kept]] = (distance << SHARE_BITS) | shares[kept].astype(np.int64)
    return packed.view(np.uint8).reshape(*packed.shape, 4)[..., : _width(count)]


def _between_units(
    edges: StrongEdges, unit_of: Int[np.ndarray, " token"], count: int
) -> tuple[Int[np.ndarray, " edge"], Int[np.ndarray, " edge"], Float[np.ndarray, " edge"]]:
    """The edges between units, each once: the sums of the edges between their tokens."""
    ends = np.repeat(unit_of, edges.token.shape[1]), unit_of[edges.token.ravel()]
    apart = (ends[0] != ends[1]) & (edges.flow.ravel() > 0)
    pair, place = np.unique(ends[0][apart] * count + ends[1][apart], return_inverse=True)
    flows = np.bincount(place, weights=edges.flow.ravel()[apart], minlength=len(pair))
    return (*np.divmod(pair, count), flows)


def _nonzero(values: Float[np.ndarray, " unit"]) -> dict[str, float]:
    return {str(index): _round(float(values[index])) for index in np.flatnonzero(values).tolist()}


def _round(value: float) -> float:
    return float(f"{value:.4g}")
