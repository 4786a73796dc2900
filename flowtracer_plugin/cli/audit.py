"""`flowtracer audit`: which credit turns the policy gradient in the right direction?"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowtracer_plugin.cli.loading import load_model, load_tokenizer, load_tracer, waiting
from flowtracer_plugin.cli.options import (
    SCORES,
    AnswerRule,
    Layers,
    LoadingOptions,
    MaxNewTokens,
    ModelArgument,
    Oracle,
    ResultOptions,
    Traceback,
    flattened,
)
from flowtracer_plugin.cli.outputs import print_document, print_results, saying_what_is_kept
from flowtracer_plugin.cli.parsing import names, pattern, wrong_usage
from flowtracer_plugin.cli.questions import DataOptions, load_prompts
from flowtracer_plugin.cli.workers import WorkerOptions, chosen_engine
from flowtracer_plugin.files import check_records

if TYPE_CHECKING:
    from flowtracer_plugin.audit.results_file import AuditFile
    from flowtracer_plugin.audit.sampling import Group
    from flowtracer_plugin.audit.summary import AuditSummary
    from flowtracer_plugin.bulk.engines import Engine
    from flowtracer_plugin.bulk.examples import Example
    from flowtracer_plugin.credit.scorers import Scorer
    from flowtracer_plugin.trace.tracer import FlowTracer

SCORERS = (
    "flow,flow:decision,flow:sharp,reach,attention,attention:decision,attention:sharp,"
    "flow*entropy,attention:decision*entropy,fai,waad,coupled,rollout,entropy,random,shuffled"
)
"""Scorers that are compared by default; they need no pass over the model but the audit's own."""

_LATER = ("gamma", "answer", "layers")
"""Options that the results do not depend on, or that only the model makes definite."""

_rollouts = partial(typer.Option, rich_help_panel="Rollouts")
_credit = partial(typer.Option, rich_help_panel="Credit")


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """Which rollouts are sampled, and how they are rewarded."""

    reward: Annotated[
        str, _rollouts(help="math_answer, or a dotted path such as my_rewards.short.")
    ] = "math_answer"
    prompts: Annotated[int, _rollouts(min=8, help="Number of rows of the data to use.")] = 64
    completions: Annotated[int, _rollouts(min=2, help="Completions of each prompt.")] = 8
    max_new_tokens: MaxNewTokens = 256
    temperature: Annotated[float, _rollouts(min=0.01, help="Sampling temperature.")] = 1.0
    seed: Annotated[
        int, _rollouts(min=0, help="Random seed for sampling, and for scorers that draw at random.")
    ] = 0


@dataclass(frozen=True, kw_only=True)
class CreditAuditOptions:
    """Which ways to give credit are compared."""

    scorers: Annotated[str, SCORES] = SCORERS
    gamma: Annotated[float, _credit(min=0, help="Weight of the chosen tokens.")] = 1.5
    top_fraction: Annotated[
        float, _credit(help="Share of a completion's tokens that each scorer chooses.")
    ] = 0.4
    oracle: Oracle = None
    batches: Annotated[
        int, _credit(min=4, help="Number of batches to split the prompts into; even.")
    ] = 16
    parameters: Annotated[
        str | None,
        _credit(
            callback=pattern,
            help=r"Regular expression for the names of the parameters to use, such as layers\.20\.",
        ),
    ] = None
    layers: Layers = "middle"
    answer: AnswerRule = "auto"


@flattened
def audit(
    model: ModelArgument,
    data: DataOptions,
    results: ResultOptions,
    loading: LoadingOptions,
    rollouts: RolloutOptions,
    credit: CreditAuditOptions,
    work: WorkerOptions,
    traceback: Traceback = False,
) -> None:
    """Compare ways to give tokens credit by their policy gradients, before any training.

    Workers sample and reward the rollouts; gradients are summed in this process.

    For example:

    flowtracer audit Qwen/Qwen3-0.6B questions.jsonl --reward math_answer --parameters layers.20
    """
    with waiting("importing PyTorch and transformers"):
        from flowtracer_plugin.audit.policy_gradient import check_memory, named_parameters
        from flowtracer_plugin.audit.results_file import FORMAT, VERSION, AuditFile
        from flowtracer_plugin.audit.run import AuditOptions, audit as audited
        from flowtracer_plugin.audit.summary import summarise_audit
        from flowtracer_plugin.audit.verdict import document
        from flowtracer_plugin.credit.own_scorers import own_sources
        from flowtracer_plugin.rewards.named import named_reward

    engine = chosen_engine(work)
    scorers = _scorers(credit)
    chosen = {
        "model": model,
        "data": data.settings,
        **asdict(rollouts),
        **{name: of for name, of in vars(credit).items() if name not in _LATER},
        "scorers": [scorer.name for scorer in scorers],
    }
    check_records(results.output, FORMAT, VERSION, chosen)
    tokenizer = load_tokenizer(model, loading)
    sampled: dict[str, Any] = {"temperature": rollouts.temperature, "seed": rollouts.seed}
    options = AuditOptions(batches=credit.batches, top_fraction=credit.top_fraction, **sampled)
    named_reward(rollouts.reward)  # before the model is loaded
    examples = load_prompts(data, tokenizer, rollouts.prompts)
    how = {"layers": credit.layers, "answer": credit.answer, "preset": "paper"}
    tracer = load_tracer(model, loading, tokenizer, **how)
    parameters = list(named_parameters(tracer.model, credit.parameters).values())
    check_memory(tracer.model, parameters, vectors=len(scorers) + 4)
    settings = {
        **chosen,
        "dtype": str(tracer.model.dtype),
        "layers": list(tracer.layers),
        "answer": tracer.options.answer,
        **own_sources({scorer.name: scorer for scorer in scorers}),
    }
    file = AuditFile(results.output, settings)
    make = partial(_sampler, model, loading, rollouts, None if not engine.here else tracer)
    running: dict[str, Any] = {"oracle": credit.oracle, "done": set(file.batches), **_shown()}
    kept = partial(_kept, file, len(examples), credit.batches)
    with saying_what_is_kept(results.output, kept):
        groups = _groups(tokenizer, examples, make, engine, file)
        for batch in audited(tracer, groups, scorers, parameters, options, **running):
            file.add(batch)
    batches = [file.batches[number] for number in sorted(file.batches)]
    summary = summarise_audit(batches, gammas=tuple(dict.fromkeys((credit.gamma, 3.0, math.inf))))
    if results.json:
        print_document(document(summary, groups, settings))
    else:
        _print_verdict(summary, groups)


def _shown() -> dict[str, Any]:
    """How far the work is: bars in a terminal, lines elsewhere."""
    return {"progress": sys.stderr.isatty(), "say": partial(typer.echo, err=True)}


def _kept(file: AuditFile, prompts: int, batches: int) -> str:
    return (
        f"{len(file.groups)} of {prompts} prompts and {len(file.batches)} of {batches} batches are"
    )


def _print_verdict(summary: AuditSummary, groups: Sequence[Group]) -> None:
    from flowtracer_plugin.audit.verdict import overview, table, verdict

    for line in overview(summary, groups):
        typer.echo(line)
    heads, *rows = table(summary)
    title = "How each scorer changes that cosine (± standard error), and what it chooses"
    cells = [[(one, one.partition(" ±")[0]) if "±" in one else one for one in row] for row in rows]
    best = heads[1], "− random", "− one hop"
    spare = [head for head in reversed(heads[1:]) if head not in best]
    print_results(title, heads, cells, numbers="right", spare=spare)
    typer.echo()
    for line in verdict(summary):
        typer.echo(line)


def _scorers(credit: CreditAuditOptions) -> tuple[Scorer, ...]:
    from flowtracer_plugin.credit.scorers import find_scorer

    wanted = names(credit.scorers) + ([] if credit.oracle is None else ["oracle"])
    with wrong_usage("--scorers"):
        found = tuple(find_scorer(name) for name in dict.fromkeys(wanted) if name != "uniform")
    if credit.oracle is None and any("oracle" in scorer.needs for scorer in found):
        raise typer.BadParameter(
            r"the scorer oracle needs a pattern of what matters, such as --oracle '= (\d+)'",
            param_hint="--scorers",
        )
    return found


@dataclass(frozen=True, kw_only=True)
class _Sampler:
    """What a worker that samples holds."""

    model: Any
    tokenizer: Any
    options: RolloutOptions
    reward: Any
    alone: Callable[[], AbstractContextManager[None]]


def _sampler(
    model: str, loading: LoadingOptions, options: RolloutOptions, tracer: FlowTracer | None
) -> _Sampler:
    """A sampler with the model of a tracer, or in a worker with one of its own."""
    from flowtracer_plugin.rewards.named import named_reward

    return _Sampler(
        model=load_model(model, loading) if tracer is None else tracer.model,
        tokenizer=load_tokenizer(model, loading) if tracer is None else tracer.require_tokenizer(),
        options=options,
        reward=named_reward(options.reward),
        alone=nullcontext if tracer is None else tracer.reader.exclusive,
    )


def _sampled(sampler: _Sampler, task: tuple[Example, tuple[int, ...]]) -> Group:
    """The rollouts of a prompt, which depend on its row and the seed alone."""
    from flowtracer_plugin.audit.sampling import Group, rewarded, sample

    (example, ids), options = task, sampler.options
    with sampler.alone():
        completions = sample(
            sampler.model,
            sampler.tokenizer,
            ids,
            completions=options.completions,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=(options.seed, example.row),
        )
    columns = {**example.columns, "answer": example.answer}
    rewards = rewarded(sampler.reward, sampler.tokenizer, example.prompt, completions, columns)
    return Group(row=example.row, prompt_ids=ids, completions=completions, rewards=rewards)


def _groups(
    tokenizer: Any,
    examples: Sequence[Example],
    make: Callable[[], _Sampler],
    engine: Engine,
    file: AuditFile,
) -> list[Group]:
    """The rollouts of every prompt; those that the file lacks are sampled and added to it."""
    from flowtracer_plugin.bulk.engines import Engine, open_pool
    from flowtracer_plugin.evaluation.progress import Progress
    from flowtracer_plugin.text.encoding import check_turn, encode_prompt

    for one in examples:
        check_turn(one.prompt, one.template_kwargs)
    prompts = [
        (one, tuple(encode_prompt(tokenizer, one.prompt, one.template_kwargs)[0]))
        for one in examples
    ]
    left = [(one, ids) for one, ids in prompts if not file.has_group(one.row, ids)]
    known = len(prompts) - len(left)
    with (
        Progress("prompt", len(prompts), done=known, **_shown()) as progress,
        open_pool(make, engine if left else Engine()) as pool,
    ):
        for group in pool.run(_sampled, left):
            file.add(group)
            progress.step(f"row {group.row} sampled")
    return [file.groups[example.row] for example in examples]
