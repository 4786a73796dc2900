"""Shards of rows: each becomes files that are written whole, here or in several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

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
from flowtracer_plugin.files import write_atomically
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
            trace.save(work.file(TRACES, result.row, ".flow"))
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
    workers: int = 1,
    tick: Callable[[], object] = lambda: None,
) -> Iterator[ShardDone]:
    """The shards that are not finished, as they get done; each is a number and its rows.

    Args:
        make: Makes the tracer; it is pickled if there are several workers.
        work: What is done with each shard.
        shards: The shards of this run.
        rows: All rows of the data.
        workers: Processes; one is this one.
        tick: Is called after each row, if there is one worker.

    Raises:
        ValueError: The folder holds results with other settings.
        RuntimeError: A worker died.
    """
    left = [shard for shard in shards if not work.file(ANSWERS, shard[0]).exists()]
    given = ((number, [(row, read_row(rows, row)) for row in part]) for number, part in left)
    if workers > 1 and left:
        yield from _in_processes(make, work, given, workers)
        return
    tracer = make()
    work.claim(tracer)
    for number, part in given:
        yield do_shard(tracer, work, number, part, tick)


def _in_processes(
    make: MakeTracer,
    work: Work,
    shards: Iterator[tuple[int, list[tuple[int, Row]]]],
    workers: int,
) -> Iterator[ShardDone]:
    threads = max(1, torch.get_num_threads() // workers)
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(make, work, threads),
    )
    try:
        # Few shards wait in the queue, so that the rows of all are not in memory at once.
        waiting: set[Future[ShardDone]] = {
            pool.submit(_do, *shard) for shard in islice(shards, workers + 1)
        }
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
            waiting |= {pool.submit(_do, *shard) for shard in islice(shards, len(done))}
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process has died, as it does when it is killed or memory runs out; finished "
            "shards are kept: run the same command again, perhaps with fewer workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


class _Worker:
    """What a worker process holds: how it makes the tracer, and the tracer once it is made."""

    make: MakeTracer
    work: Work
    tracer: FlowTracer | None = None


def _begin(make: MakeTracer, work: Work, threads: int) -> None:
    torch.set_num_threads(threads)
    _Worker.make, _Worker.work = staticmethod(make), work


def _do(number: int, rows: list[tuple[int, Row]]) -> ShardDone:
    # Made here and not in _begin, whose errors would only say that the process has died.
    if _Worker.tracer is None:
        tracer = _Worker.make()
        _Worker.work.claim(tracer)
        _Worker.tracer = tracer
    return do_shard(_Worker.tracer, _Worker.work, number, rows)
