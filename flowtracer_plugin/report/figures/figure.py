"""A trace as a figure for a paper, in PNG, SVG or PDF; the same trace gives the same bytes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from flowtracer_plugin import __version__
from flowtracer_plugin.files import write_atomically
from flowtracer_plugin.report.display import ShownTrace, show
from flowtracer_plugin.report.figures.panels import INK, LINE, SIZE, SMALL, stack
from flowtracer_plugin.report.figures.ribbon import ribbon_panels
from flowtracer_plugin.report.figures.river import river_panels
from flowtracer_plugin.report.figures.steps import steps_panels
from flowtracer_plugin.result.trace_data import TraceData
from flowtracer_plugin.text.visible import visible

KINDS = ("ribbon", "river", "steps", "overview")
_PANELS = {"ribbon": [ribbon_panels], "river": [river_panels], "steps": [steps_panels]}
_PANELS["overview"] = [ribbon_panels, river_panels, steps_panels]

ONE_COLUMN, TWO_COLUMNS = 3.3, 7.0
_NARROWEST, _WIDEST = 2.0, 20.0

# The bytes of a file must not depend on when it was written.
_METADATA: dict[str, dict[str, str | None]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}

_FONTS = (
    *("Arial", "Liberation Sans", "DejaVu Sans"),
    # for characters that the fonts above lack
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Hiragino Sans", "Microsoft YaHei"),
    *("WenQuanYi Micro Hei", "Noto Sans Arabic", "Noto Sans Devanagari", "Noto Emoji"),
)

_STYLE: dict[str, Any] = {
    "savefig.dpi": 300,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "flowtracer",
    "pdf.fonttype": 42,  # journals refuse matplotlib's usual Type 3
    "font.size": SIZE,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.labelsize": SMALL,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.pad": 1.5,
    "ytick.major.pad": 1.5,
}


def write_figure(trace: TraceData, path: Path, *, kind: str, width: float | None) -> Path:
    """Write a figure of `trace` to `path`, whole or not at all, and return `path`.

    Raises:
        ValueError: There is no such kind, the suffix is not .png, .svg or .pdf, or the width is not
            between 2 and 20 inches.
    """
    suffix = path.suffix.lower()
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if suffix not in _METADATA:
        raise ValueError(f"wanted .png, .svg or .pdf, found {path.suffix!r} in {path.name!r}")
    if width is None:
        width = TWO_COLUMNS if kind == "overview" else ONE_COLUMN
    if not _NARROWEST <= width <= _WIDEST:
        raise ValueError(f"width must be from {_NARROWEST} to {_WIDEST} inches, got {width!r}")
    content = BytesIO()
    answer = visible(trace.spans.answer_text)
    about = {"Title": f"What carried the answer “{answer}”"} | _METADATA[suffix]
    if suffix != ".png":
        about["Creator"] = f"flowtracer-plugin {__version__}"
    with _styled():
        _draw(show(trace), kind, width).savefig(content, format=suffix[1:], metadata=about)
    write_atomically(path, content.getvalue())
    return path


def _draw(shown: ShownTrace, kind: str, width: float) -> Figure:
    return stack([panel for part in _PANELS[kind] for panel in part(shown, width)], width)


@contextmanager
def _styled() -> Iterator[None]:
    """Our style on top of matplotlib's default; afterwards the user's style is restored."""
    fonts = [name for name in _FONTS if name in fontManager.get_font_names()]
    with style.context(["default", {**_STYLE, "font.family": fonts}]), warnings.catch_warnings():
        # A box stands for a character that no font has.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        yield
