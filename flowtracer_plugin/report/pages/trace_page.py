"""The page of one trace, and its smaller view in a notebook cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from markupsafe import escape

from flowtracer_plugin.flow.arrays import check_readable
from flowtracer_plugin.options import preset_of
from flowtracer_plugin.report import drawing
from flowtracer_plugin.report.carried import (
    FIRST_TOKEN,
    LEAST_DROP,
    carriers,
    leading_steps,
    most_missed,
)
from flowtracer_plugin.report.display import (
    HEAT_SHARES,
    QUESTION,
    ShownTrace,
    ranges,
    shorten,
    show,
)
from flowtracer_plugin.report.head_map import head_map
from flowtracer_plugin.report.pages.assets import embed, render, write_html
from flowtracer_plugin.report.pages.trace_page_data import page_data
from flowtracer_plugin.report.pages.trace_page_marks import Marks, marks_of
from flowtracer_plugin.report.pages.trace_page_tables import step_rows, token_rows
from flowtracer_plugin.result.token_heads import TokenHeads
from flowtracer_plugin.result.trace_data import TraceData
from flowtracer_plugin.text.visible import visible

_PATHS = 5
_SCRIPTS = (
    "trace_page_data.js",
    "trace_page_text.js",
    "trace_page_search.js",
    "trace_page_ribbon.js",
    "trace_page_steps.js",
    "trace_page_river.js",
    "tables.js",
    "trace_page_start.js",
)

Scores = Mapping[str, Float[np.ndarray, " _"]]


def write_page(
    trace: TraceData,
    path: Path,
    drops: Mapping[int, float] | None = None,
    scores: Scores | None = None,
    heads: TokenHeads | None = None,
) -> Path:
    """Write the page of `render_page` to `path`, whole or not at all, and return `path`."""
    return write_html(path, render_page(trace, drops, scores, heads))


def render_page(
    trace: TraceData,
    drops: Mapping[int, float] | None = None,
    scores: Scores | None = None,
    heads: TokenHeads | None = None,
) -> str:
    """The page of `trace` as HTML; the same trace always gives the same page.

    Args:
        trace: The trace to show.
        drops: The fall of the answer's log-probability when a token is knocked out, in nats, by the
            token's number. The page shows it beside the token's throughput.
        scores: Other scores of the tokens by name. The page can shade the text by each of them.
        heads: The heads that pay the edges into one token, which the page shows as a map.

    Raises:
        TypeError: A score is an array that cannot be read, such as a masked one.
        ValueError: `drops` or `heads` name a token that the trace does not have, or a score does
            not hold one number of at least 0 for each token.
    """
    for name, values in (scores or {}).items():
        _check_scores(name, values, len(trace.tokens))
    unknown = [token for token in drops or () if not 0 <= token < len(trace.tokens)]
    if unknown:
        raise ValueError(f"wanted drops of tokens 0 to {len(trace.tokens) - 1}, found {unknown}")
    shown = show(trace)
    marked, every = marks_of(shown), marks_of(shown, skip="")
    chosen = shown.units_of(trace.chosen)
    steps, river = drawing.draw_steps(shown), drawing.draw_river(shown.river)
    listed = (unit for unit in chosen if unit.throughput)
    rows = token_rows(shown, [*marked.units, *every.units, *listed], drops)
    return render(
        "trace_page.html.j2",
        styles=("trace_page.css",),
        script=_SCRIPTS,
        **_shared(shown, marked),
        missed=most_missed(shown, drops),
        least_drop=LEAST_DROP,
        carriers=carriers(shown, drops),
        leading=leading_steps(shown),
        token_rows=rows,
        hides=any(row.plain for row in rows),
        chosen=chosen,
        step_rows=step_rows(shown),
        heads=None if heads is None else head_map(shown, heads),
        measured=bool(drops),
        scores=list(scores or ()),
        paths=[
            (shown.units_of(path.tokens), path.probability, path.tokens[0] == 0)
            for path in trace.paths(_PATHS)
        ],
        first_token=FIRST_TOKEN,
        steps=steps,
        river=river,
        data=embed(page_data(shown, steps, river, scores or {}, {"some": marked, "all": every})),
    )


def _check_scores(name: str, values: Float[np.ndarray, " _"], tokens: int) -> None:
    check_readable(f"the score {name!r}", values)
    numbers = np.asarray(values)
    if numbers.shape != (tokens,) or not bool(((numbers >= 0) & (numbers < np.inf)).all()):
        raise ValueError(
            f"the score {name!r} needs one number of at least 0 for each of the {tokens} tokens, "
            f"got an array of shape {numbers.shape} from {numbers.min(initial=0)} to "
            f"{numbers.max(initial=0)}"
        )


def render_notebook(trace: TraceData) -> str:
    """The text of the trace in HTML for a notebook cell, without scripts.

    It lies in a frame of its own, so that its styles and those of the notebook never meet.
    """
    shown = show(trace)
    hubs = replace(marks_of(shown), checkpoints=())
    page = render("notebook.html.j2", styles=("trace_page.css",), **_shared(shown, hubs))
    # Below the header, a line holds about 110 characters and is 27 pixels high. Long texts scroll.
    lines = sum(1 + len(line) // 110 for line in trace.text.splitlines())
    return (
        f'<iframe sandbox="" title="FlowTracer" srcdoc="{escape(page)}" width="100%" '
        f'height="{min(320 + 27 * lines, 640)}" style="border:0;color-scheme:normal"></iframe>'
    )


def _shared(shown: ShownTrace, marked: Marks) -> dict[str, Any]:
    """The context of both templates."""
    trace = shown.trace
    return {
        "trace": trace,
        "shown": shown,
        "drawing": drawing,
        "marks": marked.ranks,
        "answer": shorten(visible(trace.spans.answer_text.replace("\n", "⏎"))),
        "answer_tokens": ranges(trace.spans.answer.nonzero()[0].tolist()),
        "layers": ranges(sorted(trace.layers)),
        "preset": preset_of(trace.options),
        "question_count": int(trace.spans.question.sum()),
        "asked": QUESTION[trace.options.question],
        "heat_shares": HEAT_SHARES,
        "ribbon": drawing.draw_ribbon(shown, marked.hubs),
    }
