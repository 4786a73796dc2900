"""What does a trace cost beside one of FlashTrace 0.1.1, on the same model and text?

Both look into one forward pass of SmolLM2-135M-Instruct over the same tokens, a solution line by
line that ends with its answer: float32, one thread. What they find is akin, not the same:

* Ours reads the attention of the middle layers, averages it to one graph of tokens, and solves the
  flow from question to answer: a number for every token, for every edge between two of them if
  asked, and the part of the forward pass behind the last of these layers is not run.
* FlashTrace (0.1.1, https://github.com/wbopan/flashtrace) takes all layers, and weighs attention by
  what each head writes into the residual stream. It attributes reasoning and answer together to the
  prompt, then once more through the reasoning (one hop): a number for every token, but no edges.

So FlashTrace looks at more of the model, and ours at more of the text's structure; seconds and MiB
tell what each takes, not which is better. FlashTrace runs as its README says (see
`flashtrace_worker.py`), in both of its modes: it keeps the attention of all layers, by default, or
computes it again, layer by layer. It needs libraries of its own, so it has an environment of its
own (`make flashtrace`), and a process that takes turns with ours. `forward` is the plain model.

    FLOWTRACER_MODELS=folder python -m benchmarks flashtrace
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flowtracer_plugin as ft
from benchmarks.elsewhere import ROOT, Elsewhere
from benchmarks.harness import Target, Ways
from benchmarks.models import pretrained
from benchmarks.texts import solution

QUESTION = "What does a trace cost beside one of FlashTrace 0.1.1, on the same model and text?"
OURS = "trace"
CASES = [{"tokens": tokens} for tokens in (300, 1000, 2000, 4000)]
TARGETS = [
    Target(other=other, measure=measure, ratio=0.2, where={"tokens": 1000})
    for other in ("flashtrace", "flashtrace_recompute")
    for measure in ("seconds", "peak_mb")
]
MODEL = "SmolLM2-135M-Instruct"
PYTHON = ROOT / ".venv-flashtrace" / "bin" / "python"


def ways(*, tokens: int) -> Ways:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    folder = pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = solution(tokenizer, tokens)
    ids = torch.tensor([[*text.prompt_ids, *text.response_ids]])
    tracer = ft.wrap(model, tokenizer)
    return {
        "trace": lambda: tracer.trace_tokens(text.prompt_ids, text.response_ids),
        "forward": lambda: model(input_ids=ids, use_cache=False),
        "flashtrace": _elsewhere(folder, tokens, "eager"),
        "flashtrace_recompute": _elsewhere(folder, tokens, "recompute"),
    }


def _elsewhere(folder: Path, tokens: int, mode: str) -> Elsewhere:
    if not PYTHON.exists():
        raise SystemExit(f"this benchmark runs FlashTrace: 'make flashtrace' first, for {PYTHON}")
    worker = "benchmarks.flashtrace_worker"
    return Elsewhere([str(PYTHON), "-m", worker, str(folder), str(tokens), mode])
