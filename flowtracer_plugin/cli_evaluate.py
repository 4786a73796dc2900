"""`flowtracer evaluate`: does knocking out what a score ranks on top change the answers?"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flowtracer_plugin.cli_loading import (
    Device,
    Precision,
    RemoteCode,
    Traceback,
    load_model,
    load_tokenizer,
)
from flowtracer_plugin.cli_options import Layers, answer_rule, writable
from flowtracer_plugin.cli_outputs import print_document

if TYPE_CHECKING:
    from rich.table import Table

    from flowtracer_plugin.evaluation import Example, Outcome
    from flowtracer_plugin.faithfulness import KnockOutOptions
    from flowtracer_plugin.summaries import Interval, ScoreSummary
    from flowtracer_plugin.tracer import FlowTracer

_data = partial(typer.Option, rich_help_panel="Data")
_answers = partial(typer.Option, rich_help_panel="Answers")
_cutting = partial(typer.Option, rich_help_panel="Knock-outs")

Model = Annotated[str, typer.Argument(help="Folder of a model, or its id on the hub.")]
Data = Annotated[
    str, typer.Argument(help="A file of JSON lines, another file, or a data set on the hub.")
]
Split = Annotated[str, _data(help="Split of a data set.")]
Limit = Annotated[int | None, _data(min=1, help="Read only the first rows.")]
PromptColumn = Annotated[
    str | None, _data(help="Column of the prompts; by default prompt or question.")
]
ResponseColumn = Annotated[
    str | None,
    _data(help="Column of given responses; by default response. Else the model answers."),
]
AnswerColumn = Annotated[str | None, _data(help="Column of the right answers; by default answer.")]
Template = Annotated[
    str | None, _data(help="hash, boxed, or a text with {prompt} where the question goes.")
]
System = Annotated[str | None, _data(help="A system message before every prompt.")]
Chat = Annotated[bool, _data(help="Put prompts into the model's chat template, if it has one.")]
Length = Annotated[int, _data(min=1, help="Length of the model's own answers.")]
PredictedOnly = Annotated[
    bool,
    _answers(help="Leave out given responses whose answer the model would not have chosen."),
]
Answer = Annotated[
    Any,
    _answers(
        parser=answer_rule, metavar="RULE", help="How to find answers, as in flowtracer trace."
    ),
]
Rows = Annotated[
    Literal["future", "answer"],
    _cutting(help="Hide tokens from all later ones, or from those that predict the answer."),
]
Percents = Annotated[str, _cutting(help="Shares of the tokens that are knocked out.")]
Gaps = Annotated[
    str, _cutting(help="How many tokens right before the answer are spared; each is measured.")
]
Draws = Annotated[int, _cutting(min=1, help="Random sets of each control and share.")]
ScoreNames = Annotated[
    str | None, _cutting(help="Which scores instead, such as flow:sharp,flow*entropy,recency.")
]
Seed = Annotated[int, _cutting(min=0, help="Seed of the draws and of the intervals.")]
BatchSize = Annotated[
    int | None, _cutting(min=1, help="Cuts at once; as many as memory allows by default.")
]
Output = Annotated[
    Path | None,
    typer.Option(
        dir_okay=False,
        callback=writable,
        help="Write results here as they come, and go on from there.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")]


def evaluate(
    model: Model,
    data: Data,
    split: Split = "train",
    limit: Limit = None,
    prompt_column: PromptColumn = None,
    response_column: ResponseColumn = None,
    answer_column: AnswerColumn = None,
    prompt_template: Template = None,
    system_prompt: System = None,
    chat: Chat = True,
    max_new_tokens: Length = 256,
    predicted_only: PredictedOnly = True,
    answer: Answer = "auto",
    layers: Layers = "middle",
    rows: Rows = "future",
    percents: Percents = "1,2,5,10,20",
    gaps: Gaps = "0,5",
    draws: Draws = 20,
    scores: ScoreNames = None,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    output: Output = None,
    device: Device = "auto",
    dtype: Precision = "auto",
    trust_remote_code: RemoteCode = False,
    json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Knock out the tokens that each score ranks on top, and see whether the answers change.

    Compared are flow, flow:decision, flow:sharp, reach, reach:decision, reach:sharp, attention,
    attention:decision, attention:sharp, attention_power, rollout, fai, waad, grad_x_input, entropy,
    surprisal and recency. --scores takes these, any other scorer of training, and products such as
    flow*entropy.

    For example:

    flowtracer evaluate Qwen/Qwen3-0.6B questions.jsonl --limit 50 --output results.jsonl
    """
    shares, spared = _numbers("--percents", percents), _numbers("--gaps", gaps)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    from flowtracer_plugin.evaluation_data import load_examples
    from flowtracer_plugin.faithfulness import KnockOutOptions

    options = KnockOutOptions(rows=rows, percents=shares, gaps=spared, draws=draws, seed=seed)
    compared = _scores(scores, options.matched)
    examples = load_examples(
        data,
        split=split,
        limit=limit,
        prompt_column=prompt_column,
        response_column=response_column,
        answer_column=answer_column,
        template=prompt_template,
        system=system_prompt,
        chat=chat and tokenizer.chat_template is not None,
    )
    loaded = load_model(model, device, dtype, trust_remote_code=trust_remote_code)
    from flowtracer_plugin.tracer import wrap

    tracer = wrap(loaded, tokenizer, layers=layers, answer=answer, mode="dense")
    settings = {
        "model": model,
        "data": data,
        "dtype": str(tracer.model.dtype),
        "layers": list(tracer.layers),
        "answer": tracer.options.answer,
        "scores": list(compared),
        "max_new_tokens": max_new_tokens,
        "predicted_only": predicted_only,
    }
    outcomes = _run(
        tracer,
        examples,
        options,
        settings,
        output,
        scores=compared,
        max_new_tokens=max_new_tokens,
        predicted_only=predicted_only,
        batch_size=batch_size,
    )
    show = _print_json if json else _print_tables
    show(outcomes, options, settings)
    if not any(outcome.measured for outcome in outcomes):
        raise typer.Exit(1)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise typer.BadParameter(
            f"wanted whole numbers such as 1,2,5, found {text!r}", param_hint=option
        )
    return tuple(int(part) for part in parts)


def _scores(text: str | None, needed: str) -> Mapping[str, Any]:
    from flowtracer_plugin.token_scores import TOKEN_SCORES, token_score

    if text is None:
        return TOKEN_SCORES
    # Controls are matched to the flow, and everything is compared with one hop.
    names = (*(name.strip() for name in text.split(",")), needed, "attention:decision")
    try:
        return {name: token_score(name) for name in dict.fromkeys(names)}
    except ValueError as error:
        raise typer.BadParameter(f"{error} (or recency)", param_hint="--scores") from error


def _run(
    tracer: FlowTracer,
    examples: Sequence[Example],
    options: KnockOutOptions,
    settings: Mapping[str, Any],
    output: Path | None,
    **others: Any,
) -> Sequence[Outcome]:
    from dataclasses import asdict

    from flowtracer_plugin.evaluation import evaluate as measured
    from flowtracer_plugin.evaluation_file import evaluate_to_file, shown

    def outcomes(left: Iterable[Example]) -> Iterator[Outcome]:
        return measured(tracer, left, options, **others)

    progress = sys.stderr.isatty()
    if output is None:
        return tuple(shown(outcomes(examples), len(examples), progress=progress))
    held = {**settings, "options": asdict(options)}
    return evaluate_to_file(outcomes, examples, output, held, progress=progress)


def _print_json(
    outcomes: Sequence[Outcome], options: KnockOutOptions, settings: Mapping[str, Any]
) -> None:
    from dataclasses import asdict

    document = {
        "settings": {**settings, "options": asdict(options)},
        "examples": len(outcomes),
        "measured": sum(outcome.measured is not None for outcome in outcomes),
        "left_out": Counter(o.left_out for o in outcomes if o.left_out),
        "right": _right(outcomes),
        "scores": [asdict(summary) for summary in _summaries(outcomes, options)],
    }
    print_document(document)


def _print_tables(
    outcomes: Sequence[Outcome], options: KnockOutOptions, settings: Mapping[str, Any]
) -> None:
    from rich.console import Console

    measured = sum(outcome.measured is not None for outcome in outcomes)
    typer.echo(f"{measured} of {len(outcomes)} examples measured, {settings['model']}")
    for line in _left_out(outcomes):
        typer.echo(line)
    right = _right(outcomes)
    if right is not None:
        typer.echo(f"{right} of the {measured} answers are right")
    console = Console(width=None if sys.stdout.isatty() else 160)
    summaries = _summaries(outcomes, options)
    for gap in options.gaps if measured else ():
        of_it = [summary for summary in summaries if summary.gap == gap]
        for table in (_drops(of_it, options, gap), _differences(of_it)):
            console.print()
            console.print(table)


def _left_out(outcomes: Sequence[Outcome]) -> Iterator[str]:
    from flowtracer_plugin.evaluation import REASONS

    for reason, words in REASONS.items():
        of_it = [outcome for outcome in outcomes if outcome.left_out == reason]
        if of_it:
            yield f"{len(of_it)} left out: {words}, as in row {of_it[0].row}: {of_it[0].detail}"


def _right(outcomes: Sequence[Outcome]) -> int | None:
    known = [o.correct for o in outcomes if o.measured and o.correct is not None]
    return sum(known) if known else None


def _summaries(outcomes: Sequence[Outcome], options: KnockOutOptions) -> Sequence[ScoreSummary]:
    from flowtracer_plugin.summaries import effects_of, summarise

    effects = [effects_of(o.measured["effects"]) for o in outcomes if o.measured]
    return summarise(effects, seed=options.seed)


def _drops(summaries: Sequence[ScoreSummary], options: KnockOutOptions, gap: int) -> Table:
    from rich.table import Table

    spared = f"; {gap} right before the answer are spared" if gap else ""
    whom = "all later tokens" if options.rows == "future" else "the tokens that predict the answer"
    table = Table(
        title=f"Answer log-probability lost, in nats per token: top of each score hidden from "
        f"{whom}{spared}",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for head in ("score", *(f"{percent} %" for percent in options.percents), "mean"):
        table.add_column(head)
    for summary in _ranked(summaries):
        table.add_row(summary.score, *map(_cell, (*summary.drop, summary.aopc)))
    return table


def _differences(summaries: Sequence[ScoreSummary]) -> Table:
    from rich.table import Table

    table = Table(
        title="Means over the shares: against the bottom, chance and one hop of attention",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for head in ("score", "top", "bottom", "answers flipped", "top − chance", "top − one hop"):
        table.add_column(head)
    bottoms = {summary.score: summary.aopc for summary in summaries if summary.side == "bottom"}
    for summary in _ranked(summaries):
        cells = (
            summary.aopc,
            bottoms.get(summary.score),
            summary.flips,
            summary.over_chance,
            summary.over_one_hop,
        )
        table.add_row(summary.score, *map(_cell, cells))
    return table


def _ranked(summaries: Sequence[ScoreSummary]) -> Sequence[ScoreSummary]:
    tops = [summary for summary in summaries if summary.side == "top"]
    return sorted(tops, key=lambda summary: -summary.aopc.mean)


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return ""
    if interval.low is None:
        return f"{interval.mean:z.2f}"
    return f"{interval.mean:z.2f} ({interval.low:z.2f}…{interval.high:z.2f})"
