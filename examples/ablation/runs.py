"""One run: GRPO from the taught policy, with one arm's credit and one seed."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

from examples.ablation.plan import Arm, Plan
from examples.ablation.pupil import adapters
from examples.ablation.task import Problem, Task
from flowtracer_plugin.grpo import CreditOptions, attach_flow_credit


def rewards_of(
    task: Task, arm: Arm, plan: Plan, *, seed: int, learning_rate: float, start: Path
) -> list[float]:
    """The mean reward of every step, before its update. Arms of one seed share their prompts.

    Args:
        task: The source of problems.
        arm: The way to give credit.
        plan: Settings that all runs share.
        seed: Seed of the prompts and of all random draws.
        learning_rate: Learning rate without the arm's factor.
        start: Folder of the policy to start from.
    """
    set_seed(seed)
    rng = random.Random(seed)
    problems = [task.draw(rng) for _ in range(plan.steps * plan.prompts)]
    with TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(start),
            processing_class=AutoTokenizer.from_pretrained(start),
            reward_funcs=_reward(task),
            train_dataset=Dataset.from_list([asdict(problem) for problem in problems]),
            args=_settings(task, plan, seed, learning_rate * arm.learning_rate, folder),
            peft_config=adapters(plan.rank),
        )
        attach_flow_credit(trainer, credit_of(task, arm))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [log["reward"] for log in trainer.state.log_history if "reward" in log]


def _reward(task: Task) -> Any:
    def solved(
        prompts: list[str], completions: list[str], answer: list[str], **_: Any
    ) -> list[float]:
        problems = [
            Problem(prompt=prompt, answer=right)
            for prompt, right in zip(prompts, answer, strict=True)
        ]
        return [float(one) for one in map(task.is_solved, completions, problems)]

    return solved


def _settings(task: Task, plan: Plan, seed: int, learning_rate: float, folder: str) -> GRPOConfig:
    return GRPOConfig(
        output_dir=folder,
        max_steps=plan.steps,
        per_device_train_batch_size=plan.prompts * plan.completions,
        num_generations=plan.completions,
        max_completion_length=task.max_new_tokens,
        learning_rate=learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=plan.warmup,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        seed=seed,
    )


def credit_of(task: Task, arm: Arm) -> CreditOptions:
    wanted = arm.options
    oracle = task.what_matters if wanted.get("scorer") == "oracle" else None
    return CreditOptions(answer=task.answer, oracle=oracle, page_steps=0, **wanted)
