"""What does it save to trace the rollouts of a training step in one batch?

Sixteen rollouts, half prompt and half completion, go through `trace_ids`, which finds their answers
and solves the flow: all at once, or with `batch_size=1`. `random` is a Llama of twelve layers whose
rollouts fill their length; `reasoner` is that of `examples/`, with its own stories and solutions,
padded. `forward` and `forward_each` are the forward passes alone, at once and one by one: what
there is to save. `tiny` has the reasoner's shape, a longer context and random weights: in a model
as small as that, calls cost more than arithmetic, as they do on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import flowtracer_plugin as ft
from benchmarks.harness import Target, Ways
from benchmarks.models import SMALL, build, device, forward, number_tokenizer
from examples.reasoner.problems import make_problems

QUESTION = "What does it save to trace the rollouts of a training step in one batch?"
OURS = "batch"
CASES = [
    {"model": "tiny", "tokens": 256},
    {"model": "random", "tokens": 256},
    {"model": "random", "tokens": 512},
    {"model": "reasoner", "tokens": 80},
]
TARGETS = [Target(other="one_by_one", measure="seconds", ratio=0.5, where={"tokens": 256})]

ROLLOUTS = 16
REASONER = Path(__file__).parent.parent / "examples" / "reasoner" / "model"

Rollouts = tuple[Tensor, Tensor, Tensor, Tensor]
"""Ids of prompts and completions, and their masks, as `trace_ids` takes them."""

Made = tuple[PreTrainedModel, PreTrainedTokenizerBase, Rollouts]


def ways(*, model: str, tokens: int, rollouts: int = ROLLOUTS) -> Ways:
    made = {"tiny": _tiny, "random": _random, "reasoner": _reasoner}[model](tokens, rollouts)
    network, tokenizer, batch = made
    tracer = ft.wrap(network, tokenizer, answer="last_number")
    ids, mask = torch.cat(batch[:2], 1), torch.cat(batch[2:], 1)

    def forwards(rows: int) -> None:
        for start in range(0, rollouts, rows):
            part = slice(start, start + rows)
            forward(network, ids[part], attention_mask=mask[part])

    return {
        "batch": lambda: tracer.trace_ids(*batch),
        "one_by_one": lambda: tracer.trace_ids(*batch, batch_size=1),
        "forward": lambda: forwards(rollouts),
        "forward_each": lambda: forwards(1),
    }


def _tiny(tokens: int, rollouts: int) -> Made:
    config = AutoConfig.from_pretrained(REASONER)
    config.update({"vocab_size": SMALL.vocab_size, "max_position_embeddings": tokens})
    return _random(tokens, rollouts, config)


def _random(tokens: int, rollouts: int, config: PreTrainedConfig = SMALL) -> Made:
    tokenizer = number_tokenizer()
    model = build(config).to(device())
    first = len(tokenizer.all_special_ids)
    shape = (rollouts, tokens // 2)
    prompts, completions = torch.randint(first, SMALL.vocab_size, (2, *shape), device=device())
    seen = torch.ones(shape, dtype=torch.long, device=device())
    return model, tokenizer, (prompts, completions, seen, seen)


def _reasoner(tokens: int, rollouts: int) -> Made:
    tokenizer = AutoTokenizer.from_pretrained(REASONER)
    model = AutoModelForCausalLM.from_pretrained(REASONER, dtype=torch.float32).eval()
    problems = make_problems(rollouts, seed=0)
    asked = tokenizer([problem.prompt for problem in problems])["input_ids"]
    said = tokenizer([p.response for p in problems], add_special_tokens=False)["input_ids"]
    # Padded right and turned round, a row that runs backwards is padded left.
    prompts, prompt_mask = _padded([ids[::-1] for ids in asked], tokens // 2)
    completions, completion_mask = _padded(said, tokens // 2)
    rows = (prompts.flip(1), completions, prompt_mask.flip(1), completion_mask)
    return model.to(device()), tokenizer, rows


def _padded(rows: Sequence[Sequence[int]], width: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, padded on the right to `width`."""
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    return ids.to(device()), mask.to(device())
