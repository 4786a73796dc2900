"""The numbers behind the page, as JSON that can stand in HTML."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from markupsafe import Markup

from flowtracer_plugin.report.display import Reading

EDGES_PER_UNIT = 5
"""Sources, and as many targets, that the page knows of each token: enough to read, and the page
grows with the length of the text instead of its square."""

_BLOCK = 512
_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&"}


def embed(value: Any) -> Markup:
    """JSON in ASCII, safe inside a script element; parsing it gives every text back exactly."""
    # Once `<`, `>` and `&` are escaped nothing is left that HTML could read.
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.translate(_ESCAPES))


def page_data(reading: Reading) -> dict[str, Any]:
    """What the page's script knows, in units.

    `sources` and `targets` hold `EDGES_PER_UNIT` pairs a unit, the strongest first: how many units
    away, and which share of the unit's throughput in thousandths.
    """
    trace, units = reading.trace, reading.units
    flow, starts = trace.flow, reading.starts
    edges = _between_units(flow.edge_flow(), starts)
    return {
        "tokens": list(trace.tokens),
        "starts": None if len(starts) == len(trace.tokens) else starts.tolist(),
        "promptUnits": reading.prompt_units,
        "regions": "".join(unit.region[0] for unit in units),
        "ranks": [unit.rank for unit in units],
        "throughput": [_round(unit.throughput) for unit in units],
        "injected": _nonzero(np.add.reduceat(flow.source, starts)),
        "absorbed": _nonzero(np.add.reduceat(flow.sink_flow(), starts)),
        "edgesPerUnit": EDGES_PER_UNIT,
        "sources": _strongest(edges, reading.throughput),
        "targets": _strongest(edges.T, reading.throughput),
    }


def _between_units(
    edges: Float[np.ndarray, "token token"], starts: Int[np.ndarray, " unit"]
) -> Float[np.ndarray, "unit unit"]:
    if len(starts) == len(edges):
        return edges
    joined = np.add.reduceat(np.add.reduceat(edges, starts, axis=0), starts, axis=1)
    np.fill_diagonal(joined, 0.0)
    return joined


def _strongest(
    edges: Float[np.ndarray, "unit other"], throughput: Float[np.ndarray, " unit"]
) -> list[int]:
    """Distance and share of the strongest edges of each row, flat; 0 where there are fewer."""
    return [number for block in _strongest_blocks(edges, throughput) for number in block]


def _strongest_blocks(
    edges: Float[np.ndarray, "unit other"], throughput: Float[np.ndarray, " unit"]
) -> Iterator[list[int]]:
    kept = min(EDGES_PER_UNIT, len(edges))
    for start in range(0, len(edges), _BLOCK):
        block = np.ascontiguousarray(edges[start : start + _BLOCK])
        few = np.argpartition(-block, kept - 1, axis=1)[:, :kept]
        flows = np.take_along_axis(block, few, axis=1)
        # By flow, and of equal ones the nearer: the page must not depend on the partition.
        order = np.lexsort((few, -flows), axis=1)
        few, flows = (np.take_along_axis(part, order, axis=1) for part in (few, flows))
        whole = np.where(throughput > 0, throughput, 1)[start : start + _BLOCK, None]
        shares = np.rint(1000 * flows / whole).astype(np.int64)
        distances = np.abs(few - np.arange(start, start + len(block))[:, None]) * (shares > 0)
        pairs = np.zeros((len(block), EDGES_PER_UNIT, 2), dtype=np.int64)
        pairs[:, :kept] = np.stack([distances, shares], axis=-1)
        yield pairs.ravel().tolist()


def _nonzero(values: Float[np.ndarray, " unit"]) -> dict[str, float]:
    return {str(index): _round(float(values[index])) for index in np.flatnonzero(values).tolist()}


def _round(value: float) -> float:
    return float(f"{value:.4g}")
