"""Facts about a task before any run: its policy's accuracy, and an audit of the arms' credit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed

import flowtracer_plugin as ft
from examples.ablation.plan import ARMS, SHARE, Arm, Plan
from examples.ablation.pupil import adapters
from examples.ablation.task import Problem, Task
from examples.reasoner.train import answer
from flowtracer_plugin.audit import (
    AuditOptions,
    AuditSummary,
    Group,
    audit,
    named_parameters,
    sample,
    summarise_audit,
)
from flowtracer_plugin.credit.measures import Features, Rollouts
from flowtracer_plugin.credit.scorers import Boost, Scorer, find_scorer, lowest

SEED = 1000
ASKED = 512
GAMMAS = (1.5, 2.0)
"""The factors of all arms."""


def known(task: Task, plan: Plan, start: Path) -> dict[str, Any]:
    """The accuracies and the audit as plain values, for a file."""
    gammas = {arm.name: GAMMAS.index(arm.credit.get("gamma", 1.5)) for arm in ARMS}
    return {
        "greedy": accuracy(task, start, greedy=True),
        "sampled": accuracy(task, start, greedy=False),
        "audit": {
            one.scorer: {
                "cosine": one.differences[gammas[one.scorer]].mean,
                "error": one.differences[gammas[one.scorer]].error,
                "chosen": one.chosen,
            }
            for one in audited(task, plan, start).scorers
        },
    }


def accuracy(task: Task, start: Path, *, greedy: bool) -> float:
    """The share of 512 problems that the common starting policy of all runs solves."""
    set_seed(SEED)
    rng = random.Random(SEED)
    problems = [task.draw(rng) for _ in range(ASKED)]
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForCausalLM.from_pretrained(start)
    prompts = [problem.prompt for problem in problems]
    limit = task.max_new_tokens
    texts = answer(model, tokenizer, prompts, sample=not greedy, max_new_tokens=limit)
    return sum(map(task.is_solved, texts, problems)) / ASKED


def audited(task: Task, plan: Plan, start: Path) -> AuditSummary:
    """An audit of each arm's credit, on the policy from which all runs start."""
    set_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(start)
    base = AutoModelForCausalLM.from_pretrained(start)
    model = get_peft_model(base, adapters(plan.rank))
    tracer = ft.wrap(model, tokenizer, answer=task.answer, preset="paper")
    rng = random.Random(SEED)
    problems = [task.draw(rng) for _ in range(plan.audited)]
    batches = audit(
        tracer,
        _groups(task, plan, problems, model, tokenizer),
        [_scorer(arm) for arm in ARMS if arm.credit["scorer"] != "uniform"],
        list(named_parameters(model, None).values()),
        AuditOptions(batches=plan.audited // plan.prompts, top_fraction=SHARE),
        oracle=task.what_matters,
        progress=True,
    )
    return summarise_audit(list(batches), gammas=GAMMAS)


def _scorer(arm: Arm) -> Scorer:
    """The scorer of an arm, which chooses the arm's share and has the arm's name."""
    scorer, share = find_scorer(arm.credit["scorer"]), arm.options["top_fraction"]
    chosen = lowest(scorer) if arm.credit.get("side") == "bottom" else scorer

    def choose(features: Features, rollouts: Rollouts, _: float) -> Boost:
        return chosen.choose(features, rollouts, share)

    return replace(chosen, name=arm.name, choose=choose)


def _groups(
    task: Task,
    plan: Plan,
    problems: Sequence[Problem],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Group]:
    groups = []
    for row, problem in enumerate(problems):
        ids = tokenizer.encode(problem.prompt)
        said = sample(
            model,
            tokenizer,
            ids,
            completions=plan.completions,
            max_new_tokens=task.max_new_tokens,
            temperature=1.0,
            seed=(SEED, row),
        )
        texts = tokenizer.batch_decode([list(one) for one in said], skip_special_tokens=True)
        rewards = tuple(float(task.is_solved(text, problem)) for text in texts)
        groups.append(Group(row=row, prompt_ids=tuple(ids), completions=said, rewards=rewards))
    return groups
