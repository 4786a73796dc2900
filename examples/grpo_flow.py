"""GRPO with flow credit and a reward of your own: copy this file, and change it.

python examples/grpo_flow.py --config examples/gsm8k.yaml
accelerate launch examples/grpo_flow.py --config examples/gsm8k.yaml --learning_rate 2e-6

Without a reward of your own it is the command `flowtracer train`, with the same options.
"""

from __future__ import annotations

from typing import Any

from flowtracer_plugin.grpo.script import build_trainer, parse, train
from flowtracer_plugin.rewards import completion_text
from flowtracer_plugin.text.answers import find_answer


def asked_for(completions: list[Any], **columns: Any) -> list[float]:
    """A tenth of a point for an answer where the prompt asks for it, right or wrong."""
    texts = [completion_text(completion) or "" for completion in completions]
    return [0.1 * (find_answer(text, "hash") is not None) for text in texts]


if __name__ == "__main__":
    script_args, training_args, model_args = parse()
    trainer = build_trainer(script_args, training_args, model_args, reward_funcs=[asked_for])
    train(trainer)
