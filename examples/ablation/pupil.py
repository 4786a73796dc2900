"""The policy that every run starts from: a tiny Llama, taught by a pupil's demonstrations."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from examples.ablation.task import Problem, Task
from examples.reasoner.train import build_model, tokenizer_of_pieces

SEED = 20260610
BATCH = 64
LEARNING_RATE = 4e-3
ANSWER_WEIGHT = 10.0
"""The answer is a few of many tokens, and reading it off the steps is learned last."""


def tokenizer_of(task: Task) -> PreTrainedTokenizerFast:
    """One token for each word, with the space before it."""
    return tokenizer_of_pieces([task.first_word, *(f" {word}" for word in task.words)], r" ?\S+")


def adapters(rank: int) -> LoraConfig:
    """What is trained of it, and audited."""
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)


def untaught(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """215,000 parameters."""
    torch.manual_seed(SEED)
    return build_model(tokenizer, width=64)


def teach(task: Task, folder: Path, steps: int | None = None) -> Path:
    """Imitate the pupil; the model and its tokenizer, in `folder`."""
    steps = task.taught if steps is None else steps
    tokenizer = tokenizer_of(task)
    model, rng = untaught(tokenizer), random.Random(SEED)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01
    )
    schedule = OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.1)
    model.train()
    bar = tqdm(range(steps), desc=f"teaching {task.name}", unit="step")
    for _ in bar:
        loss = _imitation(model, tokenizer, task, [task.draw(rng) for _ in range(BATCH)], rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    part = folder.with_name(f"{folder.name}.part")  # a folder of this name is whole
    model.eval().save_pretrained(part)
    tokenizer.save_pretrained(part)
    return part.rename(folder)


def _imitation(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    problems: list[Problem],
    rng: random.Random,
) -> Tensor:
    """The cross entropy of demonstrations. All texts of a task are equally long: nothing to pad."""
    texts = [problem.prompt + task.demonstrate(problem, rng) for problem in problems]
    ids = torch.tensor(tokenizer(texts)["input_ids"])
    ids = torch.cat([ids, torch.full((len(ids), 1), tokenizer.eos_token_id)], dim=1)
    start = len(tokenizer.encode(problems[0].prompt))
    logits = model(input_ids=ids).logits[:, start - 1 : -1]
    losses = cross_entropy(logits.flatten(0, 1), ids[:, start:].flatten(), reduction="none")
    weights = torch.ones(logits.shape[1])
    weights[-task.answer_tokens :] = ANSWER_WEIGHT
    return (losses.view(len(ids), -1) * weights).sum() / (weights.sum() * len(ids))
