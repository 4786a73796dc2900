"""`trace_dataset`: a data set to tables, shard by shard."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flowtracer_plugin.bulk.chosen_pages import different_rows, first_rows, write_pages
from flowtracer_plugin.bulk.engines import Engine
from flowtracer_plugin.bulk.examples import Columns
from flowtracer_plugin.bulk.fingerprint import FORMAT, VERSION, check_claim
from flowtracer_plugin.bulk.index import FreshIndex, write_data_index
from flowtracer_plugin.bulk.rows import Survey, open_rows, survey
from flowtracer_plugin.bulk.shards import PAGES, TRACES, MakeTracer, ShardDone, Work, run_shards
from flowtracer_plugin.bulk.tables import ANSWERS, TOKENS, Results, read_results
from flowtracer_plugin.bulk.tracing import BATCH, RowOptions
from flowtracer_plugin.credit.own_scorers import Measure, scorer_name
from flowtracer_plugin.credit.token_scores import own_codes, token_score
from flowtracer_plugin.files import remove_parts
from flowtracer_plugin.trace.tracer import FlowTracer

logger = logging.getLogger(__name__)

PAGES_OF = ("first", "different")
"""Which rows can get pages."""


def trace_dataset(
    tracer: FlowTracer | MakeTracer,
    rows: Any,
    output: str | Path,
    *,
    columns: Columns | None = None,
    split: str = "train",
    dataset_config: str | None = None,
    limit: int | None = None,
    shard: tuple[int, int] = (1, 1),
    shard_size: int | None = None,
    scores: Sequence[str | Measure] = (),
    max_new_tokens: int = 256,
    batch_size: int = BATCH,
    save_traces: bool = False,
    pages: int = 0,
    pages_of: str = "first",
    engine: str = "processes",
    workers: int = 1,
    gpus_per_worker: float = 0.0,
    address: str | None = None,
    progress: bool = False,
    say: Callable[[str], object] | None = None,
) -> Results:
    """The tables of a data set's traces, which are written to the folder `output`.

    `answers/` has a row for each rollout, `tokens/` one for each token, both as Parquet, and
    `index.html` lists the rollouts. The same call goes on where an earlier one was broken off, and
    the tables are then equal to those of a call that was not. A bad row has an error in its row of
    `answers/`, and ends nothing.

    Args:
        tracer: Made with `wrap`; or a function that makes one, which is called after the data and
            the folder are checked.
        rows: As for `trace_many`.
        output: A new or empty folder, or one of an earlier call with the same settings.
        columns: Other names of the columns, and templates for the prompts.
        split: The split of a data set that is named.
        dataset_config: The configuration of a data set that is named, such as `"main"`.
        limit: How many rows are read; by default all.
        shard: Which part of the shards is traced, as `(3, 8)` for the third of eight. Several
            processes or machines may share the folder.
        shard_size: Rows that are written together; by default a twentieth of all, from 8 to 100.
        scores: Scores of the tokens, as columns of `tokens/`: names, or functions of your own that
            stand at the top of a module.
        max_new_tokens: The model answers rows without a response, with so many tokens at most.
        batch_size: Texts in one forward pass.
        save_traces: Whether `traces/` gets the trace of each row.
        pages: So many rows get a page in `pages/`, also if an earlier call has traced them.
        pages_of: Which rows: `"first"`, or `"different"` for the most different right and wrong
            rollouts, which are known once all shards are finished.
        engine: `"processes"`: this process, or with several workers as many processes on this
            machine. `"ray"`: actors on Ray, which continue if some of them are killed. The Ray to
            which this process is connected is used, else one is started and ended here.
        workers: How many work. All but one worker of `"processes"` take a function as `tracer`,
            which can be pickled; each worker calls it once.
        gpus_per_worker: GPUs that Ray shows to each worker, in which two share one with 0.5.
        address: A running Ray cluster, such as `"auto"` or `"10.0.0.1:6379"`.
        progress: Show a bar.
        say: Is called with a line for each shard.

    Raises:
        ValueError: There are no rows, a column is missing, a number is out of range, there is no
            such score, or the folder holds results with other settings.
        OSError: The folder cannot be written. Finished shards are kept.
        RuntimeError: A worker died; with Ray, several did in one shard. Finished shards are kept.
        ConnectionError: There is no Ray at the address.
        ModuleNotFoundError: pyarrow or Ray is missing; the extras `viz` and `ray` install them.
    """
    make = (lambda: tracer) if isinstance(tracer, FlowTracer) else tracer
    check_numbers(shard, shard_size, pages)
    who = Engine(name=engine, workers=workers, gpus_per_worker=gpus_per_worker, address=address)
    if isinstance(tracer, FlowTracer) and not who.here:
        raise ValueError(
            "workers each make a tracer of their own: pass a function that makes one, which can be "
            "pickled, or workers=1 without another engine"
        )
    held = open_rows(rows, split=split, config=dataset_config, limit=limit)
    shard_size = shard_size or default_shard_size(len(held))
    found = survey(held, columns or Columns())
    _check_pages(found, pages, pages_of)
    options = RowOptions(
        columns=found.columns,
        scores=tuple(dict.fromkeys(map(scorer_name, scores))),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    work = _work(
        Path(output),
        len(held),
        found,
        options,
        shard_size=shard_size,
        save_traces=save_traces,
        pages=pages if pages_of == "first" else 0,
    )
    check_claim(work.folder, work.settings)
    shards = [
        (number, range(start, min(start + shard_size, len(held))))
        for number, start in enumerate(range(0, len(held), shard_size))
    ]
    mine = _part(shards, shard, work)
    # Pages take a tracer again; where the rows were traced here, it is the same one.
    once = cache(make)
    _run(once if who.here else make, work, mine, held, engine=who, progress=progress, say=say)
    results = read_results(work.folder)
    finished = all(work.file(ANSWERS, number).exists() for number, _ in shards)
    if pages and (pages_of == "first" or finished):
        chosen = first_rows if pages_of == "first" else different_rows
        write_pages(once, work, results, held, chosen(results, pages))
    if finished:
        for kind in (ANSWERS, TOKENS, TRACES, PAGES, "."):
            # Other parts may still be writing.
            remove_parts(work.folder / kind, older=0.0 if shard == (1, 1) else 3600.0)
    write_data_index(results)
    return results


def default_shard_size(rows: int) -> int:
    """A twentieth of all rows, from 8 to 100.

    So little is lost where a run breaks off, and large data do not become thousands of files.
    """
    return min(100, max(8, -(-rows // 20)))


def _part(
    shards: Sequence[tuple[int, range]], part: tuple[int, int], work: Work
) -> list[tuple[int, range]]:
    """The shards of one part.

    Raises:
        ValueError: There are none, and no other part has finished one.
    """
    mine = [one for one in shards if one[0] % part[1] == part[0] - 1]
    if not mine and not any(work.file(ANSWERS, number).exists() for number, _ in shards):
        raise ValueError(
            f"part {part[0]} of {part[1]} has nothing to trace: the data have only {len(shards)} "
            "shards; ask for fewer parts, or for smaller shards (--shard-size)"
        )
    return mine


def _check_pages(found: Survey, pages: int, pages_of: str) -> None:
    """Refuse pages that cannot be written.

    Raises:
        ValueError: There is no such kind of pages, or the data have no right answers for it.
    """
    if pages_of not in PAGES_OF:
        raise ValueError(f"wanted pages_of {' or '.join(map(repr, PAGES_OF))}, got {pages_of!r}")
    if pages and pages_of == "different" and not found.answers:
        raise ValueError(
            "the most different right and wrong rollouts get pages, but no row of the data has a "
            f"right answer in the column {found.columns.answer!r}; name its column "
            "(--answer-column), or ask for pages of the first rows"
        )


def _work(
    folder: Path,
    rows: int,
    found: Survey,
    options: RowOptions,
    *,
    shard_size: int,
    save_traces: bool,
    pages: int,
) -> Work:
    """What is done with each shard; its settings tell whether a folder can be continued."""
    chosen = asdict(options)
    if not options.columns.template_kwargs:  # folders of versions without them can be continued
        del chosen["columns"]["template_kwargs"]
    return Work(
        folder=folder,
        options=options,
        kinds=dict(found.kinds),
        save_traces=save_traces,
        pages=pages,
        settings={
            "format": FORMAT,
            "version": VERSION,
            "data": found.digest,
            "rows": rows,
            "shard_size": shard_size,
            "save_traces": save_traces,
            **chosen,
            **own_codes({name: token_score(name) for name in options.scores}),
        },
    )


def check_numbers(shard: tuple[int, int], shard_size: int | None, pages: int) -> None:
    """Refuse numbers that are out of range.

    Raises:
        ValueError: One is.
    """
    if not 1 <= shard[0] <= shard[1]:
        raise ValueError(f"shard must be such as (3, 8), the third of eight, got {shard!r}")
    for name, value, least in (("shard_size", shard_size, 1), ("pages", pages, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value!r}")


def _run(
    make: MakeTracer,
    work: Work,
    shards: Sequence[tuple[int, range]],
    rows: Any,
    *,
    engine: Engine,
    progress: bool,
    say: Callable[[str], object] | None,
) -> None:
    """Trace what is left of the shards, and show how far it is."""
    total = sum(len(part) for _, part in shards)
    done = sum(len(part) for number, part in shards if work.file(ANSWERS, number).exists())
    began, fresh, left = time.monotonic(), 0, total - done
    index = FreshIndex(Results(work.folder))
    say = say or logger.info
    if done:
        say(f"{done} of {total} rows have been traced before, and are kept")
    with (
        tqdm(total=total, initial=done, desc="tracing", unit="row", disable=not progress) as bar,
        # Closed here, so that workers end before an error is shown.
        closing(run_shards(make, work, shards, rows, engine=engine, tick=bar.update)) as finished,
    ):
        for one in finished:
            fresh += one.rows
            index.shard_done()
            if not engine.here:
                bar.update(one.rows)
            say(_line(one, fresh, left, time.monotonic() - began, len(shards)))


def _line(one: ShardDone, fresh: int, left: int, seconds: float, shards: int) -> str:
    rate = fresh / max(seconds, 1e-9)
    remaining = timedelta(seconds=round((left - fresh) / rate))
    return (
        f"shard {one.number} (of {shards}): {one.rows} rows, {one.errors} with errors; "
        f"{rate:.3g} rows/s, {remaining} left"
    )
