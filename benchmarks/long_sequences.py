"""How do time and memory of a streamed trace grow with the text, up to 32,768 tokens?

One sequence through a random Llama in the shape of stories15M (6 layers, 6 heads, hidden size 288),
float32. `streamed` is a whole trace: forward pass to the last of the two middle layers, reach,
throughput, hubs, paths, steps and the strongest edges of every token. `dense` is the same with the
matrix of all pairs of tokens, `forward` the plain forward pass; both only up to 8192 tokens.

If FLOWTRACER_MODELS names a folder with SmolLM2-135M-Instruct, that is traced once at 32,768 tokens
as well, beyond its context: what its numbers mean there does not matter, what they cost does.
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
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

import flowtracer_plugin as ft
from benchmarks.growth import exponent
from benchmarks.harness import MIB, Case, Ways, measured, once, write
from benchmarks.models import build, device, forward, number_tokenizer, pretrained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flowtracer_plugin.trace.flow_trace import FlowTrace

QUESTION = "How do time and memory of a streamed trace grow with the text, up to 32,768 tokens?"
OURS = "streamed"
SHAPE, SMOLLM2 = "stories15M's shape", "SmolLM2-135M-Instruct"
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
"""The trace that was made last, for its page."""


def ways(*, model: str, tokens: int) -> Ways:
    network = _smollm2(tokens) if model == SMOLLM2 else build(CONFIG).to(device())
    tokenizer = number_tokenizer()
    first = len(tokenizer.all_special_ids)
    ids = torch.randint(first, CONFIG.vocab_size, (tokens,), generator=torch.Generator())
    parts = ids[: tokens // 4].tolist(), ids[tokens // 4 :].tolist()
    options = {"answer": "last_number", "verify": model != SMOLLM2}

    def trace(tracer: ft.FlowTracer) -> FlowTrace:
        last[:] = [tracer.trace_tokens(*parts)]
        return last[0]

    found = {"streamed": partial(trace, ft.wrap(network, tokenizer, mode="streamed", **options))}
    if tokens <= LONGEST_DENSE:
        found["dense"] = partial(trace, ft.wrap(network, tokenizer, mode="dense", **options))
        found["forward"] = partial(forward, network, ids[None].to(device()))
    return found


def _smollm2(tokens: int) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(pretrained(SMOLLM2), dtype=torch.float32)
    model.config.max_position_embeddings = tokens
    return model.eval().to(device())


def aside(ways: Ways, samples: Mapping[str, list[float]]) -> tuple[dict[str, Any], list[str]]:
    """How large the page of the trace is, and what was estimated to be needed."""
    with TemporaryDirectory() as folder:
        size = last[0].to_html(Path(folder) / "page.html").stat().st_size
    tracer = next(iter(ways.values())).args[0]
    estimate = tracer.estimate(len(last[0].tokens))
    return {}, [
        f"the page of the trace has {size / 1e6:.2f} MB",
        f"estimated before: {estimate.streamed / MIB:,.0f} MB streamed, "
        f"{estimate.dense / MIB:,.0f} MB dense",
    ]


def run(module: ModuleType, *, rounds: int = 5, cases: Sequence[Case] | None = None) -> Path:
    """As the harness, and the large model once, if it is there."""
    rows = []
    for case in tqdm(cases or CASES, desc="long_sequences", unit="case"):
        rows.append(measured(module, case, rounds=rounds))
        tqdm.write(f"{case}: {rows[-1]['seconds']}, {rows[-1]['peak_mb']}")
    if cases is None and "FLOWTRACER_MODELS" in os.environ:
        rows.append(once(module, LARGE, OURS))
    return write(module, rows, rounds=rounds)


def remarks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    curves = {
        measure: {
            row["case"]["tokens"]: row[measure][OURS]
            for row in rows
            if row["case"]["model"] == SHAPE and row["case"]["tokens"] >= 4096
        }
        for measure in ("seconds", "peak_mb")
    }
    time, memory = (exponent(curve) for curve in curves.values())
    return [
        f"from 4096 tokens on, time grows with exponent {time} (attention has to look at all pairs "
        f"of tokens: 2), memory with exponent {memory} (target: about 1)"
    ]


def plots(report: Mapping[str, Any]) -> dict[str, Figure]:
    """Time beside memory, of every way."""
    from benchmarks.plots import panels, tick

    rows = [row for row in report["rows"] if row["case"]["model"] == SHAPE]
    figure, panes = panels(2)
    for pane, (measure, label) in zip(
        panes, (("seconds", "seconds"), ("peak_mb", "peak megabytes")), strict=True
    ):
        for way in rows[0]["seconds"]:
            points = [(r["case"]["tokens"], r[measure][way]) for r in rows if way in r[measure]]
            pane.plot(*zip(*points, strict=True), "o-", label=way)
        pane.set(xlabel="tokens", ylabel=label)
        pane.legend()
        tick(pane, [row["case"]["tokens"] for row in rows])
    return {"long_sequences": figure}
