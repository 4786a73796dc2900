"""GRPO with flow credit and your own reward: copy this file, and change it.

python examples/grpo_flow.py --config examples/gsm8k.yaml
accelerate launch examples/grpo_flow.py --config examples/gsm8k.yaml --learning_rate 2e-6

Options are those of the command `flowtracer train`, which does the same without your own reward.
"""

from __future__ import annotations

from typing import Any

from flowtracer_plugin.grpo.script import build_trainer, parse, train
from flowtracer_plugin.rewards import completion_text
from flowtracer_plugin.text.answers import find_answer


def asked_for(completions: list[Any], **columns: Any) -> list[float]:
    """A tenth of a point for an answer in the form that the prompt asks for, right or wrong."""
    texts = [completion_text(completion) or "" for completion in completions]
    return [0.1 * (find_answer(text, "hash") is not None) for text in texts]


if __name__ == "__main__":
    script_args, training_args, model_args = parse()
    trainer = build_trainer(script_args, training_args, model_args, reward_funcs=[asked_for])
    train(trainer)
