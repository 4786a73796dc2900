"""Which tokens stand out, and which are only blanks, marks of a template, or formatting."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from flowtracer_plugin.text.spans import Spans

KINDS = ("blank", "template", "format")
"""Kinds of tokens that say nothing themselves: nothing but spaces and line breaks; marks such as
`<|im_end|>`, `</think>` and `[INST]`, and prompt tokens outside the question; and marks of Markdown
and LaTeX, such as `**`, `##` and `\\[`."""

AUTO = "auto"

_MARK = re.compile(r"<[|\uff5c][^|\uff5c]*[|\uff5c]>|</?\w+>|\[/?[A-Z_]+\]")
_FORMAT = re.compile(r"[*_]{2,}|#+|`+|~{2,}|[-=]{3,}|:?-{2,}:?|\|+|\${2}|\\[\[\]()]")
_ABOVE = 1 + 1e-9  # equal scores have a mean that rounding may put below them


def of_kinds(
    tokens: Sequence[str], spans: Spans, kinds: Collection[str] = KINDS
) -> Bool[np.ndarray, " token"]:
    """Which tokens are of one of these kinds; a part of a character is of none."""
    found = np.zeros(len(tokens), bool)
    for place, (text, region) in enumerate(zip(tokens, spans.regions, strict=True)):
        found[place] = (
            ("blank" in kinds and text.isspace())
            or ("template" in kinds and (region == "prompt" or is_mark(text)))
            or ("format" in kinds and _is(_FORMAT, text))
        )
    return found


def is_mark(text: str) -> bool:
    """Whether a token is a mark such as `<s>` or `<|im_end|>`."""
    return _is(_MARK, text)


def _is(mark: re.Pattern[str], text: str) -> bool:
    return mark.fullmatch(text.strip()) is not None


def without_finding(
    kind: Bool[np.ndarray, " token"],
    throughput: Float[np.ndarray, " token"],
    among: Bool[np.ndarray, " token"],
) -> Bool[np.ndarray, " token"]:
    """The tokens of a kind, except those with more flow than all others `among` the tokens."""
    return kind & ~(throughput > throughput[among & ~kind].max(initial=0.0))


def standing_out(
    scores: Float[np.ndarray, " token"],
    throughput: Float[np.ndarray, " token"],
    tokens: Sequence[str],
    spans: Spans,
    *,
    within: str = "reasoning",
    skip: str = AUTO,
) -> Int[np.ndarray, " found"]:
    """The tokens with more than their even share of the score, the highest score first.

    The even share is the mean score of the tokens that are ranked: all, or those of the response
    outside answer and target, without those that `skip` names; see `TraceData.hubs`.

    Raises:
        ValueError: `within` or `skip` is not among the choices.
    """
    if within not in ("reasoning", "all"):
        raise ValueError(f"within must be 'reasoning' or 'all', got {within!r}")
    kinds = KINDS if skip == AUTO else tuple(filter(None, map(str.strip, skip.split(","))))
    if not set(kinds) <= set(KINDS):
        raise ValueError(
            f"skip must be 'auto' or some of {', '.join(KINDS)}, with commas between, got {skip!r}"
        )
    ranked = spans.response & ~spans.answer & ~spans.target
    ranked = np.ones_like(ranked) if within == "all" else ranked
    skipped = of_kinds(tokens, spans, kinds)
    ranked &= ~(without_finding(skipped, throughput, ranked) if skip == AUTO else skipped)
    even = scores[ranked].mean() if ranked.any() else 0.0
    order = np.argsort(-scores, kind="stable")
    return order[(ranked & (scores > even * _ABOVE))[order]]
