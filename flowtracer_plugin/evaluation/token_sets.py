"""Which tokens are knocked out: a score's highest- and lowest-ranked ones, or random ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

BINS = 10
"""Parts of the candidates, by their distance to the answer."""

Mask = Bool[np.ndarray, " token"]
Scores = Float[np.ndarray, " token"]


def set_size(candidates: int, percent: int) -> int:
    """`⌈percent · candidates / 100⌉`.

    Examples:
        >>> set_size(70, 10), set_size(71, 10)
        (7, 8)
    """
    return -(-candidates * percent // 100)


def ranking(scores: Scores, among: Mask) -> Int[np.ndarray, " candidate"]:
    """Places of the candidates from the highest score to the lowest; ties keep their order."""
    places = np.flatnonzero(among)
    return places[np.argsort(-scores[places], kind="stable")]


def top_and_bottom(scores: Scores, among: Mask, counts: Sequence[int]) -> dict[str, list[Mask]]:
    """The highest- and the lowest-ranked candidates, by side, with a set for each count."""
    order = ranking(scores, among)

    def marked(places: Int[np.ndarray, " chosen"]) -> Mask:
        mask = np.zeros_like(among)
        mask[places] = True
        return mask

    return {
        "top": [marked(order[:count]) for count in counts],
        "bottom": [marked(order[len(order) - count :]) for count in counts],
    }


class ChosenSets(NamedTuple):
    """Sets of tokens that one score or control chose, from its `"top"` or its `"bottom"`."""

    score: str
    side: str
    masks: list[Mask]


def tops_and_bottoms(
    values: Mapping[str, Scores], among: Mask, counts: Sequence[int]
) -> list[ChosenSets]:
    """`top_and_bottom` of every score."""
    return [
        ChosenSets(name, side, masks)
        for name, scores in values.items()
        for side, masks in top_and_bottom(scores, among, counts).items()
    ]


def position_bins(among: Mask) -> Int[np.ndarray, " token"]:
    """The number of the tenth, by distance to the answer, of each candidate; −1 for other tokens.

    Tenths differ by at most one token in size.
    """
    number = among.cumsum() - 1
    return np.where(among, BINS * number // max(int(among.sum()), 1), -1)


CLASS_NAMES = ("number", "operator", "punctuation", "space", "word")
"""Classes of tokens."""

_OPERATORS = frozenset("-+*/=<>^%×÷−")


def token_classes(tokens: Sequence[str]) -> Int[np.ndarray, " token"]:
    """The class of each token: its place in `CLASS_NAMES`."""
    return np.array([_class(token) for token in tokens])


def _class(token: str) -> int:
    bare = token.strip()
    if any(char.isdecimal() for char in bare):
        name = "number"
    elif not bare:
        name = "space"
    elif _OPERATORS.issuperset(bare):
        name = "operator"
    else:
        words = any(char.isalnum() or char.isspace() or char == "_" for char in bare)
        name = "word" if words else "punctuation"
    return CLASS_NAMES.index(name)


def matched_draw(
    chosen: Int[np.ndarray, " chosen"],
    groups: Int[np.ndarray, " token"],
    rng: np.random.Generator,
) -> Mask:
    """Random tokens, as many of every group as were chosen from it; none of group −1."""
    drawn = np.zeros(len(groups), bool)
    for group, count in zip(*np.unique(groups[chosen], return_counts=True), strict=True):
        members = np.flatnonzero(groups == group)
        drawn[rng.choice(members, size=count, replace=False)] = True
    return drawn
