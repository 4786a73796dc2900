"""Does a trace cost more than the forward pass that it reads?

One random Llama of 12 layers, one sequence, one thread, float32. The trace runs to the last of the
middle layers, and includes the flow. `output_attentions` is the eager model that keeps every
attention map.
"""

from __future__ import annotations

import torch

import flowtracer_plugin as ft
from benchmarks.graphs import ends
from benchmarks.harness import Target, Ways
from benchmarks.models import SMALL, build, device, forward

OURS = "trace"
CASES = [{"tokens": tokens} for tokens in (512, 2048, 4096)]
TARGETS = [
    Target(other="forward", measure="seconds", ratio=0.9),
    Target(other="output_attentions", measure="seconds", ratio=0.33, where={"tokens": 2048}),
    Target(other="output_attentions", measure="peak_mb", ratio=1 / 12, where={"tokens": 2048}),
    Target(other="output_attentions", measure="seconds", ratio=0.33, where={"tokens": 4096}),
    Target(other="output_attentions", measure="peak_mb", ratio=1 / 12, where={"tokens": 4096}),
]


def ways(*, tokens: int) -> Ways:
    ids = torch.randint(0, SMALL.vocab_size, (1, tokens), device=device())
    masks = [torch.from_numpy(mask)[None].to(device()) for mask in ends(tokens)]
    model, eager = build(SMALL).to(device()), build(SMALL, "eager").to(device())
    tracer = ft.wrap(model, preset="paper")
    return {
        "trace": lambda: ft.solve_flow(tracer.attention(ids), *masks),
        "forward": lambda: forward(model, ids),
        "output_attentions": lambda: forward(eager, ids, output_attentions=True),
    }
