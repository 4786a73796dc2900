"""Shards of rows: each becomes files that are written whole, here or by several workers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flowtracer_plugin.bulk.engines import Engine, run_tasks
from flowtracer_plugin.bulk.fingerprint import claim, fingerprint
from flowtracer_plugin.bulk.rows import Row, read_row
from flowtracer_plugin.bulk.tables import (
    ANSWERS,
    TOKENS,
    answer_record,
    answer_table,
    joined,
    parquet_bytes,
    token_schema,
    token_table,
)
from flowtracer_plugin.bulk.traced_row import TracedRow
from flowtracer_plugin.bulk.tracing import RowOptions, trace_rows
from flowtracer_plugin.files import sync, write_atomically
from flowtracer_plugin.trace.flow_trace import FlowTrace
from flowtracer_plugin.trace.tracer import FlowTracer

TRACES, PAGES = "traces", "pages"
"""The folders of the traces and of the pages."""

MakeTracer = Callable[[], FlowTracer]


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What is done with each shard.

    Attributes:
        folder: Where the files go.
        options: How rows are traced.
        kinds: The kinds of the columns that are carried through.
        save_traces: Whether the traces are saved.
        pages: The first so many rows of the data get a page.
        settings: All that is known of the fingerprint without the tracer.
    """

    folder: Path
    options: RowOptions
    kinds: dict[str, str]
    save_traces: bool
    pages: int
    settings: dict[str, Any]

    def claim(self, tracer: FlowTracer) -> None:
        """Check that the folder holds results of this tracer and these settings, or none."""
        claim(self.folder, {**self.settings, **fingerprint(tracer)})

    def file(self, kind: str, number: int, suffix: str = ".parquet") -> Path:
        """The file of a shard or of a row."""
        return self.folder / kind / f"{number:08}{suffix}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardDone:
    """A finished shard.

    Attributes:
        number: Its number.
        rows: How many rows it has.
        errors: How many of these have an error.
    """

    number: int
    rows: int
    errors: int


def do_shard(
    tracer: FlowTracer,
    work: Work,
    number: int,
    rows: Sequence[tuple[int, Row]],
    tick: Callable[[], object] = lambda: None,
) -> ShardDone:
    """Trace the rows of a shard and write its files, the answers last: with them it is finished.

    Traces and tables are on the disk by then, so that a loss of power keeps them too. Pages may be
    lost; the same call writes them again.

    `tick` is called after each row.
    """
    records, tokens = [], []
    for result in trace_rows(tracer, rows, work.options):
        _write_files(result, work)
        records.append(answer_record(result, work.kinds))
        tokens.append((result.row, token_table(result, work.options.scores)))
        tick()
    records.sort(key=lambda record: record["row"])
    tokens.sort(key=lambda one: one[0])
    joint = joined([table for _, table in tokens], token_schema(work.options.scores))
    _write(work.file(TOKENS, number), parquet_bytes(joint))
    _write(work.file(ANSWERS, number), parquet_bytes(answer_table(records, work.kinds)))
    errors = sum(record["error"] is not None for record in records)
    return ShardDone(number=number, rows=len(records), errors=errors)


def _write_files(result: TracedRow, work: Work) -> None:
    """Write the trace and the page of one row, if they are wanted."""
    trace = result.trace
    if trace is None:
        return
    try:
        if work.save_traces:
            sync(trace.save(work.file(TRACES, result.row, ".flow")))
    except OSError as error:
        raise _refused(work.folder, error) from error
    if result.row < work.pages:
        write_page(work, result.row, trace, result.scores)


def write_page(work: Work, row: int, trace: FlowTrace, scores: Mapping[str, Any]) -> None:
    """Write the page of a row.

    Raises:
        OSError: It cannot be written; the message says what to do.
    """
    # A page shades by numbers of at least 0; the table holds the others too.
    shown = {name: one for name, one in scores.items() if (one >= 0).all()}
    try:
        trace.to_html(work.file(PAGES, row, ".html"), scores=shown)
    except OSError as error:
        raise _refused(work.folder, error) from error


def _write(path: Path, content: bytes) -> None:
    try:
        write_atomically(path, content, sync=True)
    except OSError as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> OSError:
    return OSError(
        f"cannot write {str(path)!r}: {error.strerror or error}; finished shards are kept: make "
        "room, and run the same command again"
    )


def run_shards(
    make: MakeTracer,
    work: Work,
    shards: Sequence[tuple[int, range]],
    rows: Any,
    *,
    engine: Engine,
    tick: Callable[[], object] = lambda: None,
) -> Generator[ShardDone, None, None]:
    """The shards that are not finished, as they get done; each is a number and its rows.

    Args:
        make: Makes the tracer; it is pickled unless `engine.here`.
        work: What is done with each shard.
        shards: The shards of this run.
        rows: All rows of the data.
        engine: Who works.
        tick: Is called after each row if `engine.here`.

    Raises:
        ValueError: The folder holds results with other settings.
        RuntimeError: Workers died.
    """
    left = [shard for shard in shards if not work.file(ANSWERS, shard[0]).exists()]
    if not left:
        _claimed(make, work)  # refuses other weights than those of the finished shards
        return
    given = ((number, [(row, read_row(rows, row)) for row in part]) for number, part in left)
    do = partial(_do, work, tick) if engine.here else partial(_do, work, None)
    yield from run_tasks(partial(_claimed, make, work), do, given, engine=engine)


def _claimed(make: MakeTracer, work: Work) -> FlowTracer:
    """A tracer whose results may go to the folder."""
    tracer = make()
    work.claim(tracer)
    return tracer


def _do(
    work: Work,
    tick: Callable[[], object] | None,
    tracer: FlowTracer,
    shard: tuple[int, list[tuple[int, Row]]],
) -> ShardDone:
    return do_shard(tracer, work, *shard, tick or (lambda: None))
