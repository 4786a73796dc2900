"""One self-contained page for one trace. It loads nothing: no font, no script, no image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import escape

from flowtracer_plugin.report import drawing
from flowtracer_plugin.report.assets import render
from flowtracer_plugin.report.display import (
    HEAT_SHARES,
    Reading,
    Unit,
    ranges,
    read,
    shorten,
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
    hubs = standouts(reading, trace.backbone.hubs, _MARKS)
    checkpoints = standouts(reading, trace.backbone.checkpoints, _MARKS)
    return render(
        "page.html.j2",
        styles="page.css",
        script="page.js",
        **_shared(reading),
        hubs=hubs,
        checkpoints=checkpoints,
        marks=_marks(hubs, checkpoints),
        paths=[(reading.units_of(path.tokens), path.probability) for path in trace.paths(_PATHS)],
        ribbon=drawing.draw_ribbon(reading, tuple(unit for unit, _ in hubs)),
        steps=drawing.draw_steps(reading),
        drawing=drawing,
        data=embed(page_data(reading)),
    )


def render_notebook(trace: FlowTrace) -> str:
    """The heart of the page for a notebook cell: no script, and nothing that can clash with others.

    It lies in a frame of its own, so that its styles and those of the notebook never meet.
    """
    reading = read(trace)
    hubs = standouts(reading, trace.backbone.hubs, _MARKS)
    page = render(
        "notebook.html.j2",
        styles="page.css",
        **_shared(reading),
        hubs=hubs,
        marks=_marks(hubs, ()),
    )
    # About 110 characters a line at 27 pixels, beneath a header; longer texts scroll.
    lines = sum(1 + len(line) // 110 for line in trace.text.splitlines())
    return (
        f'<iframe sandbox="" title="FlowTracer" srcdoc="{escape(page)}" width="100%" '
        f'height="{min(260 + 27 * lines, 640)}" style="border:0;color-scheme:normal"></iframe>'
    )


def _shared(reading: Reading) -> dict[str, Any]:
    trace = reading.trace
    return {
        "trace": trace,
        "reading": reading,
        "answer": shorten(visible(trace.spans.answer_text.replace("\n", "⏎"))),
        "answer_tokens": ranges(trace.spans.answer.nonzero()[0].tolist()),
        "layers": ranges(sorted(trace.layers)),
        "question_count": int(trace.spans.question.sum()),
        "heat_shares": HEAT_SHARES,
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
