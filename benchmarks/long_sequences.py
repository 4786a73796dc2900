"""How do time and memory of a streamed trace grow with the text, up to 32,768 tokens?

One sequence through a random Llama in the shape of stories15M (6 layers, 6 heads, hidden size 288),
float32. `streamed` is a whole trace: forward pass to the last of the two middle layers, reach,
throughput, hubs, paths, steps and the strongest edges of every token. `dense` is the same with the
matrix of all pairs of tokens, `forward` the plain forward pass; both only up to 8192 tokens.

If FLOWTRACER_MODELS names a folder with SmolLM2-135M-Instruct, this model is also traced once, at
32,768 tokens. That is beyond its context, but only the cost matters here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig

import flowtracer_plugin as ft
from benchmarks.growth import curves, exponent, plot
from benchmarks.harness import MIB, Report, Row, Ways, once, rows_of, write
from benchmarks.models import (
    SMOLLM2,
    build,
    device,
    forward,
    load,
    number_tokenizer,
    pretrained,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flowtracer_plugin.trace.flow_trace import FlowTrace

OURS = "streamed"
SHAPE = "stories15M's shape"
CASES = [{"model": SHAPE, "tokens": tokens} for tokens in (2048, 4096, 8192, 16384, 32768)]
LARGE = {"model": SMOLLM2, "tokens": 32768}
TARGETS = ()

LONGEST_DENSE = 8192
CONFIG = LlamaConfig(
    vocab_size=1000,
    hidden_size=288,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=6,
    max_position_embeddings=LARGE["tokens"],
)

last: list[FlowTrace] = []
"""The latest trace, for its page."""


def ways(*, model: str, tokens: int) -> Ways:
    network = smollm2(tokens) if model == SMOLLM2 else build(CONFIG).to(device())
    tokenizer = number_tokenizer()
    first = len(tokenizer.all_special_ids)
    ids = torch.randint(first, CONFIG.vocab_size, (tokens,), generator=torch.Generator())
    parts = ids[: tokens // 4].tolist(), ids[tokens // 4 :].tolist()
    options = {"answer": "last_number", "verify": model != SMOLLM2}

    def trace(tracer: ft.FlowTracer) -> FlowTrace:
        last[:] = [tracer.trace_tokens(*parts)]
        return last[0]

    found = {
        "streamed": partial(
            trace, ft.wrap(network, tokenizer, mode="streamed", **options, preset="paper")
        )
    }
    if tokens <= LONGEST_DENSE:
        found["dense"] = partial(
            trace, ft.wrap(network, tokenizer, mode="dense", **options, preset="paper")
        )
        found["forward"] = partial(forward, network, ids[None].to(device()))
    return found


def smollm2(tokens: int) -> torch.nn.Module:
    """SmolLM2-135M-Instruct, made to accept so many positions."""
    model, _ = load(pretrained(SMOLLM2))
    model.config.max_position_embeddings = tokens
    return model.to(device())


def aside(ways: Ways, samples: Mapping[str, list[float]]) -> tuple[dict[str, Any], list[str]]:
    """Notes on the size of the trace's page, and on the estimated memory."""
    with TemporaryDirectory() as folder:
        size = last[0].to_html(Path(folder) / "page.html").stat().st_size
    tracer = next(iter(ways.values())).args[0]
    estimate = tracer.estimate(len(last[0].tokens))
    return {}, [
        f"the page of the trace has {size / 1e6:.2f} MB",
        f"estimated before: {estimate.streamed / MIB:,.0f} MB streamed, "
        f"{estimate.dense / MIB:,.0f} MB dense",
    ]


def run(module: ModuleType, *, rounds: int) -> Path:
    """Measure as the harness does, and the pretrained model once, if it is available."""
    rows = rows_of(module, rounds=rounds)
    if "FLOWTRACER_MODELS" in os.environ:
        rows.append(once(module, LARGE, OURS))
    return write(module, rows, rounds=rounds)


def remarks(rows: Sequence[Row]) -> list[str]:
    long = [row for row in _of_shape(rows) if row["case"]["tokens"] >= 4096]
    time, memory = (
        exponent(curves(long, "tokens", measure)[OURS]) for measure in ("seconds", "peak_mb")
    )
    return [
        f"from 4096 tokens on, time grows with exponent {time} (attention has to look at all pairs "
        f"of tokens: 2), memory with exponent {memory} (target: about 1)"
    ]


def plots(report: Report) -> dict[str, Figure]:
    return {"long_sequences": plot(_of_shape(report["rows"]), "tokens", slopes=False)}


def _of_shape(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["case"]["model"] == SHAPE]
