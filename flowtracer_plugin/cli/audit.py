"""`flowtracer audit`: which credit turns the policy gradient where it should go?"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowtracer_plugin.cli.loading import Traceback, load_model, load_tokenizer
from flowtracer_plugin.cli.options import Layers, answer_rule, flattened
from flowtracer_plugin.cli.outputs import print_document
from flowtracer_plugin.cli.questions import DataOptions, RunOptions, load_prompts

if TYPE_CHECKING:
    from rich.table import Table

    from flowtracer_plugin.audit.results_file import AuditFile
    from flowtracer_plugin.audit.sampling import Group
    from flowtracer_plugin.audit.summary import AuditSummary, Difference, ScorerAudit
    from flowtracer_plugin.credit.scorers import Scorer
    from flowtracer_plugin.evaluation.examples import Example
    from flowtracer_plugin.trace.tracer import FlowTracer

SCORERS = (
    "flow,flow:decision,flow:sharp,reach,attention,attention:decision,attention:sharp,"
    "flow*entropy,attention:decision*entropy,fai,waad,coupled,rollout,entropy,random,shuffled"
)
"""What is compared by default; all of it comes of one forward pass."""

RARE = 0.05
"""Chance below which a difference is called one."""

_rollouts = partial(typer.Option, rich_help_panel="Rollouts")
_credit = partial(typer.Option, rich_help_panel="Credit")


def _pattern(text: str | None) -> str | None:
    """A pattern that can be used: better refused now than after the sampling."""
    try:
        re.compile(text or "")
    except re.error as error:
        raise typer.BadParameter(f"{text!r} is no pattern: {error}") from error
    return text


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """What is sampled, and how it is rewarded."""

    reward: Annotated[
        str, _rollouts(help="math_answer, or a dotted path such as my_rewards.short.")
    ] = "math_answer"
    prompts: Annotated[int, _rollouts(min=8, help="How many rows of the data.")] = 64
    completions: Annotated[int, _rollouts(min=2, help="Of each prompt.")] = 8
    max_new_tokens: Annotated[int, _rollouts(min=1, help="Length of a completion.")] = 256
    temperature: Annotated[float, _rollouts(min=0.01, help="Of the sampling.")] = 1.0
    seed: Annotated[int, _rollouts(min=0, help="Of the sampling and of scorers that draw.")] = 0


@dataclass(frozen=True, kw_only=True)
class CreditAuditOptions:
    """What is compared."""

    scorers: Annotated[
        str, _credit(help="Such as flow,flow:sharp,flow*entropy; docs/credit.md lists all.")
    ] = SCORERS
    gamma: Annotated[float, _credit(min=0, help="Weight of the chosen tokens.")] = 1.5
    top_fraction: Annotated[float, _credit(help="Share of the tokens that is chosen.")] = 0.4
    oracle: Annotated[
        str | None,
        _credit(
            callback=_pattern,
            help="Pattern of what matters in a completion: adds the scorer oracle.",
        ),
    ] = None
    batches: Annotated[int, _credit(min=4, help="Parts of the prompts; an even number.")] = 16
    parameters: Annotated[
        str | None,
        _credit(
            callback=_pattern,
            help=r"Look at parameters whose name this pattern finds, as layers\.20\.",
        ),
    ] = None
    layers: Layers = "middle"
    answer: Annotated[
        Any,
        _credit(parser=answer_rule, metavar="RULE", help="How answers are found, as in trace."),
    ] = "auto"


@flattened
def audit(
    run: RunOptions,
    data: DataOptions,
    rollouts: RolloutOptions,
    credit: CreditAuditOptions,
    traceback: Traceback = False,
) -> None:
    """Compare ways to give tokens credit before any training, by the policy gradient they make.

    For example:

    flowtracer audit Qwen/Qwen3-0.6B questions.jsonl --reward math_answer --parameters layers.20
    """
    tokenizer = load_tokenizer(run.model, trust_remote_code=run.trust_remote_code)
    from flowtracer_plugin.audit.results_file import AuditFile
    from flowtracer_plugin.audit.run import AuditOptions
    from flowtracer_plugin.rewards.named import named_reward

    scorers = _scorers(credit)
    options = AuditOptions(
        batches=credit.batches,
        top_fraction=credit.top_fraction,
        temperature=rollouts.temperature,
        seed=rollouts.seed,
    )
    reward = named_reward(rollouts.reward)
    examples = load_prompts(data, tokenizer, rollouts.prompts)
    loaded = load_model(run.model, run.device, run.dtype, trust_remote_code=run.trust_remote_code)
    from flowtracer_plugin.audit.policy_gradient import check_memory, named_parameters
    from flowtracer_plugin.audit.run import audit as audited
    from flowtracer_plugin.trace.tracer import wrap

    tracer = wrap(loaded, tokenizer, layers=credit.layers, answer=credit.answer)
    parameters = named_parameters(tracer.model, credit.parameters)
    check_memory(tracer.model, list(parameters.values()), vectors=len(scorers) + 4)
    settings = {
        "model": run.model,
        "data": asdict(data),
        "dtype": str(tracer.model.dtype),
        **asdict(rollouts),
        **{name: value for name, value in vars(credit).items() if name not in ("gamma", "answer")},
        "scorers": [scorer.name for scorer in scorers],
        "layers": list(tracer.layers),
        "answer": tracer.options.answer,
    }
    file = AuditFile(run.output, settings)
    groups = _groups(tracer, examples, rollouts, reward, file)
    for batch in audited(
        tracer,
        groups,
        scorers,
        list(parameters.values()),
        options,
        oracle=credit.oracle,
        done=file.batches,
        progress=sys.stderr.isatty(),
    ):
        file.add(batch)
    _deliver(file, groups, settings, credit.gamma, as_json=run.json)


def _scorers(credit: CreditAuditOptions) -> tuple[Scorer, ...]:
    from flowtracer_plugin.credit.scorers import find_scorer

    names = [name.strip() for name in credit.scorers.split(",")]
    if credit.oracle is not None and "oracle" not in names:
        names.append("oracle")
    try:
        found = tuple(find_scorer(name) for name in dict.fromkeys(names) if name != "uniform")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--scorers") from error
    if credit.oracle is None and any("oracle" in scorer.needs for scorer in found):
        raise typer.BadParameter(
            r"the scorer oracle needs a pattern of what matters, such as --oracle '= (\d+)'",
            param_hint="--scorers",
        )
    return found


def _groups(
    tracer: FlowTracer,
    examples: Sequence[Example],
    options: RolloutOptions,
    reward: Any,
    file: AuditFile,
) -> list[Group]:
    """Rollouts of every prompt, sampled where the file does not hold them."""
    from tqdm import tqdm

    from flowtracer_plugin.audit.sampling import Group, rewarded, sample
    from flowtracer_plugin.text.encoding import encode_prompt

    tokenizer = tracer.require_tokenizer()
    bar = tqdm(examples, desc="sampling", unit="prompt", disable=not sys.stderr.isatty())
    for example in bar:
        ids, _ = encode_prompt(tokenizer, example.prompt)
        known = file.groups.get(example.row)
        if known is not None and known.prompt_ids != tuple(ids):
            raise ValueError(
                f"the file holds row {example.row} with another prompt: the data have changed; "
                "write to another file"
            )
        if known is None:
            with tracer.reader.exclusive():
                completions = sample(
                    tracer.model,
                    tokenizer,
                    ids,
                    completions=options.completions,
                    max_new_tokens=options.max_new_tokens,
                    temperature=options.temperature,
                    seed=(options.seed, example.row),
                )
            columns = {**example.columns, "answer": example.answer}
            rewards = rewarded(reward, tokenizer, example.prompt, completions, columns)
            file.add(
                Group(
                    row=example.row,
                    prompt_ids=tuple(ids),
                    completions=completions,
                    rewards=rewards,
                )
            )
    return [file.groups[example.row] for example in examples]


def _deliver(
    file: AuditFile,
    groups: Sequence[Group],
    settings: Mapping[str, Any],
    gamma: float,
    *,
    as_json: bool,
) -> None:
    from flowtracer_plugin.audit.summary import summarise_audit

    batches = [file.batches[number] for number in sorted(file.batches)]
    summary = summarise_audit(batches, gammas=tuple(dict.fromkeys((gamma, 3.0, math.inf))))
    rewards = [reward for group in groups for reward in group.rewards]
    about = {
        "prompts": len(groups),
        "with_signal": sum(group.tells for group in groups),
        "mean_reward": sum(rewards) / len(rewards),
    }
    if as_json:
        print_document({"settings": settings, **about, **_finite(asdict(summary))})
        return
    typer.echo(
        f"{about['with_signal']} of {about['prompts']} prompts got completions with different "
        f"rewards; mean reward {about['mean_reward']:.2f}"
    )
    typer.echo(
        f"uniform credit: cosine {summary.cosine:.3f} with the other half's gradient, the mean of "
        f"{summary.batches} batches; {summary.tokens} tokens of {summary.entropy:.2f} nats"
    )
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print()
    console.print(_table(summary))
    typer.echo("")
    for line in _verdict(summary):
        typer.echo(line)


def _finite(value: Any) -> Any:
    """The same with None for the infinite gamma of the chosen tokens alone: JSON has none."""
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if value == math.inf else value


def _table(summary: AuditSummary) -> Table:
    from rich.table import Table

    table = Table(
        title="What each scorer changes of that cosine (± standard error), and what it chooses",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    gammas = [difference.gamma for difference in summary.scorers[0].differences]
    heads = ["only these" if math.isinf(gamma) else f"gamma {gamma:g}" for gamma in gammas]
    kinds = [kind for kind in summary.classes if kind != "space"]
    for head in (
        "scorer",
        *heads,
        "− random",
        "− one hop",
        "signal",
        "noise",
        "chosen",
        "nats",
        "answer",
        *kinds,
    ):
        table.add_column(head, justify="left" if head == "scorer" else "right")
    for one in sorted(summary.scorers, key=lambda one: -one.differences[0].mean):
        shares = (one.answer, *(one.classes[kind] for kind in kinds))
        table.add_row(
            one.scorer,
            *map(_cell, (*one.differences, one.over_random, one.over_one_hop)),
            f"{one.signal:z.2f}",
            f"{one.noise:z.2f}",
            f"{one.chosen:.0%}",
            f"{one.entropy:z.2f}",
            *(f"{share:.0%}" for share in shares),
        )
    every = [f"{summary.classes[kind]:.0%}" for kind in kinds]
    blank = [""] * (len(gammas) + 2)
    whole = f"{summary.entropy:z.2f}"
    table.add_row("uniform", *blank, "1.00", "1.00", "100%", whole, "", *every, style="dim")
    return table


def _cell(difference: Difference | None) -> str:
    if difference is None:
        return ""
    return f"{difference.mean:+.3f} ± {difference.error:.3f}"


def _verdict(summary: AuditSummary) -> Iterator[str]:
    """What can be told apart from uniform credit, by Holm over the scorers."""
    from flowtracer_plugin.audit.summary import holm

    first = [one.differences[0] for one in summary.scorers]
    chances = holm([difference.chance for difference in first])
    told = [
        (one, difference)
        for one, difference, chance in zip(summary.scorers, first, chances, strict=True)
        if chance < RARE
    ]
    better = [one for one, difference in told if difference.mean > 0]
    worse = [one for one, difference in told if difference.mean < 0]
    if better:
        yield f"closer to the reference than uniform credit: {_names(better)}"
    if worse:
        yield f"further from it: {_names(worse)}"
    if not told:
        yield "none can be told from uniform credit"
    yield (
        f"({len(first)} scorers compared at gamma {first[0].gamma:g}, p below {RARE} after Holm; "
        "random and shuffled say what tilting alone does)"
    )


def _names(scorers: Sequence[ScorerAudit]) -> str:
    ranked = sorted(scorers, key=lambda one: -one.differences[0].mean)
    return ", ".join(one.scorer for one in ranked)
