"""Traces with random attention, for the tests of pages, figures and files."""

from dataclasses import replace

import numpy as np

from flowtracer_plugin.flow.solve import solve_flow
from flowtracer_plugin.options import FlowOptions
from flowtracer_plugin.text.spans import Spans
from flowtracer_plugin.trace.flow_trace import FlowTrace
from tests.pages import HOSTILE


def make_trace(tokens, *, prompt=3, answer=(-2,), target=None, attention=None, **changes):
    """A trace whose flow is solved on random attention."""
    length = len(tokens)
    if attention is None:
        rows = np.random.default_rng(0).random((length, length)) ** 3 + 1e-3
        attention = np.tril(rows) / np.tril(rows).sum(1, keepdims=True)
    question, found, ends = np.zeros((3, length), bool)
    question[1:prompt] = True
    found[list(answer)] = True
    ends[list(answer if target is None else target)] = True
    flow = solve_flow(attention, question, ends)
    masks = {"question": question, "answer": found, "target": ends}
    said = "".join(tokens[at] for at in np.flatnonzero(found))
    spans = {"rule": "boxed", "answer_text": said, **changes.pop("spans", {})}
    fields = {
        "token_ids": np.arange(length),
        "model": "tiny",
        "options": FlowOptions(),
        "layers": (2, 3, 4),
        **changes,
    }
    return FlowTrace(
        tokens=tuple(tokens),
        spans=Spans(prompt_length=prompt, **masks, **spans),
        attention=attention,
        reach=flow.reach,
        throughput=flow.throughput,
        **fields,
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
