"""The numbers behind the page, as JSON that can stand in HTML."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from markupsafe import Markup

from flowtracer_plugin.backbone import StrongEdges
from flowtracer_plugin.report.display import Reading

EDGES_PER_UNIT = 5
"""Sources, and as many targets, that the page knows of each token: enough to read, and the page
grows with the length of the text instead of its square."""

LONG, EDGES_IF_LONG = 16_384, 3
"""Texts with more units show fewer, so that their pages load."""

_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&"}


def embed(value: Any) -> Markup:
    """JSON in ASCII, safe inside a script element; parsing it gives every text back exactly."""
    # Once `<`, `>` and `&` are escaped nothing is left that HTML could read.
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.translate(_ESCAPES))


def edges_per_unit(units: int) -> int:
    """Sources, and as many targets, that a page of so many units knows of each."""
    return EDGES_PER_UNIT if units <= LONG else EDGES_IF_LONG


def page_data(reading: Reading) -> dict[str, Any]:
    """What the page's script knows, in units.

    `sources` and `targets` hold `edgesPerUnit` pairs a unit, the strongest first: how many units
    away, and which share of the unit's throughput in thousandths.
    """
    trace, units = reading.trace, reading.units
    backbone, starts = trace.backbone, reading.starts
    return {
        "tokens": list(trace.tokens),
        "starts": None if len(starts) == len(trace.tokens) else starts.tolist(),
        "promptUnits": reading.prompt_units,
        "regions": "".join(unit.region[0] for unit in units),
        "ranks": [unit.rank for unit in units],
        "throughput": [_round(unit.throughput) for unit in units],
        "injected": _nonzero(np.add.reduceat(backbone.source, starts)),
        "absorbed": _nonzero(np.add.reduceat(backbone.sink, starts)),
        "edgesPerUnit": edges_per_unit(len(units)),
        "sources": _strongest(backbone.sources, reading),
        "targets": _strongest(backbone.targets, reading),
    }


def _strongest(edges: StrongEdges, reading: Reading) -> list[int]:
    """Distance and share of the strongest edges of each unit, flat; 0 where there are fewer."""
    count = len(reading.units)
    unit, other, flows = _between_units(edges, reading.starts, count)
    # By flow, and of equal ones the nearer: the page must not depend on how ties were broken.
    order = np.lexsort((np.abs(unit - other), -flows, unit))
    unit, other, flows = unit[order], other[order], flows[order]
    place = np.arange(len(unit)) - np.searchsorted(unit, unit)
    shares = np.rint(1000 * flows / np.where(reading.throughput > 0, reading.throughput, 1)[unit])
    most = edges_per_unit(count)
    shown = (place < most) & (shares > 0)
    pairs = np.zeros((count, most, 2), dtype=np.int64)
    where = unit[shown], place[shown]
    pairs[where] = np.column_stack([np.abs(unit - other)[shown], shares[shown]])
    return pairs.ravel().tolist()


def _between_units(
    edges: StrongEdges, starts: Int[np.ndarray, " unit"], count: int
) -> tuple[Int[np.ndarray, " edge"], Int[np.ndarray, " edge"], Float[np.ndarray, " edge"]]:
    """The edges of all tokens as those of units, each once, without those inside a unit."""
    unit_of = np.repeat(np.arange(count), np.diff([*starts, len(edges.token)]))
    ends = np.repeat(unit_of, edges.token.shape[1]), unit_of[edges.token.ravel()]
    apart = (ends[0] != ends[1]) & (edges.flow.ravel() > 0)
    pair, place = np.unique(ends[0][apart] * count + ends[1][apart], return_inverse=True)
    flows = np.bincount(place, weights=edges.flow.ravel()[apart], minlength=len(pair))
    return (*np.divmod(pair, count), flows)


def _nonzero(values: Float[np.ndarray, " unit"]) -> dict[str, float]:
    return {str(index): _round(float(values[index])) for index in np.flatnonzero(values).tolist()}


def _round(value: float) -> float:
    return float(f"{value:.4g}")
