"""The ribbon of a figure: throughput along the text."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from scipy.optimize import isotonic_regression

from flowtracer_plugin.report.display import ShownTrace, Unit, standouts
from flowtracer_plugin.report.drawing import Bars, cut_into_bars
from flowtracer_plugin.report.figures.panels import (
    FILLS,
    INK,
    LEFT,
    LETTERS,
    MUTED,
    RIGHT,
    SMALL,
    Panel,
    fit,
    key,
    show_scale,
    text_width,
    write,
)
from flowtracer_plugin.text.visible import visible

_HEIGHT, _HEADROOM, _APART = 0.95, 1.25, 0.03
_TICKS = np.array([100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01]) / 100


def ribbon_panels(shown: ShownTrace, width: float) -> list[Panel]:
    """The bars along the text, and a key to the numbers of the hubs."""
    count = 5 if width < 5 else 10
    hubs = [unit for unit, _ in standouts(shown, "hubs", count)]

    def draw(axes: Axes) -> None:
        bars = cut_into_bars(shown)
        edges = np.append(shown.starts[bars.first], len(shown.trace.tokens))
        _draw_bars(axes, bars, edges)
        along_the_text(axes, shown, width, 1 / _HEADROOM)
        _draw_scale(axes, bars.highest, width)
        _number(axes, shown, hubs, bars, width)

    panels = [Panel(height=_HEIGHT, draw=draw, above=0.17, below=0.27)]
    if hubs:
        entries = [
            (str(place), FILLS["response"], f"“{hub.inline.strip()}”")
            for place, hub in enumerate(hubs, 1)
        ]
        panels.append(key(entries, width, count))
    return panels


def along_the_text(axes: Axes, shown: ShownTrace, width: float, top: float = 1.0) -> None:
    """Draw an axis of tokens in a figure `width` inches wide, and name prompt and response above.

    The line between prompt and response rises to `top`, a share of the height of the axes.
    """
    length, border = len(shown.trace.tokens), shown.trace.spans.prompt_length
    axes.set_xlim(0, length)
    inches = (width - LEFT - RIGHT) / length
    ticks = map(int, MaxNLocator(6, integer=True).tick_values(0, length))
    axes.set_xticks(
        [at for at in ticks if text_width(str(at)) / 2 <= (length - at) * inches + RIGHT]
    )
    axes.set_xlabel("token", labelpad=1)
    axes.axvline(border, ymax=top, color=MUTED, linewidth=0.6, linestyle=(0, (1, 2)))
    if text_width("prompt") < border * inches:
        _name(axes, "prompt", 0, "left")
    fitting = text_width("response") < (length - border) * inches
    _name(axes, "response", *((border, "left") if fitting else (length, "right")))


def _name(axes: Axes, name: str, token: int, ha: Literal["left", "right"]) -> None:
    axes.annotate(
        name,
        (token, 1),
        xycoords=("data", "axes fraction"),
        xytext=(1, 3),
        textcoords="offset points",
        ha=ha,
        fontsize=SMALL,
        color=MUTED,
    )


def _draw_bars(axes: Axes, bars: Bars, edges: Int[np.ndarray, " edge"]) -> None:
    heights = np.sqrt(np.minimum(bars.peak, bars.highest))
    for name, part in bars.regions.items():
        axes.stairs(np.where(part, heights, 0), edges, fill=True, color=FILLS[name], linewidth=0)


def _draw_scale(axes: Axes, highest: float, width: float) -> None:
    """Heights are square roots, so that small values stay visible."""
    top = np.sqrt(highest)
    axes.set_ylim(0, _HEADROOM * top)
    ticks = [0.0]
    for share in _TICKS[highest >= _TICKS].tolist():
        # From the highest down, each tick that has room above 0 and below the previous tick.
        room = np.sqrt(ticks[-1]) if len(ticks) > 1 else np.inf
        if 0.2 * top <= np.sqrt(share) <= room - 0.2 * top:
            ticks.append(share)
    show_scale(axes, "throughput", width, np.sqrt(ticks).tolist(), ticks)
    axes.spines["left"].set_bounds(0, top)


def _number(axes: Axes, shown: ShownTrace, hubs: list[Unit], bars: Bars, width: float) -> None:
    """Number the hubs, and write the answer, in a row above the bars."""
    labels = [(hub, str(place), LETTERS["response"]) for place, hub in enumerate(hubs, start=1)]
    answer = next((unit for unit in shown.units if unit.region == "answer"), None)
    if answer:
        said = visible(" ".join(shown.trace.spans.answer_text.split()))
        labels.append((answer, fit(said, 1.0), INK))
    labels.sort(key=lambda label: label[0].index)
    length, top = len(shown.trace.tokens), float(np.sqrt(bars.highest))
    middles = np.array([(unit.first + unit.last + 1) / 2 for unit, _, _ in labels])
    widths = np.array([text_width(text, "bold") + _APART for _, text, _ in labels])
    places = spread(middles, widths * length / (width - LEFT - RIGHT), length)
    for (unit, text, colour), middle, place in zip(labels, middles, places, strict=True):
        height = np.sqrt(min(unit.throughput, bars.highest))
        line = [middle, middle, place], [height, 1.02 * top, 1.1 * top]
        axes.plot(*line, color=colour, linewidth=0.4, solid_joinstyle="round")
        write(axes, place, 1.12 * top, text, ha="center", va="bottom", color=colour, weight="bold")


def spread(
    middles: Float[np.ndarray, " label"], widths: Float[np.ndarray, " label"], length: int
) -> Float[np.ndarray, " label"]:
    """Places for labels side by side, in order, as near to `middles` as possible.

    The labels stay between 0 and `length` if there is room for all of them.
    """
    # Without their widths, the labels only have to keep their order: an isotonic regression.
    before = np.concatenate([[0], np.cumsum((widths[1:] + widths[:-1]) / 2)])
    ordered = isotonic_regression(middles - before).x
    return np.clip(ordered, widths[0] / 2, length - widths[-1] / 2 - before[-1]) + before
