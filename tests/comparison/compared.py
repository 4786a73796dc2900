"""Traces with random attention, for the tests of comparisons."""

import numpy as np

from tests import made_traces

PROMPT_TOKENS = ("<s>", "What", " is", " 3", " +", " 4", "?", "\n")
VOCABULARY: dict[str, int] = {}


def make_trace(response, *, answer=(-1,), prompt=PROMPT_TOKENS, seed=0, **changes):
    """A trace whose flow is solved on random attention; equal tokens have equal ids."""
    tokens = (*prompt, *response)
    rows = np.random.default_rng([seed, len(tokens)]).random((len(tokens),) * 2) ** 3 + 1e-3
    return made_traces.make_trace(
        tokens,
        prompt=len(prompt),
        answer=answer,
        attention=np.tril(rows) / np.tril(rows).sum(1, keepdims=True),
        token_ids=np.array([VOCABULARY.setdefault(one, len(VOCABULARY)) for one in tokens]),
        **changes,
    )


RIGHT = make_trace(("3", " +", " 4", " =", " 7", "\n", "It", " is", " 7"))
OTHER = make_trace(("3", " +", " 4", ".", "\n", "So", " 7"))
WRONG = make_trace(("3", " +", " 4", " =", " 8", "\n", "It", " is", " 8"), seed=1)
LATER = make_trace(("3", " +", " 5", "\n", "No", " 8"), seed=2)
GROUP, TRUTHS = [RIGHT, WRONG, OTHER, LATER, RIGHT], [True, False, True, False, True]
