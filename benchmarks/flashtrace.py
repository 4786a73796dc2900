"""What does a trace cost compared with FlashTrace 0.1.1, on the same model and text?

Both read one forward pass of SmolLM2-135M-Instruct over the same tokens, a solution in lines that
ends with its answer: float32, one thread. Their results are similar, not the same:

* `trace` averages the attention of the middle layers to one graph of tokens, and solves the flow
  from question to answer. It gives a number for every token, and for every edge if asked. It does
  not run the part of the forward pass after the last of these layers.
* FlashTrace (0.1.1, https://github.com/wbopan/flashtrace) reads all layers, and weighs attention by
  what each head writes into the residual stream. It attributes reasoning and answer together to the
  prompt, then once more through the reasoning (one hop). It gives a number for every token, but
  none for edges.

So FlashTrace uses more of the model, and `trace` more of the text's structure. Seconds and MiB say
what each takes, not which is better. FlashTrace runs as its README says (see
`flashtrace_worker.py`), in both of its modes: it keeps the attention of all layers (the default),
or computes it again, layer by layer. It needs other libraries, so it runs in its own environment
(`make flashtrace`), in a process that takes turns with ours. `forward` is the plain model.

    FLOWTRACER_MODELS=folder python -m benchmarks flashtrace
"""

from __future__ import annotations

from pathlib import Path

import torch

import flowtracer_plugin as ft
from benchmarks.elsewhere import ROOT, Elsewhere
from benchmarks.harness import Target, Ways
from benchmarks.models import SMOLLM2, forward, load, pretrained
from benchmarks.texts import solution

OURS = "trace"
CASES = [{"tokens": tokens} for tokens in (300, 1000, 2000, 4000)]
TARGETS = [
    Target(other=other, measure=measure, ratio=0.2, where={"tokens": 1000})
    for other in ("flashtrace", "flashtrace_recompute")
    for measure in ("seconds", "peak_mb")
]
PYTHON = ROOT / ".venv-flashtrace" / "bin" / "python"


def ways(*, tokens: int) -> Ways:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    folder = pretrained(SMOLLM2)
    model, tokenizer = load(folder)
    text = solution(tokenizer, tokens)
    ids = torch.tensor([[*text.prompt_ids, *text.response_ids]])
    tracer = ft.wrap(model, tokenizer, preset="paper")
    return {
        "trace": lambda: tracer.trace_tokens(text.prompt_ids, text.response_ids),
        "forward": lambda: forward(model, ids),
        "flashtrace": _elsewhere(folder, tokens, "eager"),
        "flashtrace_recompute": _elsewhere(folder, tokens, "recompute"),
    }


def _elsewhere(folder: Path, tokens: int, mode: str) -> Elsewhere:
    if not PYTHON.exists():
        raise SystemExit(
            f"run 'make flashtrace' first: FlashTrace runs in {PYTHON}, which is missing"
        )
    worker = "benchmarks.flashtrace_worker"
    return Elsewhere([str(PYTHON), "-m", worker, str(folder), str(tokens), mode])
