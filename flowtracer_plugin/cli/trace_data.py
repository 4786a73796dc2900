"""`flowtracer trace-data`: a data set to tables, one row for each answer and for each token."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flowtracer_plugin.cli import parsing
from flowtracer_plugin.cli.loading import load_tokenizer, load_tracer, waiting
from flowtracer_plugin.cli.options import (
    SCORES,
    AsJson,
    MaxNewTokens,
    ModelArgument,
    ReadingOptions,
    Traceback,
    TracingOptions,
    flattened,
)
from flowtracer_plugin.cli.outputs import print_document, saying_what_is_kept
from flowtracer_plugin.cli.questions import DataOptions
from flowtracer_plugin.cli.workers import WorkerOptions, chosen_engine

if TYPE_CHECKING:
    from flowtracer_plugin.bulk.tables import Results
    from flowtracer_plugin.trace.tracer import FlowTracer

_data = partial(typer.Option, rich_help_panel="Data")
_output = partial(typer.Option, rich_help_panel="Output")
_work = partial(typer.Option, rich_help_panel="Work")


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """Which rows are traced."""

    limit: Annotated[int | None, _data(min=1, help="Read this many rows; by default all.")] = None
    response_column: Annotated[
        str | None,
        _data(
            help="Column of given responses; by default response. The model generates a response "
            "for rows without one."
        ),
    ] = None
    max_new_tokens: MaxNewTokens = 256


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """What is written."""

    output: Annotated[
        Path,
        _output(
            file_okay=False,
            callback=parsing.writable_folder,
            help="Folder of the tables and pages; rerun to continue.",
        ),
    ]
    scores: Annotated[str | None, SCORES] = None
    save_traces: Annotated[
        bool,
        _output("--save-traces", help="Save each trace in OUTPUT/traces, for flowtracer report."),
    ] = False
    pages: Annotated[int, _output(min=0, help="Write the pages of so many rows.")] = 0
    pages_of: Annotated[
        Literal["first", "different"],
        _output(help="Pages of the first rows, or of the most different right and wrong rollouts."),
    ] = "first"
    json: AsJson = False

    @property
    def score_names(self) -> tuple[str, ...]:
        """The names in `scores`."""
        return tuple(name for name in parsing.names(self.scores or "") if name)


@dataclass(frozen=True, kw_only=True)
class WorkOptions(WorkerOptions):
    """How the work is divided."""

    shard: Annotated[
        Any,
        _work(
            parser=parsing.part,
            metavar="K/N",
            help="Trace the K-th of N parts; parts may share a folder.",
        ),
    ] = "1/1"
    shard_size: Annotated[
        int | None,
        _work(
            min=1,
            help="Rows that are written together; by default a twentieth of all, from 8 to 100.",
        ),
    ] = None
    batch_size: Annotated[
        int, _work(min=1, help="Texts in one forward pass, if they fit in the free memory.")
    ] = 8


@flattened
def trace_data(
    model: ModelArgument,
    data: DataOptions,
    folder: FolderOptions,
    loading: ReadingOptions,
    rollouts: RolloutOptions,
    tracing: TracingOptions,
    work: WorkOptions,
    traceback: Traceback = False,
) -> None:
    """Trace a data set into tables: a row for each answer, and a row for each token.

    A run that was broken off goes on where it stopped. 'flowtracer docs data_sets' describes the
    tables.

    For example:

    flowtracer trace-data Qwen/Qwen3-0.6B rollouts.jsonl --output traced --pages 50
    """
    with waiting("importing PyTorch and transformers"):
        from flowtracer_plugin.bulk.data_set import trace_dataset
        from flowtracer_plugin.bulk.examples import Columns
        from flowtracer_plugin.credit.token_scores import token_score

    with parsing.wrong_usage("--scores"):
        for name in folder.score_names:
            token_score(name)
    chosen_engine(work)
    tokenizer = load_tokenizer(model, loading)
    columns = Columns(
        prompt=data.prompt_column,
        response=rollouts.response_column,
        answer=data.answer_column,
        template=data.prompt_template,
        system=data.system_prompt,
        chat=data.chat and tokenizer.chat_template is not None,
        template_kwargs=data.template_kwargs,
    )
    shown = sys.stderr.isatty()
    with saying_what_is_kept(folder.output, partial(_kept, folder.output)):
        results = trace_dataset(
            partial(_make, model, loading, tracing),
            data.data,
            folder.output,
            columns=columns,
            split=data.split,
            dataset_config=data.dataset_config,
            limit=rollouts.limit,
            scores=folder.score_names,
            max_new_tokens=rollouts.max_new_tokens,
            save_traces=folder.save_traces,
            pages=folder.pages,
            pages_of=folder.pages_of,
            progress=shown,
            say=None if shown else partial(typer.echo, err=True),
            **vars(work),
        )
    if folder.pages and not any((results.folder / "pages").glob("*.html")):
        typer.echo(
            "note: there are no pages yet; the most different rollouts get theirs once all parts "
            "are traced, if some answers are right and some wrong",
            err=True,
        )
    _deliver(results, as_json=folder.json)


def _make(model: str, loading: ReadingOptions, tracing: TracingOptions) -> FlowTracer:
    """The tracer, in this process or in a worker."""
    return load_tracer(model, loading, None, **asdict(tracing))


def _kept(folder: Path) -> str:
    """How many rows are in the tables, in words."""
    from flowtracer_plugin.bulk.tables import ANSWERS, Results

    rows = sum(len(part) for part in Results(folder).batches(ANSWERS, ["row"]))
    return f"{rows} rows are"


def _deliver(results: Results, *, as_json: bool) -> None:
    """Say what is in the tables now; rows of other parts count too."""
    columns = ["row", "answer", "correct", "generated", "truncated", "error"]
    rows = results.read("answers", columns)
    traced = rows.filter(rows["answer"].is_valid())
    known = traced["correct"].drop_null()
    right = known.to_numpy().sum().item()
    failed = rows.filter(rows["error"].is_valid())
    written, broken = (
        rows[name].drop_null().to_numpy().sum().item() for name in ("generated", "truncated")
    )
    typer.echo(f"wrote answers, tokens and index.html in {results.folder}", err=True)
    if as_json:
        counts = {"rows": len(rows), "traced": len(traced), "errors": len(failed)}
        counts |= {"known": len(known), "right": right, "generated": written, "truncated": broken}
        print_document({"output": str(results.folder), **counts})
    else:
        judged = f"; {right} of {len(known)} answers are right" if len(known) else ""
        typer.echo(f"{len(traced)} of {len(rows)} rows are traced{judged}")
        if written:
            none = "the data give none" if written == len(rows) else "their rows give none"
            typer.echo(f"{written} responses are the model's own, as {none} (--response-column)")
        if broken:
            typer.echo(f"{broken} responses break off at --max-new-tokens")
        for row in failed.slice(0, 1).to_pylist():
            typer.echo(f"{len(failed)} have an error; the first, row {row['row']}: {row['error']}")
    if not len(traced):
        raise typer.Exit(1)
