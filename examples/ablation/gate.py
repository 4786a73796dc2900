"""Whether a task can tell ways to give credit apart at all, before any of them is looked at."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed

import flowtracer_plugin as ft
from examples.ablation.plan import ARMS, LEAST_ERRORS, LEAST_GAIN, Arm, Plan
from examples.ablation.task import Task
from flowtracer_plugin.audit_summary import AuditSummary, summarise_audit
from flowtracer_plugin.credit_audit import AuditOptions, audit
from flowtracer_plugin.policy_gradient import named_parameters
from flowtracer_plugin.sampling import Group, sample
from flowtracer_plugin.scorers import Boost, Scorer, find_scorer, lowest
from flowtracer_plugin.scores import Features, Rollouts

AUDIT_SEED = 1000
SHARE = 0.4
"""Of the tokens that get more credit, where an arm does not say; the paper's."""
ADAPTED = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def adapters(plan: Plan) -> LoraConfig:
    """What is trained, and audited."""
    return LoraConfig(r=plan.rank, lora_alpha=2 * plan.rank, target_modules=list(ADAPTED))


def audited(task: Task, plan: Plan, start: Path, *, progress: bool = True) -> AuditSummary:
    """How the credit of each arm turns the gradient of the policy that all runs start from."""
    set_seed(AUDIT_SEED)
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(start), adapters(plan))
    tracer = ft.wrap(model, tokenizer, answer=task.answer)
    rng = random.Random(AUDIT_SEED)
    groups = [_group(task, plan, model, tokenizer, row, rng) for row in range(plan.audited)]
    batches = audit(
        tracer,
        groups,
        [_scorer(arm) for arm in ARMS if arm.credit.get("scorer") != "uniform"],
        list(named_parameters(model, None).values()),
        AuditOptions(batches=plan.audited // plan.prompts, top_fraction=SHARE),
        oracle=task.what_matters,
        progress=progress,
    )
    return summarise_audit(list(batches), gammas=(1.5,))


def _scorer(arm: Arm) -> Scorer:
    """What an arm chooses by, and how much of it, under the arm's own name."""
    scorer = find_scorer(arm.credit.get("scorer", "flow"))
    chosen = lowest(scorer) if arm.credit.get("side") == "bottom" else scorer
    share = arm.credit.get("top_fraction", SHARE)

    def choose(features: Features, rollouts: Rollouts, _: float) -> Boost:
        return chosen.choose(features, rollouts, share)

    return replace(chosen, name=arm.name, choose=choose)


def _group(
    task: Task,
    plan: Plan,
    model: object,
    tokenizer: PreTrainedTokenizerBase,
    row: int,
    rng: random.Random,
) -> Group:
    problem = task.draw(rng)
    ids = tokenizer.encode(problem.prompt)
    said = sample(
        model,
        tokenizer,
        ids,
        completions=plan.completions,
        max_new_tokens=task.max_new_tokens,
        temperature=1.0,
        seed=(AUDIT_SEED, row),
    )
    texts = [tokenizer.decode(list(one), skip_special_tokens=True) for one in said]
    return Group(
        row=row,
        prompt_ids=tuple(ids),
        completions=said,
        rewards=tuple(float(task.is_solved(text, problem)) for text in texts),
    )


def passes(cosine: float, error: float, gain: float) -> bool:
    """Whether an oracle that raises these is enough for a comparison to say anything."""
    return cosine >= LEAST_ERRORS * error and gain >= LEAST_GAIN


def cosines(summary: AuditSummary) -> Mapping[str, dict[str, float]]:
    """By arm: what its credit adds to the cosine, the standard error, and what it chose."""
    return {
        one.scorer: {
            "cosine": one.differences[0].mean,
            "error": one.differences[0].error,
            "signal": one.signal,
            "noise": one.noise,
            "chosen": one.chosen,
        }
        for one in summary.scorers
    }
