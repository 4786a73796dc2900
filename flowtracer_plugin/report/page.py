"""One self-contained page for one trace. It loads nothing: no font, no script, no image."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from flowtracer_plugin.backbone import checkpoint_scores, hub_scores
from flowtracer_plugin.report import drawing
from flowtracer_plugin.report.display import (
    HEAT_SHARES,
    Reading,
    Unit,
    percent,
    ranges,
    read,
    standouts,
    visible,
)
from flowtracer_plugin.report.payload import embed, page_data
from flowtracer_plugin.storage import write_atomically
from flowtracer_plugin.trace import FlowTrace

_MARKS = 10
_PATHS = 5


def write_page(trace: FlowTrace, path: Path) -> Path:
    """Write the page of `trace` to `path`, whole or not at all, and return `path`."""
    write_atomically(path, render_page(trace).encode())
    return path


def render_page(trace: FlowTrace) -> str:
    """The page of `trace` as HTML; the same trace always gives the same page."""
    reading = read(trace)
    hubs = standouts(reading, hub_scores(trace.flow), _MARKS)
    checkpoints = standouts(reading, checkpoint_scores(trace.flow), _MARKS)
    return (
        _templates()
        .get_template("page.html.j2")
        .render(
            **_shared(reading),
            hubs=hubs,
            checkpoints=checkpoints,
            marks=_marks(hubs, checkpoints),
            paths=[
                (reading.units_of(path.tokens), path.probability) for path in trace.paths(_PATHS)
            ],
            ribbon=drawing.draw_ribbon(reading, tuple(unit for unit, _ in hubs)),
            steps=drawing.draw_steps(reading),
            drawing=drawing,
            data=embed(page_data(reading)),
            script=_asset("page.js"),
        )
    )


def render_notebook(trace: FlowTrace) -> str:
    """The heart of the page for a notebook cell: no script, and nothing that can clash with others.

    It lies in a frame of its own, so that its styles and those of the notebook never meet.
    """
    reading = read(trace)
    hubs = standouts(reading, hub_scores(trace.flow), _MARKS)
    page = (
        _templates()
        .get_template("notebook.html.j2")
        .render(**_shared(reading), hubs=hubs, marks=_marks(hubs, ()))
    )
    # About 110 characters a line at 27 pixels, beneath a header; longer texts scroll.
    lines = sum(1 + len(line) // 110 for line in trace.text.splitlines())
    return (
        f'<iframe sandbox="" title="FlowTracer" srcdoc="{escape(page)}" width="100%" '
        f'height="{min(260 + 27 * lines, 640)}" style="border:0;color-scheme:normal"></iframe>'
    )


def _shared(reading: Reading) -> dict[str, Any]:
    trace = reading.trace
    styles = _asset("page.css")
    return {
        "trace": trace,
        "reading": reading,
        "answer": _shorten(visible(trace.spans.answer_text.replace("\n", "⏎"))),
        "answer_tokens": ranges(trace.spans.answer.nonzero()[0].tolist()),
        "layers": ranges(sorted(trace.layers)),
        "question_count": int(trace.spans.question.sum()),
        "heat_shares": HEAT_SHARES,
        "styles": styles,
        "digest": _digest,
    }


def _marks(
    hubs: tuple[tuple[Unit, float], ...], checkpoints: tuple[tuple[Unit, float], ...]
) -> dict[int, dict[str, int]]:
    """Number of each hub and checkpoint, by unit."""
    marks: dict[int, dict[str, int]] = {}
    for name, ranked in (("hub", hubs), ("checkpoint", checkpoints)):
        for number, (unit, _) in enumerate(ranked, start=1):
            marks.setdefault(unit.index, {})[name] = number
    return marks


def _shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("flowtracer_plugin", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "visible": visible}
    return environment


@cache
def _asset(name: str) -> Markup:
    return Markup(files("flowtracer_plugin.report").joinpath(name).read_text("utf-8"))


def _digest(content: str) -> str:
    """What a Content-Security-Policy calls this script or style: nothing else may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
