"""FlashTrace, run in the Python that it is installed in; `benchmarks/flashtrace.py` drives it.

    python -m benchmarks.flashtrace_worker MODEL TOKENS (eager | recompute)

It is used as its README says: `load_model_and_tokenizer`, then `trace` with the README's numbers of
tokens in a chunk, one hop, and the spans of reasoning and answer. Two things the README leaves to
transformers' version: attention that is kept takes `attn_implementation="eager"`, without which
transformers 5 hands none over; where it is recomputed, the model runs on its default, SDPA.
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
"""Of what is free at the start: beyond it the way is unbearable, and nobody else is killed."""


def flashtrace(folder: str, tokens: int, mode: str) -> Callable[[], None]:
    """One whole trace; it is checked to be one, since an attribution of nothing would be fast."""
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
    # Answers alone go to the output: whatever a library prints goes to the terminal.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(flashtrace(folder, int(tokens), mode), answers)


if __name__ == "__main__":
    main()
