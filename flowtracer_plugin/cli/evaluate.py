"""`flowtracer evaluate`: do answers change without each score's highest-ranked tokens?"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flowtracer_plugin.cli.loading import load_tokenizer, load_tracer, waiting
from flowtracer_plugin.cli.options import (
    SCORES,
    AnswerRule,
    Layers,
    LoadingOptions,
    MaxNewTokens,
    ModelArgument,
    Oracle,
    PageFile,
    ResultOptions,
    Traceback,
    flattened,
)
from flowtracer_plugin.cli.outputs import (
    print_document,
    print_results,
    saying_what_is_kept,
    write_file,
)
from flowtracer_plugin.cli.parsing import check_separate, names, part, writable, wrong_usage
from flowtracer_plugin.cli.questions import DataOptions, load_prompts
from flowtracer_plugin.cli.workers import WorkerOptions, chosen_engine
from flowtracer_plugin.files import check_records

if TYPE_CHECKING:
    from flowtracer_plugin.bulk.engines import Pool
    from flowtracer_plugin.bulk.examples import Example
    from flowtracer_plugin.evaluation.outcomes import Evaluation, Outcome
    from flowtracer_plugin.evaluation.protocols import EvaluationSettings
    from flowtracer_plugin.evaluation.ranked_tokens import KnockOutOptions
    from flowtracer_plugin.trace.tracer import FlowTracer

_answers = partial(typer.Option, rich_help_panel="Answers")
_cutting = partial(typer.Option, rich_help_panel="Knock-outs")
_data = partial(typer.Option, rich_help_panel="Data")
_work = partial(typer.Option, rich_help_panel="Work")


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """Which answers are evaluated."""

    limit: Annotated[int | None, _data(min=1, help="Read this many rows; by default all.")] = None
    response_column: Annotated[
        str | None,
        _data(
            help="Column of given responses; by default response. Where there is none, the model "
            "generates a response."
        ),
    ] = None
    max_new_tokens: MaxNewTokens = 256
    predicted_only: Annotated[
        bool,
        _answers(
            "--predicted-only/--any-answer",
            help="Leave out given responses whose answer the model itself would not have chosen.",
        ),
    ] = True
    setting: Annotated[
        Literal["given", "compute"],
        _data(
            metavar="WHICH",
            help="given: whole responses; compute: cut where the model has to compute the answer.",
        ),
    ] = "given"
    answer: AnswerRule = "auto"
    layers: Layers = None


@dataclass(frozen=True, kw_only=True)
class ProtocolOptions:
    """What is cut, and how often."""

    protocols: Annotated[
        str, _cutting(help="Protocols: knock_out, curves, lines, edges, regeneration, or all.")
    ] = "knock_out"
    rows: Annotated[
        Literal["future", "answer"],
        _cutting(help="Hide tokens from all later ones, or from those that predict the answer."),
    ] = "future"
    percents: Annotated[
        str, _cutting(help="Percentages of the tokens to knock out; each is measured.")
    ] = "1,2,5,10,20"
    gaps: Annotated[
        str,
        _cutting(help="Numbers of tokens to spare right before the answer; each is measured."),
    ] = "0,5"
    draws: Annotated[int, _cutting(min=1, help="Random sets for each control and percentage.")] = 3
    scores: Annotated[str | None, SCORES] = None
    oracle: Oracle = None
    seed: Annotated[int, _cutting(min=0, help="Random seed of the draws and of the intervals.")] = 0
    batch_size: Annotated[
        int | None, _cutting(min=1, help="Texts per forward pass; by default as many as fit.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class WorkOptions(WorkerOptions):
    """How the work is divided."""

    shard: Annotated[
        Any,
        _work(
            parser=part,
            metavar="K/N",
            help="Evaluate every N-th example from the K-th on, into a file beside --output; a "
            "run without --shard puts the parts together.",
        ),
    ] = "1/1"


@flattened
def evaluate(
    model: ModelArgument,
    data: DataOptions,
    results: ResultOptions,
    loading: LoadingOptions,
    answers: AnswerOptions,
    chosen: ProtocolOptions,
    work: WorkOptions,
    html: PageFile = None,
    traceback: Traceback = False,
) -> None:
    """Knock out each score's highest-ranked tokens, and see whether the answers change.

    Scores are those of 'flowtracer docs credit' and recency. By default they are flow,
    flow:decision, flow:sharp, flow:derivation, reach, reach:decision, reach:sharp, attention,
    attention:decision, attention:sharp, attention_power, rollout, fai, waad, grad_x_input, entropy,
    surprisal and recency.

    For example:

    flowtracer evaluate Qwen/Qwen3-0.6B questions.jsonl --limit 50 --output results.jsonl
    """
    engine, output = chosen_engine(work), _file_of(results.output, work.shard)
    check_separate([output, html], [Path(data.data)])
    with waiting("importing PyTorch and transformers"):
        from flowtracer_plugin.bulk.engines import open_pool
        from flowtracer_plugin.evaluation.outcomes import Evaluation
        from flowtracer_plugin.evaluation.run import FORMAT, VERSION, chosen_settings

    settings = _settings(answers, chosen)
    known = chosen_settings(settings, model=model, data=data.data, oracle=chosen.oracle)
    check_records(output, FORMAT, VERSION, known)
    tokenizer = load_tokenizer(model, loading)
    every, begin = work.shard[1], work.shard[0] - 1
    examples = load_prompts(data, tokenizer, answers.limit, response_column=answers.response_column)
    examples = examples[begin::every]
    watched = engine.here and sys.stderr.isatty()
    make = partial(_evaluator, model, data.data, loading, answers, chosen, watched)
    with open_pool(make, engine) as pool:
        # One for each worker, so that all load their models at once.
        (plain, without), *_ = list(pool.run(_described, [None] * engine.workers))
        if without is not None:
            typer.echo(
                f"without flow:derivation, which this model cannot have: {without}", err=True
            )
        outcomes = _run(pool, examples, plain, output, whole=every == 1)
    asked = () if chosen.scores is None else tuple(names(chosen.scores))
    evaluation = Evaluation(settings=plain, examples=examples, outcomes=outcomes, asked=asked)
    _deliver(evaluation, html, as_json=results.json)


def _file_of(path: Path | None, shard: tuple[int, int]) -> Path | None:
    """The file of the results, or of a part of them."""
    if path is None or shard[1] == 1:
        return path
    from flowtracer_plugin.evaluation.run import part_file

    return writable(part_file(path, *shard))


@dataclass(frozen=True, kw_only=True)
class _Evaluator:
    """What a worker holds.

    Attributes:
        tracer: The tracer of its own copy of the model.
        settings: What is measured.
        plain: All that the results depend on.
        without: Why the model cannot have one of the default scores.
    """

    tracer: FlowTracer
    settings: EvaluationSettings
    plain: Mapping[str, Any]
    without: str | None


def _evaluator(
    model: str,
    data: str,
    loading: LoadingOptions,
    answers: AnswerOptions,
    chosen: ProtocolOptions,
    watched: bool,
) -> _Evaluator:
    """What this process needs to measure examples, here or in a worker.

    With `watched` there are bars for the parts of an example.
    """
    from flowtracer_plugin.evaluation.run import plain_settings

    how = {"layers": answers.layers, "answer": answers.answer, "mode": "dense", "preset": "paper"}
    tracer = load_tracer(model, loading, None, **how)
    settings = replace(_settings(answers, chosen), progress=watched)
    without = tracer.reader.why_no_influence() if chosen.scores is None else None
    if without is not None:
        possible = {n: one for n, one in settings.scores.items() if n != "flow:derivation"}
        settings = replace(settings, scores=possible)
    plain = plain_settings(tracer, settings, model=model, data=data, oracle=chosen.oracle)
    return _Evaluator(tracer=tracer, settings=settings, plain=plain, without=without)


def _settings(answers: AnswerOptions, chosen: ProtocolOptions) -> EvaluationSettings:
    """What is measured, as far as it can be checked before the model is loaded."""
    from flowtracer_plugin.evaluation.protocols import EvaluationSettings

    options = _options(chosen)
    return EvaluationSettings(
        options=options,
        scores=_scores(chosen, options.matched),
        protocols=_protocols(chosen.protocols),
        setting=answers.setting,
        max_new_tokens=answers.max_new_tokens,
        predicted_only=answers.predicted_only,
        batch_size=chosen.batch_size,
    )


def _described(evaluator: _Evaluator, _task: None) -> tuple[Mapping[str, Any], str | None]:
    return evaluator.plain, evaluator.without


def _measured(evaluator: _Evaluator, example: Example) -> Outcome:
    from flowtracer_plugin.evaluation.run import evaluate_example

    return evaluate_example(evaluator.tracer, example, evaluator.settings)


def _options(chosen: ProtocolOptions) -> KnockOutOptions:
    from flowtracer_plugin.evaluation.ranked_tokens import KnockOutOptions

    return KnockOutOptions(
        rows=chosen.rows,
        percents=_numbers("--percents", chosen.percents),
        gaps=_numbers("--gaps", chosen.gaps),
        draws=chosen.draws,
        seed=chosen.seed,
    )


def _numbers(option: str, text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise typer.BadParameter(
            f"wanted whole numbers such as 1,2,5, found {text!r}", param_hint=option
        )
    return tuple(int(part) for part in parts)


def _protocols(text: str) -> tuple[str, ...]:
    from flowtracer_plugin.evaluation.protocols import PROTOCOLS, check_protocols

    chosen = tuple(PROTOCOLS) if text == "all" else tuple(names(text))
    with wrong_usage("--protocols"):
        check_protocols(chosen)
    return tuple(name for name in PROTOCOLS if name in chosen)


def _scores(chosen: ProtocolOptions, needed: str) -> Mapping[str, Any]:
    from flowtracer_plugin.credit.token_scores import NAMES, token_score
    from flowtracer_plugin.evaluation.summary import BASELINES

    wanted = list(NAMES)
    if chosen.scores is not None:
        # The controls are matched to the flow, and all scores are compared with one hop.
        wanted = [*names(chosen.scores), needed, BASELINES["one_hop"]]
    if chosen.oracle is not None:
        wanted.append("oracle")
    try:
        return {name: token_score(name, oracle=chosen.oracle) for name in dict.fromkeys(wanted)}
    except ValueError as error:
        raise typer.BadParameter(f"{error} (or recency)", param_hint="--scores") from error


def _run(
    pool: Pool[_Evaluator],
    examples: Sequence[Example],
    plain: Mapping[str, Any],
    output: Path | None,
    *,
    whole: bool,
) -> Sequence[Outcome]:
    """The outcomes of the examples, some of which the file or, as a `whole`, its parts may hold."""
    from flowtracer_plugin.evaluation.run import evaluate_to_file, kept_in, part_files

    def kept() -> str:
        return f"{kept_in(output, plain, examples)} of {len(examples)} examples are"

    with saying_what_is_kept(output, kept):
        return evaluate_to_file(
            partial(pool.run, _measured),
            examples,
            output,
            plain,
            parts=part_files(output) if whole and output is not None else (),
            progress=sys.stderr.isatty(),
            say=partial(typer.echo, err=True),
        )


def _deliver(evaluation: Evaluation, html: Path | None, *, as_json: bool) -> None:
    from flowtracer_plugin.evaluation.outcomes import document
    from flowtracer_plugin.evaluation.page import write_evaluation

    # The file first: it must not be lost to a closed standard output.
    if html is not None:
        write_file(partial(write_evaluation, evaluation), html)
    if as_json:
        print_document(document(evaluation))
    else:
        _print_tables(evaluation)
    if not evaluation.measured:
        raise typer.Exit(1)


def _print_tables(evaluation: Evaluation) -> None:
    from flowtracer_plugin.evaluation.tables import cells, counts, tables

    for line in counts(evaluation):
        typer.echo(line)
    for found in tables(evaluation):
        rows = [tuple(map(cells, row)) for row in found.rows]
        print_results(found.title, found.heads, rows, spare=found.spare)
