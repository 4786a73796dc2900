"""The flow across cuts of the text, which is one unit at every cut."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from flowtracer_plugin.flow.backbone import Backbone, bin_starts

RESPONSE_BANDS = 5


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class River:
    """The flow across each cut between two tokens, by the part of the text it comes from.

    At every cut, `waiting + flow.sum(1) + arrived` is 1 to within rounding: flow is conserved.

    Attributes:
        cuts: The token that follows each cut, ascending, from 0 to the number of tokens.
        bands: Names of the parts of the text that flow comes from, in reading order.
        band_starts: The first token of each part.
        flow: Flow on edges across each cut, by the part in which the edge begins.
        waiting: Flow that is injected after the cut.
        arrived: Flow that enters the answer's sink before the cut.
        passing: Flow from before one cut to after the next that touches no token in between. Where
            it is small, nearly all flow goes through few tokens.
    """

    cuts: Int[np.ndarray, " cut"]
    bands: tuple[str, ...]
    band_starts: tuple[int, ...]
    flow: Float[np.ndarray, "cut band"]
    waiting: Float[np.ndarray, " cut"]
    arrived: Float[np.ndarray, " cut"]
    passing: Float[np.ndarray, " stretch"]


def river(backbone: Backbone, prompt_length: int) -> River:
    """The river of a flow, cut at the bins of its backbone."""
    length = len(backbone.source)
    starts = bin_starts(length, prompt_length)
    count = len(starts)
    # crossing[cut, bin]: the flow from a bin before the cut to all bins after it.
    below = np.cumsum(backbone.bins[::-1].astype(np.float64), axis=0)[::-1]
    crossing = np.tril(np.concatenate([below, np.zeros((1, count))]), -1)
    passing = np.tril(crossing[1:], -1).sum(1)
    bands, band_starts = _bands(starts, prompt_length, length)
    return River(
        cuts=np.append(starts, length),
        bands=bands,
        band_starts=tuple(starts[band_starts].tolist()),
        flow=np.add.reduceat(crossing, band_starts, axis=1),
        waiting=1 - _before(backbone.source, starts),
        arrived=_before(backbone.sink, starts),
        passing=passing,
    )


def _before(
    values: Float[np.ndarray, " token"], starts: Int[np.ndarray, " bin"]
) -> Float[np.ndarray, " cut"]:
    """The sum before each cut; the last cut is the end of the text."""
    return np.append(0, np.cumsum(np.add.reduceat(values.astype(np.float64), starts)))


def _bands(
    starts: Int[np.ndarray, " bin"], prompt_length: int, length: int
) -> tuple[tuple[str, ...], list[int]]:
    """The names and first bins of the prompt and of equal parts of the response."""
    names, firsts = (["prompt"], [0]) if prompt_length else ([], [])
    for part in range(RESPONSE_BANDS):
        begin = prompt_length + part * (length - prompt_length) // RESPONSE_BANDS
        first = int(np.searchsorted(starts, begin))
        if first < len(starts) and (not firsts or first > firsts[-1]):
            names.append(f"response {part + 1}/{RESPONSE_BANDS}")
            firsts.append(first)
    return tuple(names), firsts
