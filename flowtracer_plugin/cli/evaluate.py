"""`flowtracer evaluate`: does knocking out what a score ranks on top change the answers?"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flowtracer_plugin.cli.loading import Traceback, load_model, load_tokenizer
from flowtracer_plugin.cli.options import Layers, PageFile, answer_rule, flattened
from flowtracer_plugin.cli.outputs import print_document, write_file
from flowtracer_plugin.cli.questions import DataOptions, RunOptions, load_prompts

if TYPE_CHECKING:
    from flowtracer_plugin.evaluation.examples import Example
    from flowtracer_plugin.evaluation.faithfulness import KnockOutOptions
    from flowtracer_plugin.evaluation.outcomes import Evaluation, Outcome
    from flowtracer_plugin.evaluation.protocols import EvaluationSettings
    from flowtracer_plugin.trace.tracer import FlowTracer

_answers = partial(typer.Option, rich_help_panel="Answers")
_cutting = partial(typer.Option, rich_help_panel="Knock-outs")
_data = partial(typer.Option, rich_help_panel="Data")


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """Which answers are judged."""

    limit: Annotated[int | None, _data(min=1, help="Read only the first rows.")] = None
    response_column: Annotated[
        str | None,
        _data(help="Column of given responses; by default response. Else the model answers."),
    ] = None
    max_new_tokens: Annotated[int, _answers(min=1, help="Length of the model's own answers.")] = 256
    predicted_only: Annotated[
        bool,
        _answers(
            "--predicted-only/--any-answer",
            help="Leave out given responses whose answer the model would not have chosen.",
        ),
    ] = True
    setting: Annotated[
        Literal["given", "compute"],
        _data(
            metavar="WHICH",
            help="given: responses as they are; compute: cut where the answer has to be computed.",
        ),
    ] = "given"
    answer: Annotated[
        Any,
        _answers(
            parser=answer_rule, metavar="RULE", help="How to find answers, as in flowtracer trace."
        ),
    ] = "auto"
    layers: Layers = "middle"


@dataclass(frozen=True, kw_only=True)
class ProtocolOptions:
    """What is done to the texts."""

    protocols: Annotated[
        str, _cutting(help="knock_out, curves, lines, edges, regeneration, or all.")
    ] = "knock_out"
    rows: Annotated[
        Literal["future", "answer"],
        _cutting(help="Hide tokens from all later ones, or from those that predict the answer."),
    ] = "future"
    percents: Annotated[str, _cutting(help="Shares of the tokens that are knocked out.")] = (
        "1,2,5,10,20"
    )
    gaps: Annotated[
        str,
        _cutting(help="How many tokens right before the answer are spared; each is measured."),
    ] = "0,5"
    draws: Annotated[int, _cutting(min=1, help="Random sets of each control and share.")] = 20
    scores: Annotated[
        str | None,
        _cutting(help="Such as flow,flow:sharp,recency; docs/credit.md lists all scorers."),
    ] = None
    oracle: Annotated[
        str | None,
        _cutting(help="Pattern of what matters in a response: adds the score oracle."),
    ] = None
    seed: Annotated[int, _cutting(min=0, help="Seed of the draws and of the intervals.")] = 0
    batch_size: Annotated[
        int | None, _cutting(min=1, help="Cuts at once; as many as memory allows by default.")
    ] = None


@flattened
def evaluate(
    run: RunOptions,
    data: DataOptions,
    answers: AnswerOptions,
    chosen: ProtocolOptions,
    html: PageFile = None,
    traceback: Traceback = False,
) -> None:
    """Knock out the tokens that each score ranks on top, and see whether the answers change.

    Scores are those of docs/credit.md and recency; by default flow, flow:decision, flow:sharp,
    reach, reach:decision, reach:sharp, attention, attention:decision, attention:sharp,
    attention_power, rollout, fai, waad, grad_x_input, entropy, surprisal and recency.

    For example:

    flowtracer evaluate Qwen/Qwen3-0.6B questions.jsonl --limit 50 --output results.jsonl
    """
    tokenizer = load_tokenizer(run.model, trust_remote_code=run.trust_remote_code)
    options = _options(chosen)
    protocols, scores = _protocols(chosen.protocols), _scores(chosen, options.matched)
    examples = load_prompts(data, tokenizer, answers.limit, response_column=answers.response_column)
    loaded = load_model(run.model, run.device, run.dtype, trust_remote_code=run.trust_remote_code)
    from flowtracer_plugin.evaluation.outcomes import Evaluation
    from flowtracer_plugin.evaluation.protocols import EvaluationSettings
    from flowtracer_plugin.evaluation.results_file import plain_settings
    from flowtracer_plugin.trace.tracer import wrap

    tracer = wrap(loaded, tokenizer, layers=answers.layers, answer=answers.answer, mode="dense")
    settings = EvaluationSettings(
        options=options,
        scores=scores,
        protocols=protocols,
        setting=answers.setting,
        max_new_tokens=answers.max_new_tokens,
        predicted_only=answers.predicted_only,
        batch_size=chosen.batch_size,
    )
    plain = plain_settings(tracer, settings, model=run.model, data=data.data, oracle=chosen.oracle)
    outcomes = _run(tracer, examples, settings, plain, run.output)
    _deliver(Evaluation(settings=plain, examples=examples, outcomes=outcomes), html, run.json)


def _options(chosen: ProtocolOptions) -> KnockOutOptions:
    from flowtracer_plugin.evaluation.faithfulness import KnockOutOptions

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

    names = tuple(PROTOCOLS) if text == "all" else tuple(part.strip() for part in text.split(","))
    try:
        check_protocols(names)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--protocols") from error
    return tuple(name for name in PROTOCOLS if name in names)


def _scores(chosen: ProtocolOptions, needed: str) -> Mapping[str, Any]:
    from flowtracer_plugin.credit.token_scores import NAMES, token_score
    from flowtracer_plugin.evaluation.summaries import BASELINES

    names = list(NAMES)
    if chosen.scores is not None:
        # Controls are matched to the flow, and everything is compared with one hop.
        asked = (name.strip() for name in chosen.scores.split(","))
        names = [*asked, needed, BASELINES["one_hop"]]
    if chosen.oracle is not None:
        names.append("oracle")
    try:
        return {name: token_score(name, oracle=chosen.oracle) for name in dict.fromkeys(names)}
    except ValueError as error:
        raise typer.BadParameter(f"{error} (or recency)", param_hint="--scores") from error


def _run(
    tracer: FlowTracer,
    examples: Sequence[Example],
    settings: EvaluationSettings,
    plain: Mapping[str, Any],
    output: Path | None,
) -> Sequence[Outcome]:
    from flowtracer_plugin.evaluation.results_file import evaluate_to_file
    from flowtracer_plugin.evaluation.run import evaluate_example

    def outcomes(left: Iterable[Example]) -> Iterator[Outcome]:
        return (evaluate_example(tracer, example, settings) for example in left)

    return evaluate_to_file(outcomes, examples, output, plain, progress=sys.stderr.isatty())


def _deliver(evaluation: Evaluation, html: Path | None, as_json: bool) -> None:
    from flowtracer_plugin.evaluation.outcomes import document
    from flowtracer_plugin.evaluation.page import write_evaluation

    if as_json:
        print_document(document(evaluation))
    else:
        _print_tables(evaluation)
    if html is not None:
        write_file(partial(write_evaluation, evaluation), html)
    if not evaluation.measured:
        raise typer.Exit(1)


def _print_tables(evaluation: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    from flowtracer_plugin.evaluation.tables import cell, counts, tables

    for line in counts(evaluation):
        typer.echo(line)
    console = Console(width=None if sys.stdout.isatty() else 200)
    for found in tables(evaluation):
        table = Table(title=found.title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for head in found.heads:
            table.add_column(head)
        for row in found.rows:
            table.add_row(*map(cell, row))
        console.print()
        console.print(table)
