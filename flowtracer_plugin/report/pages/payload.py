"""The numbers behind the page, as JSON that can stand in HTML."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8
from markupsafe import Markup

from flowtracer_plugin.flow.backbone import StrongEdges
from flowtracer_plugin.flow.river import River
from flowtracer_plugin.report.display import Reading
from flowtracer_plugin.report.drawing import StepDrawing, river_layers

EDGES_PER_UNIT = 5
"""Sources, and as many targets, that the page knows of each token: enough to read, and the page
grows with the length of the text instead of its square."""

LONG, EDGES_IF_LONG = 16_384, 3
"""Texts with more units show fewer, so that their pages load."""

SHARE_BITS = 10
"""Of an edge: its share of the throughput in thousandths. The rest of it is the distance, which for
texts that are not long fits into 14 bits."""

_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&"}


def embed(value: Any) -> Markup:
    """JSON in ASCII, safe inside a script element; parsing it gives every text back exactly."""
    # Once `<`, `>` and `&` are escaped nothing is left that HTML could read.
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.translate(_ESCAPES))


def edges_per_unit(units: int) -> int:
    """Sources, and as many targets, that a page of so many units knows of each."""
    return EDGES_PER_UNIT if units <= LONG else EDGES_IF_LONG


def page_data(
    reading: Reading,
    steps: StepDrawing,
    river: River,
    scores: Mapping[str, Float[np.ndarray, " token"]],
) -> dict[str, Any]:
    """What the page's script knows, in units.

    `throughput` is float32. `scores` holds the shade of every unit by each other score, a digit.
    `sources` and `targets` hold `perUnit` edges a unit, the strongest first, of `width` bytes: how
    many units away, and which share of the unit's throughput in thousandths. All are little-endian,
    in base64.
    """
    trace, units, starts = reading.trace, reading.units, reading.starts
    backbone = trace.backbone
    return {
        "tokens": list(trace.tokens),
        "starts": None if len(starts) == len(trace.tokens) else starts.tolist(),
        "promptUnits": reading.prompt_units,
        "regions": "".join(unit.region[0] for unit in units),
        "throughput": _base64(reading.throughput.astype("<f4")),
        "scores": [
            "".join(map(str, reading.heats(np.asarray(values, np.float64)).tolist()))
            for values in scores.values()
        ],
        "injected": _nonzero(np.add.reduceat(backbone.source, starts)),
        "absorbed": _nonzero(np.add.reduceat(backbone.sink, starts)),
        "edges": {
            "perUnit": edges_per_unit(len(units)),
            "width": _width(len(units)),
            "sources": _base64(_strongest(backbone.sources, reading)),
            "targets": _base64(_strongest(backbone.targets, reading)),
        },
        "steps": {
            "total": steps.total,
            "flows": [(first, second, _round(flow)) for first, second, flow in steps.flows],
        },
        "river": {
            "cuts": river.cuts.tolist(),
            "layers": np.round(river_layers(river), 4).tolist(),
            "passing": np.round(river.passing, 4).tolist(),
        },
    }


def _base64(values: Shaped[np.ndarray, "..."]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _width(units: int) -> int:
    return 3 if units <= LONG else 4


def _strongest(edges: StrongEdges, reading: Reading) -> UInt8[np.ndarray, "unit edge byte"]:
    """Distance and share of the strongest edges of each unit; 0 where there are fewer."""
    count = len(reading.units)
    unit, other, flows = _between_units(edges, reading.unit_numbers, count)
    # By flow, and of equal ones the nearer: the page must not depend on how ties were broken.
    order = np.lexsort((np.abs(unit - other), -flows, unit))
    unit, other, flows = unit[order], other[order], flows[order]
    place = np.arange(len(unit)) - np.searchsorted(unit, unit)
    shares = np.rint(1000 * flows / np.where(reading.throughput > 0, reading.throughput, 1)[unit])
    shown = (place < edges_per_unit(count)) & (shares > 0)
    packed = np.zeros((count, edges_per_unit(count)), dtype="<u4")
    distance = np.abs(unit - other)[shown]
    packed[unit[shown], place[shown]] = (distance << SHARE_BITS) | shares[shown].astype(np.int64)
    return packed.view(np.uint8).reshape(*packed.shape, 4)[..., : _width(count)]


def _between_units(
    edges: StrongEdges, unit_of: Int[np.ndarray, " token"], count: int
) -> tuple[Int[np.ndarray, " edge"], Int[np.ndarray, " edge"], Float[np.ndarray, " edge"]]:
    """The edges of all tokens as those of units, each once, without those inside a unit."""
    ends = np.repeat(unit_of, edges.token.shape[1]), unit_of[edges.token.ravel()]
    apart = (ends[0] != ends[1]) & (edges.flow.ravel() > 0)
    pair, place = np.unique(ends[0][apart] * count + ends[1][apart], return_inverse=True)
    flows = np.bincount(place, weights=edges.flow.ravel()[apart], minlength=len(pair))
    return (*np.divmod(pair, count), flows)


def _nonzero(values: Float[np.ndarray, " unit"]) -> dict[str, float]:
    return {str(index): _round(float(values[index])) for index in np.flatnonzero(values).tolist()}


def _round(value: float) -> float:
    return float(f"{value:.4g}")
