"""The page of traces side by side: from where do right and wrong answers draw flow?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowtracer_plugin.comparison.traces import (
    MEASURES,
    RIGHT_AND_WRONG,
    ComparedTrace,
    Comparison,
    compare,
)
from flowtracer_plugin.report.display import (
    HEAT_SHARES,
    QUESTION,
    REGION_CLASSES,
    ShownTrace,
    Unit,
    ranges,
    shorten,
    show,
    standouts,
)
from flowtracer_plugin.report.drawing import RIBBON_HEIGHT, bars_path
from flowtracer_plugin.report.pages.assets import embed, render, write_html
from flowtracer_plugin.report.pages.completion import Excerpt, answer_path, bar_starts, ends_of
from flowtracer_plugin.report.pages.two_sides import Differences, Reference, show_differences
from flowtracer_plugin.result.trace_data import TraceData
from flowtracer_plugin.text.visible import visible

_HUBS = 5
_MOST_TOKENS = 4_000


def write_comparison(
    traces: Sequence[TraceData],
    path: str | Path,
    *,
    labels: Sequence[str] | None = None,
    right: Sequence[bool | None] | None = None,
) -> Path:
    """Write the page of `render_comparison` to `path`, whole or not at all, and return `path`.

    Raises:
        ValueError: As `render_comparison`.
        IsADirectoryError: `path` is a directory.
    """
    return write_html(path, render_comparison(traces, labels=labels, right=right))


def render_comparison(
    traces: Sequence[TraceData],
    *,
    labels: Sequence[str] | None = None,
    right: Sequence[bool | None] | None = None,
) -> str:
    """The page of several traces side by side as HTML; the same traces always give the same page.

    It shows the numbers of `flowtracer_plugin.comparison.compare`, which says what `labels` and
    `right` mean.

    Raises:
        ValueError: As `compare`.
    """
    comparison = compare(traces, labels=labels, right=right)
    rows = _rows(comparison, traces)
    columns = _columns(comparison, traces, rows)
    return render(
        "comparison_page.html.j2",
        styles=("two_sides.css", "comparison_page.css"),
        script=("tips.js", "two_sides.js", "tables.js", "comparison_page.js"),
        title=_title(comparison),
        comparison=comparison,
        shown=_differences(comparison, traces[0]),
        rows=rows,
        columns=columns,
        measures=dict(zip(MEASURES, comparison.measures.columns(), strict=True)),
        made=_made(traces),
        heat_shares=HEAT_SHARES,
        data=embed([_column_data(column) for column in columns]),
    )


def _title(comparison: Comparison) -> str:
    if comparison.sides is None:
        return f"{len(comparison.traces)} traces side by side"
    if comparison.names == RIGHT_AND_WRONG:
        return "Right against wrong"
    return " against ".join(shorten(visible(name)) for name in comparison.names)


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """A trace in the overview.

    Attributes:
        number: Its index among the given traces.
        trace: The trace in numbers.
        width: The width of the drawing of its response.
        bars: An SVG path of the throughput along its response.
        answer: An SVG path beneath the answer.
    """

    number: int
    trace: ComparedTrace
    width: int
    bars: str
    answer: str


def _rows(comparison: Comparison, traces: Sequence[TraceData]) -> list[Row]:
    """Right traces first, then wrong ones, then those for which this is unknown."""
    order = {True: 0, False: 1, None: 2}
    places = enumerate(comparison.traces)
    longest = max(trace.response_tokens for trace in comparison.traces)
    highest = max(map(_highest, traces)) or 1.0
    return [
        _row(number, trace, traces[number], longest, highest)
        for number, trace in sorted(places, key=lambda place: order[place[1].right])
    ]


def _highest(trace: TraceData) -> float:
    """The highest throughput in the response outside the answer."""
    return float(trace.throughput[trace.spans.response & ~trace.spans.answer].max(initial=0.0))


def _row(
    number: int, numbers: ComparedTrace, trace: TraceData, longest: int, highest: float
) -> Row:
    response = slice(numbers.prompt_tokens, None)
    first = bar_starts(numbers.response_tokens, longest)
    peaks = np.maximum.reduceat(trace.throughput[response], first)
    heights = RIBBON_HEIGHT * np.sqrt(np.minimum(peaks / highest, 1))
    return Row(
        number=number,
        trace=numbers,
        width=len(bar_starts(longest, longest)),
        bars=bars_path(np.maximum(np.rint(heights).astype(int), 2), np.ones(len(first), bool)),
        answer=answer_path(np.logical_or.reduceat(trace.spans.answer[response], first)),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Column(Excerpt[Unit]):
    """The text of one or several equal traces, from the first line on which the traces differ.

    Attributes:
        rows: The traces with this text.
        trace: The first of them.
        hubs: The number of each hub, by unit.
        fork: The first unit that not all traces share; None if there is none.
    """

    rows: tuple[Row, ...]
    trace: TraceData
    hubs: dict[int, int]
    fork: int | None


def _columns(
    comparison: Comparison, traces: Sequence[TraceData], rows: Sequence[Row]
) -> list[Column]:
    return [
        _column(
            comparison.beginning.length,
            bool(comparison.beginning.continuations),
            show(traces[row.number]),
            tuple(other for other in rows if row.number in (other.number, other.trace.same_as)),
        )
        for row in rows
        if row.trace.same_as is None
    ]


def _column(length: int, parted: bool, shown: ShownTrace, rows: tuple[Row, ...]) -> Column:
    trace = shown.trace
    start = trace.spans.prompt_length
    if parted:
        # The whole line, since half of a sum says little.
        bounds = trace.outline.bounds
        last = min(length, len(trace.tokens) - 1)
        start = next(begin for begin, end in bounds if begin <= last < end)
    units = tuple(unit for unit in shown.units if unit.last >= start)
    hubs = standouts(shown, "hubs", _HUBS)
    return Column(
        parts=ends_of(units, _MOST_TOKENS),
        stop=len(trace.tokens),
        rows=rows,
        trace=trace,
        hubs={unit.index: number for number, (unit, _) in enumerate(hubs, start=1)},
        fork=shown.unit_of(length).index if parted and length < len(trace.tokens) else None,
    )


def _column_data(column: Column) -> dict[str, Any]:
    """The data about a column's units for the page's script, in the order of the text."""
    units = column.pieces
    return {
        "name": ", ".join(row.trace.label for row in column.rows),
        "first": [unit.first for unit in units],
        "last": [unit.last for unit in units],
        "texts": column.texts(column.trace.tokens),
        "throughput": [float(f"{unit.throughput:.3g}") for unit in units],
        "ranks": [unit.rank for unit in units],
    }


def _differences(comparison: Comparison, trace: TraceData) -> Differences:
    length = comparison.beginning.length
    border = min(trace.spans.prompt_length, length)
    return show_differences(
        trace.tokens,
        {"Prompt": (0, border), "Response": (border, length)},
        [REGION_CLASSES.get(region, "") for region in trace.spans.regions],
        comparison.beginning,
        comparison.words,
        comparison.sides,
        names=comparison.names,
        references=[
            Reference(
                label=one.label,
                link=f"trace-{number if one.same_as is None else one.same_as}",
                right=one.right,
            )
            for number, one in enumerate(comparison.traces)
        ],
        most=_MOST_TOKENS,
    )


def _made(traces: Sequence[TraceData]) -> list[tuple[str, str]]:
    """The settings that the traces were made with; different values are joined by a slash."""
    found: dict[str, dict[str, None]] = {}
    for trace in traces:
        layers = trace.options.layers
        settings = {
            "model": trace.model,
            "layers": layers if isinstance(layers, str) else ranges(sorted(layers)),
            "numbers of layers": ranges(sorted(trace.layers)),
            "rows": trace.options.rows,
            "edges": f"{trace.options.edges}, times {trace.options.damping:g}",
            "question": f"{QUESTION[trace.options.question]}; weights: "
            f"{trace.options.question_weights}",
            "answer": trace.options.answer,
            "flow ends at": f"{trace.options.target}, {trace.options.boundary} boundary",
            "first token": trace.options.first_token,
        }
        for name, value in settings.items():
            found.setdefault(name, {})[value] = None
    return [(name, " / ".join(values)) for name, values in found.items()]
