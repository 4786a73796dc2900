"""Small charts of two groups: histograms, and bars side by side, with round ticks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from flowtracer_plugin.report.display import number

WIDTH, HEIGHT = 300, 100
"""The size of a chart in its own units; the browser stretches them."""

_BINS, _TICKS = 24, 4
_MANY, _TAIL = 200, 0.5
"""Of so many values, so many per cent at either end are drawn at the ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """How a measure is spread in two groups, whose areas are equal.

    Attributes:
        paths: An SVG path for each group.
        ticks: The places and the labels on the axis.
    """

    paths: tuple[str, str]
    ticks: tuple[tuple[float, str], ...]


def histogram(
    first: Float[np.ndarray, " one"], second: Float[np.ndarray, " other"], *, unit: float = 1.0
) -> Histogram:
    """The histogram of a measure in two groups; labels are multiples of `unit`."""
    both = np.concatenate([first, second]) / unit
    tail = _TAIL if len(both) >= _MANY else 0.0
    low, high = np.percentile(both, [tail, 100 - tail]).tolist()
    step = round_step((high - low) / _BINS)
    start = math.floor(low / step + 1e-9)
    bins = max(math.floor(high / step + 1e-9) - start + 1, 1)
    shares = [_shares(one / unit / step - start, bins) for one in (first, second)]
    highest = max(share.max() for share in shares)
    return Histogram(
        paths=(_outline(shares[0] / highest), _outline(shares[1] / highest)),
        ticks=_ticks(start * step, (start + bins) * step),
    )


def _shares(places: Float[np.ndarray, " value"], bins: int) -> Float[np.ndarray, " bin"]:
    within: Int[np.ndarray, " value"] = np.clip(np.floor(places + 1e-9), 0, bins - 1).astype(int)
    return np.bincount(within, minlength=bins) / len(places)


def _outline(heights: Float[np.ndarray, " bin"]) -> str:
    """The outline of bars from left to right, as an SVG path."""
    width = WIDTH / len(heights)
    steps = "".join(
        f"V{HEIGHT * (1 - height):.1f}H{(at + 1) * width:.1f}"
        for at, height in enumerate(heights.tolist())
    )
    return f"M0 {HEIGHT}{steps}V{HEIGHT}z"


def round_step(least: float) -> float:
    """The lowest of 1, 2 and 5 times a power of ten that is at least `least`; 1 for zero."""
    if not 1e-300 < least < math.inf:
        return 1.0
    power = math.floor(math.log10(least))
    return next(
        step
        for step in (factor * 10.0**power for factor in (1, 2, 5, 10, 20))
        if step >= least * (1 - 1e-9)
    )


def round_bounds(low: float, high: float) -> tuple[float, ...]:
    """Round numbers at equal distances, from at most `low` to at least `high`."""
    size = max(abs(low), abs(high))
    step = round_step((high - low) / _TICKS if high - low > 1e-9 * size else size)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return tuple(at * step for at in range(first, last + 1))


def _ticks(low: float, high: float) -> tuple[tuple[float, str], ...]:
    step = round_step((high - low) / _TICKS)
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return tuple(
        (round(WIDTH * (at * step - low) / (high - low), 1), number(at * step)) for at in numbers
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedBars:
    """Shares of two groups, side by side.

    Attributes:
        bars: The place, the width and the height of each bar, and the number of its group.
        ticks: The heights of the lines, and their labels in per cent.
    """

    bars: tuple[tuple[float, float, float, int], ...]
    ticks: tuple[tuple[float, str], ...]


def paired_bars(first: Float[np.ndarray, " bar"], second: Float[np.ndarray, " bar"]) -> PairedBars:
    """The bars of shares in two groups."""
    highest = float(max(first.max(), second.max()))
    lines = round_bounds(0.0, highest)
    slot = WIDTH / len(first)
    bars = tuple(
        (
            round((at + 0.12 + 0.38 * group) * slot, 2),
            round(0.36 * slot, 2),
            round(HEIGHT * share / lines[-1], 2),
            group,
        )
        for group, shares in enumerate((first, second))
        for at, share in enumerate(shares.tolist())
    )
    ticks = tuple(
        (round(HEIGHT * (1 - line / lines[-1]), 2), f"{number(100 * line)}\N{NO-BREAK SPACE}%")
        for line in lines
    )
    return PairedBars(bars=bars, ticks=ticks)
