"""What do the presets cost, the default first?

One random Llama of 12 layers, one sequence, one thread, float32. `derivation`, the default, reads
all layers, and makes a backward pass, too; `decided` makes none. `paper` averages all heads of the
four middle layers, where the forward pass ends; `decision` does too, and traces from the rows that
choose the answer; `sharp` averages three in ten of these heads, weighted by the length of the
values they move. `forward` is the whole forward pass. The presets run through `trace_ids`, which
finds the answer and solves the flow, dense or streamed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import flowtracer_plugin as ft
from benchmarks.harness import Ways
from benchmarks.models import SMALL, build, device, forward, number_tokenizer

OURS = "derivation"
CASES = [
    {"tokens": 512, "mode": "dense"},
    {"tokens": 2048, "mode": "dense"},
    {"tokens": 2048, "mode": "streamed"},
]
TARGETS = ()
PRESETS = ("derivation", "decided", "paper", "decision", "sharp")


def ways(*, tokens: int, mode: str) -> Ways:
    model, tokenizer = build(SMALL).to(device()), number_tokenizer()
    ids = torch.randint(3, SMALL.vocab_size, (1, tokens), device=device())
    start, seen = tokens // 4, torch.ones_like(ids)
    rollout = ids[:, :start], ids[:, start:], seen[:, :start], seen[:, start:]

    def traced(preset: str) -> Callable[[], object]:
        tracer = ft.wrap(model, tokenizer, answer="last_number", preset=preset, mode=mode)
        tracer.reader.verify()
        return partial(tracer.trace_ids, *rollout)

    return {
        **{preset: traced(preset) for preset in PRESETS},
        "forward": lambda: forward(model, ids),
    }
