"""The policy that every run starts from: a tiny model that imitates a pupil's demonstrations."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from examples.ablation.task import Family, Task
from examples.reasoner.train import CONTEXT_LENGTH, build_model, minimise, tokenizer_of_pieces

SEED = 20260610
BATCH = 64
LEARNING_RATES: Mapping[Family, float] = MappingProxyType({"llama": 4e-3, "qwen3": 2e-3})
ANSWER_WEIGHT = 10.0
"""Weight of the answer's few tokens in the loss: copying them from the steps is learned last."""


def tokenizer_of(task: Task) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word and the space before it."""
    return tokenizer_of_pieces([task.first_word, *(f" {word}" for word in task.words)], r" ?\S+")


def adapters(rank: int) -> LoraConfig:
    """The LoRA that is trained and audited."""
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)


def _llama(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """215,000 parameters in four layers."""
    return build_model(tokenizer, width=64)


def _qwen3(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """448,000 parameters in three layers, twice as wide, with two query heads for each key head."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config)


FAMILIES: Mapping[Family, Callable[[PreTrainedTokenizerFast], PreTrainedModel]] = MappingProxyType(
    {"llama": _llama, "qwen3": _qwen3}
)
"""Functions from a tokenizer to an untaught policy."""


def teach(task: Task, folder: Path, steps: int | None = None) -> Path:
    """Train a policy of the task's family to imitate the pupil, and save it in `folder`."""
    steps = task.taught if steps is None else steps
    tokenizer = tokenizer_of(task)
    torch.manual_seed(SEED)
    model, rng = FAMILIES[task.family](tokenizer), random.Random(SEED)
    losses = (_imitation(model, tokenizer, task, rng) for _ in range(steps))
    title = f"teaching {task.name}"
    minimise(losses, model, steps=steps, learning_rate=LEARNING_RATES[task.family], title=title)
    part = folder.with_name(f"{folder.name}.part")  # renamed only when it is complete
    model.eval().save_pretrained(part)
    tokenizer.save_pretrained(part)
    return part.rename(folder)


def _imitation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: Task, rng: random.Random
) -> Tensor:
    """The cross entropy of a batch of demonstrations, which are equally long: nothing to pad."""
    problems = [task.draw(rng) for _ in range(BATCH)]
    texts = [problem.prompt + task.demonstrate(problem, rng) for problem in problems]
    ids = torch.tensor(tokenizer(texts)["input_ids"])
    ids = torch.cat([ids, torch.full((len(ids), 1), tokenizer.eos_token_id)], dim=1)
    start = len(tokenizer.encode(problems[0].prompt))
    logits = model(input_ids=ids).logits[:, start - 1 : -1]
    losses = cross_entropy(logits.flatten(0, 1), ids[:, start:].flatten(), reduction="none")
    weights = torch.ones(logits.shape[1])
    weights[-task.answer_tokens :] = ANSWER_WEIGHT
    return (losses.view(len(ids), -1) * weights).sum() / (weights.sum() * len(ids))
