"""What is known of a task before any run: how often its policy is right, and what an audit says."""

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
from flowtracer_plugin.audit.policy_gradient import named_parameters
from flowtracer_plugin.audit.run import AuditOptions, audit
from flowtracer_plugin.audit.sampling import Group, sample
from flowtracer_plugin.audit.summary import AuditSummary, summarise_audit
from flowtracer_plugin.credit.measures import Features, Rollouts
from flowtracer_plugin.credit.scorers import Boost, Scorer, find_scorer, lowest

SEED = 1000
ASKED = 512
GAMMA = 1.5


def known(task: Task, plan: Plan, start: Path, *, progress: bool = True) -> dict[str, Any]:
    """Plain values, for a file."""
    audits = audited(task, plan, start, progress=progress).scorers
    return {
        "greedy": accuracy(task, start, greedy=True),
        "sampled": accuracy(task, start, greedy=False),
        "audit": {
            one.scorer: {
                "cosine": one.differences[0].mean,
                "error": one.differences[0].error,
                "chosen": one.chosen,
            }
            for one in audits
        },
    }


def accuracy(task: Task, start: Path, *, greedy: bool) -> float:
    """Of the policy that all runs start from, over 512 problems."""
    set_seed(SEED)
    rng = random.Random(SEED)
    problems = [task.draw(rng) for _ in range(ASKED)]
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForCausalLM.from_pretrained(start)
    prompts = tokenizer([problem.prompt for problem in problems], return_tensors="pt", padding=True)
    choice = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0}
    said = model.generate(**prompts, **choice, max_new_tokens=task.max_new_tokens)
    start_of_said = prompts["input_ids"].shape[1]
    texts = tokenizer.batch_decode(said[:, start_of_said:], skip_special_tokens=True)
    return sum(map(task.is_solved, texts, problems)) / ASKED


def audited(task: Task, plan: Plan, start: Path, *, progress: bool = True) -> AuditSummary:
    """How the credit of each arm turns the gradient of the policy that all runs start from."""
    set_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(start)
    base = AutoModelForCausalLM.from_pretrained(start)
    model = get_peft_model(base, adapters(plan.rank))
    tracer = ft.wrap(model, tokenizer, answer=task.answer)
    rng = random.Random(SEED)
    problems = [task.draw(rng) for _ in range(plan.audited)]
    batches = audit(
        tracer,
        _groups(task, plan, problems, model, tokenizer),
        [_scorer(arm) for arm in ARMS if arm.credit.get("scorer") != "uniform"],
        list(named_parameters(model, None).values()),
        AuditOptions(batches=plan.audited // plan.prompts, top_fraction=SHARE),
        oracle=task.what_matters,
        progress=progress,
    )
    return summarise_audit(list(batches), gammas=(GAMMA,))


def _scorer(arm: Arm) -> Scorer:
    """What an arm chooses by, and how much of it, under the arm's own name."""
    scorer = find_scorer(arm.credit.get("scorer", "flow"))
    chosen = lowest(scorer) if arm.credit.get("side") == "bottom" else scorer
    share = arm.credit.get("top_fraction", SHARE)

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
