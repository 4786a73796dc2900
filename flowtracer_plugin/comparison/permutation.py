"""How numbers differ between two groups of texts: means and a permutation test."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

MOST_DEALS = 20_000
"""If there are more assignments of texts to sides than this, half this many are drawn at random."""

LEAST_DEALS, DEALT = 1_000, 200_000_000
"""Of very many texts, fewer assignments are drawn: as many as deal this many texts in all."""

MANY = 10**15
"""Assignments are not counted further; their number would have thousands of digits."""

_BLOCK, _CELLS = 256, 2**22
"""Assignments that are tried at once, and the factors that they may have together."""

_ROUNDED = 1e-6
"""Values that differ by a smaller share are equal: traces are in single precision."""

Values = Float[np.ndarray, "text thing"] | sparse.csr_array
"""What is compared: a row for each text. Words are sparse, since a text has few of them."""


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
        """The number of ways to assign the texts to sides of these sizes, at most `MANY`."""
        found = 1
        for taken in range(min(len(self.first), len(self.second))):
            found = found * (len(self.members) - taken) // (taken + 1)
            if found >= MANY:
                return MANY
        return found

    @property
    def counted(self) -> bool:
        """Whether `deals` is exact."""
        return self.deals < MANY

    @property
    def tried(self) -> int:
        """The number of these ways that a p-value is computed from."""
        if self.deals <= MOST_DEALS:
            return self.deals
        return max(LEAST_DEALS, min(MOST_DEALS // 2, DEALT // len(self.members)))

    @property
    def lowest_p(self) -> float:
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
        p: The share of all assignments of texts to sides in which the thing differs at least as
            much as in the actual one; None without sides, and for two texts.
        p_corrected: The same, corrected for the number of things: the share of assignments in
            which at least one of them differs at least as much as this one does.
    """

    first: Float[np.ndarray, " thing"]
    second: Float[np.ndarray, " thing"]
    p: Float[np.ndarray, " thing"] | None
    p_corrected: Float[np.ndarray, " thing"] | None

    @property
    def difference(self) -> Float[np.ndarray, " thing"]:
        """First minus second."""
        return self.first - self.second

    def columns(self) -> list[dict[str, Any]]:
        """The numbers of each thing, by name, in plain Python."""
        names = ("first", "second", "p", "p_corrected")
        known = [
            [None] * len(self.first) if part is None else part.tolist()
            for part in (getattr(self, name) for name in names)
        ]
        return [dict(zip(names, numbers, strict=True)) for numbers in zip(*known, strict=True)]


def compare_sides(values: Values, sides: Sides | None) -> Contrast:
    """The differences of `values`, with the p-values of an exact, two-sided permutation test.

    All values have one unit. If there are more than `MOST_DEALS` assignments, a fixed sample of
    them is used, which includes the actual one (Phipson and Smyth 2010).
    """
    if sides is None:
        first, second = (_extremes(values, name) for name in ("max", "min"))
        return Contrast(first=first, second=second, p=None, p_corrected=None)
    values, count = values[list(sides.members)].astype(float), len(sides.first)
    p, corrected = _p_values(values, sides) if sides.deals > 2 else (None, None)
    return Contrast(
        first=values[:count].mean(0), second=values[count:].mean(0), p=p, p_corrected=corrected
    )


def compare_measures(values: Float[np.ndarray, "text measure"], sides: Sides | None) -> Contrast:
    """The differences of measures of several units, as `compare_sides` finds them.

    For `p_corrected`, differences count in standard deviations over the texts of both sides.
    """
    if sides is None:
        return compare_sides(values, None)
    spread = spreads(values, sides)
    # The same for all texts, apart from rounding, which must not look like a difference.
    values = np.where(spread > 0, values, values[sides.first[0]])
    units = np.where(spread > 0, spread, 1.0)
    found = compare_sides(values / units, sides)
    return replace(found, first=found.first * units, second=found.second * units)


def spreads(
    values: Float[np.ndarray, "text measure"], sides: Sides
) -> Float[np.ndarray, " measure"]:
    """The standard deviation of each measure over the texts of both sides; 0 if all are equal."""
    values = values[list(sides.members)].astype(float)
    spread = values.std(0)
    return np.where(spread > _ROUNDED * np.abs(values).max(0), spread, 0.0)


def effects(
    values: Float[np.ndarray, "text measure"], sides: Sides
) -> Float[np.ndarray, " measure"]:
    """The differences of the means, first minus second, in standard deviations."""
    first, second = (values[list(side)].mean(0) for side in (sides.first, sides.second))
    spread = spreads(values, sides)
    return np.where(spread > 0, (first - second) / np.where(spread > 0, spread, 1.0), 0.0)


def _extremes(values: Values, name: str) -> Float[np.ndarray, " thing"]:
    found: Any = getattr(values, name)(0)
    return found if isinstance(found, np.ndarray) else found.toarray().ravel()


def _p_values(
    values: Values, sides: Sides
) -> tuple[Float[np.ndarray, " thing"], Float[np.ndarray, " thing"]]:
    # Sums in another order round differently, and an equal difference must not be missed.
    tolerance = 1e-9 * np.maximum(_extremes(values, "max"), -_extremes(values, "min"))
    hits, largest = np.zeros(values.shape[1]), list[Float[np.ndarray, " deal"]]()
    for block in _deals(sides):
        found = np.abs(block @ values)
        if not largest:  # the actual sides come first
            least = found[0] - tolerance
        hits += (found >= least).sum(0)
        largest.append(found.max(1, initial=0.0))
    reached = sides.tried - np.searchsorted(np.sort(np.concatenate(largest)), least)
    return hits / sides.tried, reached / sides.tried


def _deals(sides: Sides) -> Iterator[Float[np.ndarray, "deal text"]]:
    """Blocks of assignments: the factors of the texts in the difference of the means."""
    texts, count = len(sides.members), len(sides.first)
    chosen = iter(_chosen(sides))
    while block := list(islice(chosen, max(1, min(_BLOCK, _CELLS // texts)))):
        deals = np.full((len(block), texts), -1 / (texts - count))
        np.put_along_axis(deals, np.array(block), 1 / count, 1)
        yield deals


def _chosen(sides: Sides) -> Iterator[Sequence[int] | Int[np.ndarray, " text"]]:
    """The texts on the first side, by assignment; the actual one is first."""
    texts, count = len(sides.members), len(sides.first)
    if sides.deals <= MOST_DEALS:
        yield from combinations(range(texts), count)
        return
    random = np.random.default_rng(0)
    yield range(count)
    for _ in range(sides.tried - 1):
        yield random.permutation(texts)[:count]
