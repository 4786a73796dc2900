"""`flowtracer audit`: which credit turns the policy gradient in the right direction?"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

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
    ResultOptions,
    Traceback,
    flattened,
)
from flowtracer_plugin.cli.outputs import print_document, print_results
from flowtracer_plugin.cli.parsing import names, pattern, wrong_usage
from flowtracer_plugin.cli.questions import DataOptions, load_prompts
from flowtracer_plugin.files import check_records

if TYPE_CHECKING:
    from flowtracer_plugin.audit.results_file import AuditFile
    from flowtracer_plugin.audit.sampling import Group
    from flowtracer_plugin.audit.summary import AuditSummary
    from flowtracer_plugin.bulk.examples import Example
    from flowtracer_plugin.credit.scorers import Scorer
    from flowtracer_plugin.trace.tracer import FlowTracer

SCORERS = (
    "flow,flow:decision,flow:sharp,reach,attention,attention:decision,attention:sharp,"
    "flow*entropy,attention:decision*entropy,fai,waad,coupled,rollout,entropy,random,shuffled"
)
"""Scorers that are compared by default; they need no pass over the model but the audit's own."""

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
    traceback: Traceback = False,
) -> None:
    """Compare ways to give tokens credit by their policy gradients, before any training.

    For example:

    flowtracer audit Qwen/Qwen3-0.6B questions.jsonl --reward math_answer --parameters layers.20
    """
    with waiting("importing PyTorch and transformers"):
        from flowtracer_plugin.audit.policy_gradient import check_memory, named_parameters
        from flowtracer_plugin.audit.results_file import FORMAT, VERSION, AuditFile
        from flowtracer_plugin.audit.run import AuditOptions, audit as audited
        from flowtracer_plugin.audit.summary import summarise_audit
        from flowtracer_plugin.audit.verdict import document
        from flowtracer_plugin.rewards.named import named_reward

    check_records(results.output, FORMAT, VERSION)
    tokenizer = load_tokenizer(model, loading)
    scorers = _scorers(credit)
    options = AuditOptions(
        batches=credit.batches,
        top_fraction=credit.top_fraction,
        temperature=rollouts.temperature,
        seed=rollouts.seed,
    )
    reward = named_reward(rollouts.reward)
    examples = load_prompts(data, tokenizer, rollouts.prompts)
    how = {"layers": credit.layers, "answer": credit.answer, "preset": "paper"}
    tracer = load_tracer(model, loading, tokenizer, **how)
    parameters = list(named_parameters(tracer.model, credit.parameters).values())
    check_memory(tracer.model, parameters, vectors=len(scorers) + 4)
    settings = {
        "model": model,
        "data": asdict(data),
        "dtype": str(tracer.model.dtype),
        **asdict(rollouts),
        **{name: value for name, value in vars(credit).items() if name not in ("gamma", "answer")},
        "scorers": [scorer.name for scorer in scorers],
        "layers": list(tracer.layers),
        "answer": tracer.options.answer,
    }
    file = AuditFile(results.output, settings)
    groups = _groups(tracer, examples, rollouts, reward, file)
    running: dict[str, Any] = {
        "oracle": credit.oracle,
        "done": set(file.batches),
        "progress": sys.stderr.isatty(),
    }
    for batch in audited(tracer, groups, scorers, parameters, options, **running):
        file.add(batch)
    batches = [file.batches[number] for number in sorted(file.batches)]
    summary = summarise_audit(batches, gammas=tuple(dict.fromkeys((credit.gamma, 3.0, math.inf))))
    if results.json:
        print_document(document(summary, groups, settings))
    else:
        _print_verdict(summary, groups)


def _print_verdict(summary: AuditSummary, groups: Sequence[Group]) -> None:
    from flowtracer_plugin.audit.verdict import overview, table, verdict

    for line in overview(summary, groups):
        typer.echo(line)
    heads, *rows = table(summary)
    title = "How each scorer changes that cosine (± standard error), and what it chooses"
    print_results(title, heads, rows, numbers="right")
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


def _groups(
    tracer: FlowTracer,
    examples: Sequence[Example],
    options: RolloutOptions,
    reward: Any,
    file: AuditFile,
) -> list[Group]:
    """The rollouts of every prompt; those that the file lacks are sampled and added to it."""
    from tqdm import tqdm

    from flowtracer_plugin.audit.sampling import Group, rewarded, sample
    from flowtracer_plugin.text.encoding import encode_prompt

    tokenizer = tracer.require_tokenizer()
    for example in tqdm(examples, desc="sampling", unit="prompt", disable=not sys.stderr.isatty()):
        ids, _ = encode_prompt(tokenizer, example.prompt)
        if file.has_group(example.row, ids):
            continue
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
            Group(row=example.row, prompt_ids=tuple(ids), completions=completions, rewards=rewards)
        )
    return [file.groups[example.row] for example in examples]
