"""Where does the time of a streamed trace go, beside the model's forward pass?

SmolLM2-135M-Instruct in float32, one text, preset paper, one run on one thread. Seconds are those
of the processor, not of the clock, so that other work on the machine counts less. Texts of more
than 8192 tokens are beyond the model's context, but only the cost matters here.

    FLOWTRACER_MODELS=folder OMP_NUM_THREADS=1 python -m benchmarks.streamed_profile 4096 8192

It prints JSON; `results/streamed_profile.json` holds what it printed before and after a change.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch

import flowtracer_plugin as ft
from benchmarks import harness
from benchmarks.long_sequences import smollm2
from benchmarks.models import number_tokenizer
from flowtracer_plugin.flow import streamed
from flowtracer_plugin.flow.likely_paths import LikelyPaths
from flowtracer_plugin.reading.reader import AttentionReader
from flowtracer_plugin.reading.rows import AttentionRows

STAGES: dict[str, tuple[Any, str]] = {
    "forward": (AttentionReader, "_run"),
    "rows": (AttentionRows, "__call__"),
    "paths": (LikelyPaths, "visit"),
    "edges": (streamed._EdgeSums, "visit"),
}
"""The method of each stage; none calls another."""


@contextmanager
def stages() -> Iterator[dict[str, float]]:
    """Seconds of each stage, which grow while the context is open."""
    taken = dict.fromkeys(STAGES, 0.0)

    def timed(stage: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            result = method(*args, **kwargs)
            taken[stage] += time.process_time() - started
            return result

        return call

    with ExitStack() as patches:
        for stage, (owner, name) in STAGES.items():
            method = timed(stage, getattr(owner, name))
            patches.enter_context(patch.object(owner, name, method))
        yield taken


def profile(tokens: int) -> dict[str, float]:
    """Seconds of each stage, and of everything else, in a trace of so many tokens."""
    ids = torch.randint(3, 1000, (tokens,), generator=torch.Generator()).tolist()
    named: dict[str, Any] = {
        "mode": "streamed",
        "answer": "last_number",
        "preset": "paper",
        "verify": False,
    }
    tracer = ft.wrap(smollm2(tokens), number_tokenizer(), **named)
    tracer.trace_tokens(ids[:100], ids[100:400])  # what only the first trace does
    with stages() as taken:
        started = time.process_time()
        tracer.trace_tokens(ids[: tokens // 4], ids[tokens // 4 :])
        whole = time.process_time() - started
    taken["rest"] = whole - sum(taken.values())
    found = {stage: round(seconds, 2) for stage, seconds in taken.items()}
    return {**found, "others : forward": round(whole / taken["forward"] - 1, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tokens", nargs="+", type=int)
    lengths = parser.parse_args().tokens
    rows = {f"{tokens} tokens": profile(tokens) for tokens in lengths}
    print(json.dumps({"machine": harness.machine(), "seconds": rows}, indent=1))


if __name__ == "__main__":
    main()
