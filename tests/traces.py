"""Traces with random attention, for the tests of pages, figures and files."""

from dataclasses import replace

import numpy as np

from flowtracer_plugin.flow.solve import solve_flow
from flowtracer_plugin.options import FlowOptions
from flowtracer_plugin.text.spans import Spans
from flowtracer_plugin.trace.flow_trace import FlowTrace
from tests.pages import HOSTILE


def make_trace(tokens, *, prompt=3, answer=(-2,), attention=None, **changes):
    """A trace whose flow is solved on random attention."""
    length = len(tokens)
    if attention is None:
        rows = np.random.default_rng(0).random((length, length)) ** 3 + 1e-3
        attention = np.tril(rows) / np.tril(rows).sum(1, keepdims=True)
    question, found = np.zeros(length, bool), np.zeros(length, bool)
    question[1:prompt] = True
    found[list(answer)] = True
    flow = solve_flow(attention, question, found)
    spans = {"rule": "boxed", "answer_text": tokens[answer[0]], **changes.pop("spans", {})}
    return FlowTrace(
        token_ids=np.arange(length),
        tokens=tuple(tokens),
        spans=Spans(prompt_length=prompt, question=question, answer=found, target=found, **spans),
        attention=attention,
        reach=flow.reach,
        throughput=flow.throughput,
        **{"model": "tiny", "options": FlowOptions(), "layers": (2, 3, 4), **changes},
    )


def hostile_trace():
    """A trace all of whose texts try to break out of HTML, XML, terminals or encodings."""
    return make_trace(
        ("<s>", "a", "b", *HOSTILE, "c", "7", "."),
        model=HOSTILE[0],
        options=FlowOptions(answer=HOSTILE[1]),
        spans={"rule": HOSTILE[2], "answer_text": HOSTILE[4] + HOSTILE[16]},
    )


def as_streamed(trace):
    """The trace as streaming would make it."""
    return replace(trace, attention=None, streamed=trace.backbone)
