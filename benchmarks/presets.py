"""What does the preset sharp cost?

One random Llama of 12 layers, one sequence, one thread, float32. `sharp` averages three in ten
heads of the four middle layers, weighted by the length of the values they move. `paper` averages
all heads; `decision` does too, and traces from the rows that choose the answer. `forward` is the
whole forward pass. The presets run through `trace_ids`, which finds the answer and solves the flow,
dense or streamed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import flowtracer_plugin as ft
from benchmarks.harness import Target, Ways
from benchmarks.models import SMALL, build, device, forward, number_tokenizer

OURS = "sharp"
CASES = [
    {"tokens": 512, "mode": "dense"},
    {"tokens": 2048, "mode": "dense"},
    {"tokens": 2048, "mode": "streamed"},
]
TARGETS = [
    Target(other="paper", measure="seconds", ratio=1.0, where={"mode": "dense"}),
    Target(other="paper", measure="seconds", ratio=1.0, where={"mode": "streamed"}),
]


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
        **{preset: traced(preset) for preset in ("sharp", "paper", "decision")},
        "forward": lambda: forward(model, ids),
    }
