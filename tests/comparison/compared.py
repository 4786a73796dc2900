"""Traces with random attention, for the tests of comparisons."""

import numpy as np

from flowtracer_plugin.flow.solve import solve_flow
from flowtracer_plugin.options import FlowOptions
from flowtracer_plugin.text.spans import Spans
from flowtracer_plugin.trace.flow_trace import FlowTrace

PROMPT_TOKENS = ("<s>", "What", " is", " 3", " +", " 4", "?", "\n")
VOCABULARY: dict[str, int] = {}


def make_trace(response, *, answer=(-1,), prompt=PROMPT_TOKENS, seed=0, target=None, **changes):
    """A trace whose flow is solved on random attention; equal tokens have equal ids."""
    tokens, border = (*prompt, *response), len(prompt)
    length = len(tokens)
    rows = np.random.default_rng([seed, length]).random((length, length)) ** 3 + 1e-3
    attention = np.tril(rows) / np.tril(rows).sum(1, keepdims=True)
    question, found, ends = np.zeros((3, length), bool)
    question[1:border] = True
    found[list(answer)] = True
    ends[list(answer if target is None else target)] = True
    flow = solve_flow(attention, question, ends)
    spelled = "".join(tokens[at] for at in np.flatnonzero(found))
    return FlowTrace(
        token_ids=np.array([VOCABULARY.setdefault(one, len(VOCABULARY)) for one in tokens]),
        tokens=tokens,
        spans=Spans(
            prompt_length=border,
            question=question,
            answer=found,
            target=ends,
            rule="boxed",
            answer_text=spelled,
        ),
        attention=attention,
        reach=flow.reach,
        throughput=flow.throughput,
        **{"model": "tiny", "options": FlowOptions(), "layers": (2, 3), **changes},
    )


RIGHT = make_trace(("3", " +", " 4", " =", " 7", "\n", "It", " is", " 7"))
OTHER = make_trace(("3", " +", " 4", ".", "\n", "So", " 7"))
WRONG = make_trace(("3", " +", " 4", " =", " 8", "\n", "It", " is", " 8"), seed=1)
LATER = make_trace(("3", " +", " 5", "\n", "No", " 8"), seed=2)
GROUP, TRUTHS = [RIGHT, WRONG, OTHER, LATER, RIGHT], [True, False, True, False, True]
