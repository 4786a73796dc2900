"""FlashTrace in its own Python environment; `benchmarks/flashtrace.py` starts this process.

    python -m benchmarks.flashtrace_worker MODEL TOKENS (eager | recompute)

It runs as its README says: `load_model_and_tokenizer`, then `trace` with the README's chunk sizes,
one hop, and the spans of reasoning and answer. Two choices depend on transformers' version. To keep
attention it needs `attn_implementation="eager"`, without which transformers 5 returns none; to
recompute attention, the model runs on its default, SDPA.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import TextIO

import psutil
import torch
from flashtrace import FlashTrace, load_model_and_tokenizer

from benchmarks.harness import peak_of
from benchmarks.texts import solution

SHARE_OF_MEMORY = 0.9
"""Limit, as a share of free memory at the start, so that the system kills no other process."""


def flashtrace(folder: str, tokens: int, mode: str) -> Callable[[], None]:
    """A function that makes one trace, and checks that the trace is complete."""
    torch.set_num_threads(1)
    chosen = {"attn_implementation": "eager"} if mode == "eager" else {}
    model, tokenizer = load_model_and_tokenizer(folder, device_map=None, dtype="float32", **chosen)
    tracer = FlashTrace(
        model,
        tokenizer,
        chunk_tokens=128,
        sink_chunk_tokens=32,
        recompute_attention=mode == "recompute",
    )
    text = solution(tokenizer, tokens)

    def way() -> None:
        trace = tracer.trace(
            prompt=text.prompt,
            target=text.response,
            reasoning_span=(0, text.answer[0] - 1),
            output_span=text.answer,
            hops=1,
        )
        assert len(trace.prompt_tokens) + len(trace.generation_tokens) == tokens
        assert len(trace.per_hop_scores) == 2  # the span itself, and one hop
        assert sum(trace.scores) > 0

    return way


def serve(way: Callable[[], object], answers: TextIO) -> None:
    """Answer each line of the input, until it ends."""
    print(json.dumps({"ok": None}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(way, line.strip())), file=answers, flush=True)


def _answer(way: Callable[[], object], what: str) -> dict[str, object]:
    try:
        return {"ok": round(peak_of(way), 1) if what == "peak" else way()}
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
        return {"unbearable": f"needs more than {limit / 2**30:.0f} GiB of memory"}


def main() -> None:
    folder, tokens, mode = sys.argv[1:]
    free = int(psutil.virtual_memory().available * SHARE_OF_MEMORY)
    resource.setrlimit(resource.RLIMIT_DATA, (free, free))
    # Only answers go to the output; whatever a library prints goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(flashtrace(folder, int(tokens), mode), answers)


if __name__ == "__main__":
    main()
