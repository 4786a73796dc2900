"""Tiny training runs: what the loss was given, and the weights of the slow definitions."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import torch
from peft import LoraConfig

from flowtracer_plugin.grpo import FlowGRPOTrainer
from tests.credit.test_weights import slow_credit
from tests.flow import reference
from tests.grpo.worker import build, scripted, word_tokenizer
from tests.tiny import eager_attention

LOSSES = ("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "vespo", "luspo")
LAYERS = {"middle": (2, 3), "all": tuple(range(6)), "late:1": (4,)}
TEXTS = ["then 4 plus 3 is 7 apples so", "so 1 then #### 9", "is 2 <eos>", "so 8 then then 5 is"]
ANSWERS = [5, 4, 1, 4]
"""The place of the answer in each of `TEXTS`."""


def words(text):
    return word_tokenizer()(text)["input_ids"]


def name_of(options: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in options.items()) or "default"


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], **options)


def watched(trainer):
    """The inputs of the loss, call by call, as they are once the loss has used them."""
    seen: list[dict[str, Any]] = []
    compute = trainer._compute_loss

    def recorded(model, inputs):
        loss = compute(model, inputs)
        seen.append({name: deepcopy(value) for name, value in inputs.items()})
        return loss

    trainer._compute_loss = recorded
    return seen


def trained(policy, folder, kind=FlowGRPOTrainer, **options):
    """A trainer of this kind after three steps, and what its loss was given."""
    trainer = build(kind, policy, folder, **{"max_steps": 3, **options})
    seen = watched(trainer)
    trainer.train()
    return trainer, seen


def answering(policy, folder, texts=TEXTS, **options):
    """A trainer with flow credit whose completions are these texts in turn."""
    return build(FlowGRPOTrainer, policy, folder, rollout_func=scripted(texts), **options)


def forwards(trainer):
    """For each pass through the last layer that is read: whether it had gradients."""
    passes: list[bool] = []
    layer = trainer.model.get_submodule(
        next(name for name, _ in trainer.model.named_modules() if name.endswith("layers.3"))
    )
    layer.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    return passes


def same_parameters(one, other):
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def logged(trainer, name):
    return [step[f"flow/{name}"] for step in trainer.state.log_history if f"flow/{name}" in step]


def slow_flow(model, text, prompt, place, *, layers, target):
    """The throughput of a completion's words, by eager attention and the loops of `reference`."""
    asked, said = words(prompt), words(text)
    attention = eager_attention(model, asked + said, layers)
    tokens = np.arange(len(asked) + len(said))
    question = (tokens > 0) & (tokens < len(asked))
    wanted = tokens == len(asked) + place - (target == "decision")
    return reference.flow(attention.numpy(), question, wanted)["throughput"][len(asked) :]


def slow_weights(model, text, prompt, place, *, layers, target, chosen=None, **options):
    """The weights of one completion without padding, by their definition."""
    throughput = slow_flow(model, text, prompt, place, layers=layers, target=target)
    competing = np.ones(len(throughput)) if chosen is None else np.array(chosen, float)
    return slow_credit(throughput, competing, **options)
