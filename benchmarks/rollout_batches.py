"""What does it save to trace the rollouts of a training step in one batch?

`trace_ids` finds the answers of sixteen rollouts, half prompt and half completion, and solves their
flow: in one batch, or with `batch_size=1`. `forward` and `forward_each` are the forward passes
alone, in one batch and one by one, and show what can be saved. The models:

* `random`: a random Llama of twelve layers; rollouts fill their length.
* `reasoner`: the model of `examples/`, with its own stories and solutions, padded.
* `tiny`: the reasoner's shape with a longer context and random weights. In a model this small,
  calls cost more than arithmetic, as they do on a GPU.

On a CPU a batch saves time only where calls cost more than arithmetic. One of the weight matrices
of `random`, 512 × 1,376, takes 130 µs for a single row, 26 µs a row for 256 rows and 21 µs a row
for 4,096 rows (one thread, CPU time, beside other work): a text of 256 tokens is nearly as fast as
any batch can be. A large batch then loses what is left, since its activations do not fit in the
caches: a layer of SmolLM2-135M takes 180 µs a row in passes of 1,035 tokens, and 270 µs in passes
of 16,020. So `forward` takes as long as `forward_each`, and no `trace_ids` could make `batch`
faster here.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import flowtracer_plugin as ft
from benchmarks.harness import Target, Ways
from benchmarks.models import SMALL, build, device, forward, load, number_tokenizer
from examples.reasoner.problems import make_problems
from examples.reasoner.train import MODEL_DIR

OURS = "batch"
CASES = [
    {"model": "tiny", "tokens": 256},
    {"model": "random", "tokens": 256},
    {"model": "random", "tokens": 512},
    {"model": "reasoner", "tokens": 80},
]
TARGETS = [Target(other="one_by_one", measure="seconds", ratio=0.5, where={"tokens": 256})]

ROLLOUTS = 16

Rollouts = tuple[Tensor, Tensor, Tensor, Tensor]
"""Ids of prompts and completions, and their masks, as `trace_ids` takes them."""

Made = tuple[PreTrainedModel, PreTrainedTokenizerBase, Rollouts]


def ways(*, model: str, tokens: int, rollouts: int = ROLLOUTS) -> Ways:
    made = {"tiny": _tiny, "random": _random, "reasoner": _reasoner}[model](tokens, rollouts)
    network, tokenizer, batch = made
    tracer = ft.wrap(network, tokenizer, answer="last_number", preset="paper")
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
    config = AutoConfig.from_pretrained(MODEL_DIR)
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
    model, tokenizer = load(MODEL_DIR)
    problems = make_problems(rollouts, seed=0)
    padded = partial(tokenizer, padding="max_length", max_length=tokens // 2, return_tensors="pt")
    asked = padded([one.prompt for one in problems], padding_side="left").to(device())
    said = padded(
        [one.response for one in problems], padding_side="right", add_special_tokens=False
    ).to(device())
    rows = [part[name] for name in ("input_ids", "attention_mask") for part in (asked, said)]
    return model.to(device()), tokenizer, tuple(rows)
