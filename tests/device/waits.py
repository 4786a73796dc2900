"""How often the host waits for the device: each piece of work done twice, and what it may wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import flowtracer_plugin as ft
from flowtracer_plugin.options import flow_options
from flowtracer_plugin.reading.reader import AttentionReader
from tests.device.paths import graph, rollouts
from tests.device.simulated import DEVICE, Wait, placed, simulated
from tests.device.training import Steps
from tests.tiny import PROMPT, RESPONSE, tiny_llama, tiny_tokenizer

Work = Callable[[], Any]

LENGTHS = (64, 600)
"""Tokens of a short text and of one that takes several blocks of rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """How often the host waited.

    Attributes:
        first: In the first run, which also checks the model, by lines of this package.
        ours: In the second run, by lines of this package.
        others: In the second run, by other libraries' lines, such as those of the model.
        places: The package's lines of the second run.
    """

    first: int
    ours: int
    others: int
    places: tuple[Wait, ...]


@contextmanager
def training(**options: Any) -> Iterator[Work]:
    """A step of GRPO."""
    with TemporaryDirectory() as folder:
        steps = Steps(Path(folder), placed, **options)
        with patch.object(type(steps.trainer.accelerator), "device", DEVICE):
            yield steps


@cache
def _reader() -> AttentionReader:
    return AttentionReader(
        placed(tiny_llama(num_hidden_layers=2, max_position_embeddings=1024)), backend="interface"
    )


def _tracer(preset: str, mode: str = "auto") -> ft.FlowTracer:
    return ft.FlowTracer(_reader(), tiny_tokenizer(), flow_options(preset), "auto", mode)


@contextmanager
def tracing(preset: str, mode: str = "dense", tokens: int = LENGTHS[0]) -> Iterator[Work]:
    """A trace of a text with about so many tokens."""
    made, words = _tracer(preset, mode), tiny_tokenizer()(PROMPT)["input_ids"]
    response = tiny_tokenizer()(RESPONSE, add_special_tokens=False)["input_ids"]
    prompt = (words * tokens)[: tokens - len(response)]
    yield lambda: made.trace_tokens(prompt, response)


@contextmanager
def looking(preset: str) -> Iterator[Work]:
    """The backbone of a trace that was made before, and of nothing else of it."""
    with tracing(preset) as work:
        trace = work()
        yield lambda: trace._backbone(10)


@contextmanager
def batch(preset: str) -> Iterator[Work]:
    """Padded rollouts, one of them without an answer."""
    made, given = _tracer(preset), placed(list(rollouts()))
    yield lambda: made.trace_ids(*given)


@contextmanager
def solving() -> Iterator[Work]:
    """The flow alone."""
    given = placed(list(graph("batched")))
    yield lambda: ft.solve_flow(*given)


WORK: Mapping[str, tuple[Callable[[], Any], int]] = {
    "GRPO step, training pass": (partial(training, flow_pass="training"), 3),
    "GRPO step, extra pass": (partial(training, flow_pass="extra"), 3),
    "GRPO generation, scoring pass": (partial(training, flow_pass="scoring", num_iterations=2), 4),
    "GRPO step, `attention`": (partial(training, flow_scorer="attention"), 2),
    "GRPO step, `flow:decided`": (partial(training, flow_scorer="flow:decided"), 3),
    "GRPO step, `flow:derivation`": (partial(training, flow_scorer="flow:derivation"), 3),
    "GRPO step, `flow:sharp`": (partial(training, flow_scorer="flow:sharp"), 5),
    "solve_flow": (solving, 1),
    "trace_ids, paper": (partial(batch, "paper"), 2),
    "trace_ids, derivation": (partial(batch, "derivation"), 4),
    "trace, paper": (partial(tracing, "paper"), 2),
    "trace, sharp": (partial(tracing, "sharp"), 4),
    "trace, decided": (partial(tracing, "decided"), 2),
    "trace, derivation": (partial(tracing, "derivation"), 3),
    "backbone of a trace": (partial(looking, "paper"), 10),
    **{
        f"streamed trace, {preset}, {tokens} tokens": (
            partial(tracing, preset, "streamed", tokens),
            11,
        )
        for preset in ("paper", "derivation")
        for tokens in LENGTHS
    },
}
"""Each piece of work, and the most waits of the package after the first run: its budget."""


def count(name: str) -> Counted:
    """The waits of a piece of work."""
    start, _ = WORK[name]
    with simulated() as waits, start() as work:
        found = []
        for _ in range(2):
            waits.clear()
            work()
            found.append(tuple(waits))
    first, second = ([wait for wait in run if wait.place] for run in found)
    others = len(found[1]) - len(second)
    return Counted(first=len(first), ours=len(second), others=others, places=tuple(second))
