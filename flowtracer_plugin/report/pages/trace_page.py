"""One self-contained page for one trace. It loads nothing: no font, no script, no image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from markupsafe import escape

from flowtracer_plugin.files import write_atomically
from flowtracer_plugin.report import drawing
from flowtracer_plugin.report.display import (
    HEAT_SHARES,
    Reading,
    Unit,
    ranges,
    read,
    shorten,
    standouts,
)
from flowtracer_plugin.report.pages.assets import render
from flowtracer_plugin.report.pages.payload import embed, page_data
from flowtracer_plugin.report.pages.token_tables import step_rows, token_rows
from flowtracer_plugin.result.trace_data import TraceData
from flowtracer_plugin.text.visible import visible

_MARKS, _LEAST_MARKS, _TOKENS_A_MARK = 10, 3, 6
"""Hubs, and as many checkpoints, that are marked; fewer in a short text, which they would cover."""

_PATHS = 5
_SCRIPTS = (
    "page_data.js",
    "page_text.js",
    "page_search.js",
    "page_ribbon.js",
    "page_steps.js",
    "page_river.js",
    "page_table.js",
    "page_start.js",
)


Scores = Mapping[str, Float[np.ndarray, " _"]]


def write_page(
    trace: TraceData,
    path: Path,
    drops: Mapping[int, float] | None = None,
    scores: Scores | None = None,
) -> Path:
    """Write the page of `trace` to `path`, whole or not at all, and return `path`."""
    write_atomically(path, render_page(trace, drops, scores).encode())
    return path


def render_page(
    trace: TraceData,
    drops: Mapping[int, float] | None = None,
    scores: Scores | None = None,
) -> str:
    """The page of `trace` as HTML; the same trace always gives the same page.

    Args:
        trace: What to show.
        drops: By how many nats the answer's log-probability fell when a token was knocked out, by
            the token's number: stands beside its throughput.
        scores: Other scores of the tokens by name, by which the text can be shaded too.

    Raises:
        ValueError: `drops` names a token that the trace does not have, or a score has not one
            number for each token, none of them negative.
    """
    for name, values in (scores or {}).items():
        _check_scores(name, values, len(trace.tokens))
    unknown = [token for token in drops or () if not 0 <= token < len(trace.tokens)]
    if unknown:
        raise ValueError(f"wanted drops of tokens 0 to {len(trace.tokens) - 1}, found {unknown}")
    reading, graph, river = read(trace), trace.steps(), trace.river()
    hubs, checkpoints = (_marked(reading, name) for name in ("hubs", "checkpoints"))
    steps = drawing.draw_steps(reading, graph)
    return render(
        "page.html.j2",
        styles="page.css",
        script=_SCRIPTS,
        **_shared(reading, hubs),
        marks=_marks(hubs, checkpoints),
        token_rows=token_rows(reading, [*hubs, *checkpoints], drops),
        step_rows=step_rows(reading, graph),
        measured=bool(drops),
        scores=list(scores or ()),
        paths=[(reading.units_of(path.tokens), path.probability) for path in trace.paths(_PATHS)],
        steps=steps,
        river=drawing.draw_river(river, checkpoints),
        drawing=drawing,
        data=embed(page_data(reading, steps, river, scores or {})),
    )


def _check_scores(name: str, values: Float[np.ndarray, " _"], tokens: int) -> None:
    numbers = np.asarray(values)
    if numbers.shape != (tokens,) or not bool(((numbers >= 0) & (numbers < np.inf)).all()):
        raise ValueError(
            f"the score {name!r} needs one number of at least 0 for each of the {tokens} tokens, "
            f"got an array of shape {numbers.shape} from {numbers.min(initial=0)} to "
            f"{numbers.max(initial=0)}"
        )


def render_notebook(trace: TraceData) -> str:
    """The heart of the page for a notebook cell: no script, and nothing that can clash with others.

    It lies in a frame of its own, so that its styles and those of the notebook never meet.
    """
    reading = read(trace)
    hubs = _marked(reading, "hubs")
    page = render(
        "notebook.html.j2",
        styles="page.css",
        **_shared(reading, hubs),
        drawing=drawing,
        marks=_marks(hubs, ()),
    )
    # About 110 characters a line at 27 pixels, beneath a header; longer texts scroll.
    lines = sum(1 + len(line) // 110 for line in trace.text.splitlines())
    return (
        f'<iframe sandbox="" title="FlowTracer" srcdoc="{escape(page)}" width="100%" '
        f'height="{min(320 + 27 * lines, 640)}" style="border:0;color-scheme:normal"></iframe>'
    )


def _shared(reading: Reading, hubs: tuple[Unit, ...]) -> dict[str, Any]:
    trace = reading.trace
    return {
        "trace": trace,
        "reading": reading,
        "answer": shorten(visible(trace.spans.answer_text.replace("\n", "⏎"))),
        "answer_tokens": ranges(trace.spans.answer.nonzero()[0].tolist()),
        "layers": ranges(sorted(trace.layers)),
        "question_count": int(trace.spans.question.sum()),
        "heat_shares": HEAT_SHARES,
        "ribbon": drawing.draw_ribbon(reading, hubs),
    }


def _marked(reading: Reading, name: str) -> tuple[Unit, ...]:
    scores = getattr(reading.trace.backbone, name)
    count = min(_MARKS, max(_LEAST_MARKS, len(reading.response) // _TOKENS_A_MARK))
    return tuple(unit for unit, _ in standouts(reading, scores, count))


def _marks(hubs: tuple[Unit, ...], checkpoints: tuple[Unit, ...]) -> dict[int, dict[str, int]]:
    """Number of each hub and checkpoint, by unit."""
    marks: dict[int, dict[str, int]] = {}
    for name, ranked in (("hub", hubs), ("checkpoint", checkpoints)):
        for number, unit in enumerate(ranked, start=1):
            marks.setdefault(unit.index, {})[name] = number
    return marks
