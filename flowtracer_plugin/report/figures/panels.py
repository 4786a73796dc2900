"""The parts of a figure: panels on top of each other, colours, and labels that fit."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from flowtracer_plugin.report.display import shorten

INK, MUTED, LINE = "#1b1f24", "#5c646e", "#a8a59d"
FILLS = {"prompt": "#bfbbb1", "question": "#bfbbb1", "response": "#2f74b8", "answer": INK}
"""The colour of each region; they also differ in lightness, for print in grey."""

STROKES = FILLS | {"prompt": "#a39d91", "question": "#a39d91", "answer": FILLS["response"]}
LETTERS = FILLS | {"prompt": MUTED, "question": MUTED}
"""The colours of lines and of letters, which are thinner than filled areas."""

SIZE, SMALL = 7.0, 6.0
"""Sizes of letters, in points."""

LEFT, RIGHT = 0.44, 0.06
"""The margins of axes with numbers, in inches from the edges of the figure."""

POINT = 1 / 72
_GAP = 0.03
_LONGEST = 500
"""More letters than the widest figure has room for."""

LINE_HEIGHT = 1.35 * SMALL * POINT


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A part of a figure, as wide as the figure.

    Attributes:
        height: The height of its axes, in inches.
        draw: Draws it on its axes.
        above: Inches above the axes.
        below: Inches below the axes.
        left: Inches to the left of the axes.
    """

    height: float
    draw: Callable[[Axes], None]
    above: float = 0.05
    below: float = 0.05
    left: float = LEFT


def stack(panels: Sequence[Panel], width: float) -> Figure:
    """A figure of these panels, from top to bottom."""
    height = sum(panel.above + panel.height + panel.below for panel in panels)
    figure = Figure(figsize=(width, height))
    top = height
    for panel in panels:
        bottom = top - panel.above - panel.height
        across = width - panel.left - RIGHT
        box = (panel.left / width, bottom / height, across / width, panel.height / height)
        panel.draw(figure.add_axes(box))
        top = bottom - panel.below
    return figure


def key(entries: Sequence[tuple[str, str, str]], width: float, columns: int) -> Panel:
    """A panel of numbered labels in columns; an entry is a number, its colour, and a text."""
    rows = -(-len(entries) // columns)
    across = (width - 2 * RIGHT) / columns
    indent = max(text_width(number, "bold") for number, _, _ in entries) + _GAP

    def draw(axes: Axes) -> None:
        axes.set(xlim=(0, width - 2 * RIGHT), ylim=(rows, 0))
        axes.axis("off")
        for place, (number, colour, text) in enumerate(entries):
            column, row = divmod(place, rows)
            left = column * across + indent
            write(axes, left - _GAP, row + 0.5, number, ha="right", color=colour, weight="bold")
            write(axes, left, row + 0.5, fit(text, across - indent - 2 * _GAP))

    return Panel(height=rows * LINE_HEIGHT, draw=draw, left=RIGHT, above=0.02)


def show_scale(
    axes: Axes, label: str, width: float, places: Sequence[float], shares: Sequence[float]
) -> None:
    """Draw a vertical axis with `shares` in per cent; the figure is `width` inches wide."""
    axes.set_yticks(places, [f"{100 * share:g}\N{NO-BREAK SPACE}%" for share in shares])
    axes.set_ylabel(label)
    # At a fixed place, so that it does not depend on the length of the ticks' labels.
    axes.yaxis.set_label_coords((0.1 - LEFT) / (width - LEFT - RIGHT), 0.5)


def write(
    axes: Axes,
    x: float | int,
    y: float,
    text: str,
    *,
    ha: str = "left",
    va: str = "center",
    color: str = INK,
    weight: str = "normal",
    size: float = SMALL,
) -> None:
    """Write `text` unchanged: dollars and backslashes in it do not start formulas."""
    axes.text(
        x,
        y,
        text,
        ha=ha,
        va="center_baseline" if va == "center" else va,
        color=color,
        fontweight=weight,
        fontsize=size,
        parse_math=False,
    )


def text_width(text: str, weight: str = "normal") -> float:
    """The width of a label, in inches."""
    font = FontProperties(size=SMALL, weight=weight)
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]) * POINT


def fit(text: str, width: float) -> str:
    """`text`, or as much of its beginning as fits into `width` inches."""
    counts = range(2, min(len(text), _LONGEST) + 1)
    fitting = bisect_right(counts, width, key=lambda count: text_width(shorten(text, count)))
    return shorten(text, fitting + 1)
