"""Plots whose files are the same, byte for byte, whenever their data are the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

FOLDER = Path(__file__).parent / "plots"
STYLE = {
    "svg.hashsalt": "flowtracer",  # names of clip paths are random without it
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.88",
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "legend.frameon": False,
    "lines.markersize": 4,
}


def linear_panels(count: int) -> tuple[Figure, list[Axes]]:
    """Axes side by side, on white, since GitHub also shows pages on dark."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * count, 3.2), layout="constrained", facecolor="white")
        return figure, [figure.add_subplot(1, count, place + 1) for place in range(count)]


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """Logarithmic axes side by side."""
    figure, axes = linear_panels(count)
    with mpl.rc_context(STYLE):
        for axis in axes:
            axis.set(xscale="log", yscale="log")
    return figure, axes


def tick(axis: Axes, sizes: Sequence[float]) -> None:
    """Label the measured sizes, and round values over at least a decade."""
    with mpl.rc_context(STYLE):
        axis.set_xticks(sizes, labels=[f"{size:g}" for size in sizes])
        low, high = axis.get_ylim()
        middle = (low * high) ** 0.5
        axis.set_ylim(min(low, middle / 10**0.5), max(high, middle * 10**0.5))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        for one in (axis.xaxis, axis.yaxis):
            one.set_minor_locator(NullLocator())


def write(figure: Figure, name: str, folder: Path | None = None) -> Path:
    """Write the figure as `name`.svg, without the date and version, which would change it."""
    path = (folder or FOLDER) / f"{name}.svg"
    path.parent.mkdir(exist_ok=True)
    with mpl.rc_context(STYLE):
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    return path
