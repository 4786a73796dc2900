"""The river of a figure: the flow across every cut of the text, by where it comes from."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.patches import Patch

from flowtracer_plugin.flow.river import River
from flowtracer_plugin.report.display import ShownTrace
from flowtracer_plugin.report.drawing import river_layers
from flowtracer_plugin.report.figures.panels import (
    FILLS,
    INK,
    RIGHT,
    SMALL,
    Panel,
    show_scale,
    text_width,
)
from flowtracer_plugin.report.figures.ribbon import along_the_text

_HEIGHT, _ROW, _SWATCH = 1.15, 0.11, 0.21
_WAITING, _ARRIVED = "#f1efe9", "#dedad0"
_RESPONSE = LinearSegmentedColormap.from_list("response", ["#7fb2e2", "#2f74b8", "#163f6b"])


def river_panels(shown: ShownTrace, width: float) -> list[Panel]:
    """The whole unit of flow at each cut: waiting flow at the top, arrived flow at the bottom."""
    river = shown.river
    bands = _bands(river)
    columns = _columns([name for name, _ in bands], width - 2 * RIGHT)
    rows = -(-len(bands) // columns)

    def draw(axes: Axes) -> None:
        axes.stackplot(
            river.cuts,
            river_layers(river).T[::-1],
            colors=[colour for _, colour in bands][::-1],
            linewidth=0.3,
            edgecolor="white",
        )
        along_the_text(axes, shown, width)
        axes.set_ylim(0, 1)
        shares = [0.0, 0.5, 1.0]
        show_scale(axes, "flow", width, shares, shares)
        _legend(axes, bands, columns)

    return [Panel(height=_HEIGHT, draw=draw, above=0.17, below=0.27 + _ROW * rows)]


def _bands(river: River) -> list[tuple[str, str]]:
    """The names and colours of all areas in reading order; later parts are darker, in grey too."""
    response = [name for name in river.bands if name != "prompt"]
    shades = _RESPONSE(np.linspace(0, 1, len(response)))
    colours = {"prompt": FILLS["prompt"]} | dict(zip(response, map(to_hex, shades), strict=True))
    from_parts = [(f"from {name}", colours[name]) for name in river.bands]
    return [("not yet started", _WAITING), *from_parts, ("arrived", _ARRIVED)]


def _columns(names: list[str], width: float) -> int:
    """The columns of the legend: as many as names if one row has room, else as many as fit."""
    widths = [text_width(name) + _SWATCH for name in names]
    return len(names) if sum(widths) <= width else max(1, int(width / max(widths)))


def _legend(axes: Axes, bands: list[tuple[str, str]], columns: int) -> None:
    axes.legend(
        handles=[
            Patch(facecolor=colour, edgecolor=INK, linewidth=0.3, label=name)
            for name, colour in bands
        ],
        ncols=columns,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.25 / _HEIGHT),
        frameon=False,
        fontsize=SMALL,
        borderpad=0,
        borderaxespad=0,
        handlelength=1,
        handleheight=0.8,
        handletextpad=0.4,
        columnspacing=1,
        labelspacing=0.35,
    )
