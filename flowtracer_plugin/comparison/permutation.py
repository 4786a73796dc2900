"""How numbers differ between two groups of texts: means and a permutation test."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float

MOST_DEALS = 20_000
"""If there are more assignments of texts to sides than this, half this many are drawn at random."""

_BLOCK = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Sides:
    """Two groups of texts that are compared with each other.

    Attributes:
        names: The names of the two sides.
        first: Numbers of the texts of the first side.
        second: Numbers of the texts of the second side.
    """

    names: tuple[str, str]
    first: tuple[int, ...]
    second: tuple[int, ...]

    @property
    def members(self) -> tuple[int, ...]:
        """The texts of the first side, then those of the second."""
        return self.first + self.second

    @property
    def deals(self) -> int:
        """The number of ways to assign the texts to sides of these sizes."""
        return math.comb(len(self.members), len(self.first))

    @property
    def tried(self) -> int:
        """The number of these ways that a p-value is computed from."""
        return self.deals if self.deals <= MOST_DEALS else MOST_DEALS // 2

    @property
    def lowest_chance(self) -> float:
        """The lowest possible p-value: the actual sides count, as does an equal mirror image."""
        mirrored = self.tried == self.deals and len(self.first) == len(self.second)
        return (2 if mirrored else 1) / self.tried


def first_identical(
    texts: Sequence[Hashable], flows: Sequence[Float[np.ndarray, " _"]]
) -> tuple[int, ...]:
    """For each text the number of the first text that is identical and has the same flow.

    Sampling returns some texts several times. Copies always fall on the same side, so counting them
    would make the p-value too small.
    """
    known: dict[Hashable, list[int]] = {}
    found = []
    for number, (text, flow) in enumerate(zip(texts, flows, strict=True)):
        alike = known.setdefault(text, [])
        same = (at for at in alike if np.allclose(flows[at], flow, rtol=1e-3, atol=1e-6))
        found.append(next(same, number))
        if found[-1] == number:
            alike.append(number)
    return tuple(found)


def sides_by_truth(
    names: tuple[str, str], truths: Sequence[bool | None], same: Sequence[int]
) -> Sides | None:
    """The true texts and the false ones, without copies; None unless there are both.

    `same` is the result of `first_identical`.
    """
    first, second = (
        tuple(at for at, truth in enumerate(truths) if truth is side and same[at] == at)
        for side in (True, False)
    )
    return Sides(names=names, first=first, second=second) if first and second else None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Contrast:
    """The differences of several things between the sides.

    Attributes:
        first: Mean over the texts of the first side; without sides, the highest value.
        second: Mean over the texts of the second side; without sides, the lowest value.
        chance: The share of all assignments of texts to sides in which the thing differs at least
            as much as in the actual one; None without sides, and for two texts.
        chance_of_any: The share of assignments in which at least one of the things differs at least
            as much as this one does.
    """

    first: Float[np.ndarray, " thing"]
    second: Float[np.ndarray, " thing"]
    chance: Float[np.ndarray, " thing"] | None
    chance_of_any: Float[np.ndarray, " thing"] | None

    @property
    def difference(self) -> Float[np.ndarray, " thing"]:
        """First minus second."""
        return self.first - self.second

    def columns(self) -> list[dict[str, Any]]:
        """The numbers of each thing, by name, in plain Python."""
        names = ("first", "second", "chance", "chance_of_any")
        known = [
            [None] * len(self.first) if part is None else part.tolist()
            for part in (getattr(self, name) for name in names)
        ]
        return [dict(zip(names, numbers, strict=True)) for numbers in zip(*known, strict=True)]


def compare_sides(values: Float[np.ndarray, "text thing"], sides: Sides | None) -> Contrast:
    """The differences of `values`, with the p-values of an exact, two-sided permutation test.

    If there are more than `MOST_DEALS` assignments, a fixed sample of them is used, which includes
    the actual one (Phipson and Smyth 2010).
    """
    if sides is None:
        return Contrast(first=values.max(0), second=values.min(0), chance=None, chance_of_any=None)
    values, count = values[list(sides.members)].astype(float), len(sides.first)
    chance, of_any = _chances(values, count) if sides.deals > 2 else (None, None)
    return Contrast(
        first=values[:count].mean(0),
        second=values[count:].mean(0),
        chance=chance,
        chance_of_any=of_any,
    )


def _chances(
    values: Float[np.ndarray, "text thing"], count: int
) -> tuple[Float[np.ndarray, " thing"], Float[np.ndarray, " thing"]]:
    deals = _deals(len(values), count)
    # Sums in another order round differently, and an equal difference must not be missed.
    least = np.abs(deals[0] @ values) - 1e-9 * np.abs(values).max(0)
    hits, largest = np.zeros(values.shape[1]), []
    for start in range(0, len(deals), _BLOCK):
        found = np.abs(deals[start : start + _BLOCK] @ values)
        hits += (found >= least).sum(0)
        largest.append(found.max(1, initial=0.0))
    reached = len(deals) - np.searchsorted(np.sort(np.concatenate(largest)), least)
    return hits / len(deals), reached / len(deals)


def _deals(texts: int, count: int) -> Float[np.ndarray, "deal text"]:
    """The factors of the texts in the difference, by assignment; the actual one is first."""
    if math.comb(texts, count) <= MOST_DEALS:
        chosen = np.array(list(combinations(range(texts), count)))
    else:
        order = np.tile(np.arange(texts), (MOST_DEALS // 2, 1))
        order[1:] = np.random.default_rng(0).permuted(order[1:], axis=1)
        chosen = order[:, :count]
    deals = np.full((len(chosen), texts), -1 / (texts - count))
    np.put_along_axis(deals, chosen, 1 / count, 1)
    return deals
