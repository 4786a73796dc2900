"""Pages of rows that are traced already: later ones, or those that tell right from wrong best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from flowtracer_plugin.bulk.examples import IDS
from flowtracer_plugin.bulk.groups import CORRECT, group_rollouts
from flowtracer_plugin.bulk.rows import read_row
from flowtracer_plugin.bulk.shards import PAGES, TRACES, MakeTracer, Work, write_page
from flowtracer_plugin.bulk.tables import ANSWERS, Results
from flowtracer_plugin.bulk.tracing import trace_rows
from flowtracer_plugin.trace.flow_trace import load
from flowtracer_plugin.trace.tracer import FlowTracer


def different_rows(results: Results, count: int) -> tuple[int, ...]:
    """The rows of the most different right and wrong rollouts, in pairs: right, wrong, and so on.

    More rows begin with the same ones. There are none without both right and wrong rollouts.
    """
    known: set[bool | None] = set()
    for batch in results.batches(ANSWERS, [CORRECT]):
        known.update(batch[CORRECT].unique().to_pylist())
    if not {True, False} <= known:
        return ()
    found = group_rollouts(results)
    pairs = found.most_different(count - count // 2).pairs
    return tuple(int(found.rows[one]) for pair in pairs for one in pair)[:count]


def first_rows(results: Results, count: int) -> tuple[int, ...]:
    """The traced rows among the first so many of the data, as far as their shards are finished."""
    found = results.read(ANSWERS, ["row", "response_tokens"])
    traced = found["row"].filter(found["response_tokens"].is_valid())
    return tuple(row for row in traced.to_numpy().tolist() if row < count)


def write_pages(
    make: MakeTracer, work: Work, results: Results, rows: Any, chosen: Sequence[int]
) -> None:
    """Write the pages of these rows that are not there yet.

    A trace is taken from `traces/`, if it was saved; else the row is traced again, alone, so that
    its page is the same whenever it is written.

    Raises:
        ValueError: The tracer is not the one of the tables.
        OSError: A page cannot be written. Those before it are kept.
    """
    left = [row for row in chosen if not work.file(PAGES, row, ".html").exists()]
    tracer: FlowTracer | None = None
    options = replace(work.options, columns=replace(work.options.columns, ids=True))
    for row in left:
        saved = work.file(TRACES, row, ".flow")
        if saved.exists():
            write_page(work, row, load(saved), _scores(results, row, work.options.scores))
            continue
        if tracer is None:
            tracer = make()
            work.claim(tracer)
        (result,) = trace_rows(tracer, [(row, _as_traced(results, rows, row))], options)
        if result.trace is not None:
            write_page(work, row, result.trace, result.scores)


def _as_traced(results: Results, rows: Any, row: int) -> Any:
    """A row of the data with the token ids that were traced, as an answer may come out anew."""
    given = read_row(rows, row)
    if isinstance(given, ValueError):
        return given
    tokens = results.tokens_of(row, ["id", "part"]).to_pylist()
    asked = [one["id"] for one in tokens if one["part"] in ("prompt", "question")]
    said = [one["id"] for one in tokens if one["part"] not in ("prompt", "question")]
    return {**given, IDS[0]: asked, IDS[1]: said}


def _scores(results: Results, row: int, names: Sequence[str]) -> dict[str, Any]:
    """The scores of a row's tokens; none that failed."""
    columns = {name: f"score_{name}" for name in names}
    if not columns:
        return {}
    found = results.tokens_of(row, [*columns.values()])
    return {
        name: np.array(found[column].to_pylist(), float)
        for name, column in columns.items()
        if not found[column].null_count
    }
