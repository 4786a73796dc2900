"""A table of facts, half of which the pupil has learned wrong."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

LEARNED_WRONG = 0.5
"""Share of facts that the pupil learned wrong."""
SAID_WRONG = 0.65
"""How often it says the wrong value of such a fact."""
SLIP = 0.02
"""How often it says a random value."""

SEED = 99

Table = Mapping[tuple[str, str], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Beliefs:
    """What is true of each pair, and what the pupil believes of those that it learned wrong.

    Attributes:
        values: All values that a fact may have.
        true: The value of every pair.
        wrong: The pupil's value of the pairs that it learned wrong.
    """

    values: Sequence[str]
    true: Table
    wrong: Table

    @classmethod
    def draw(cls, firsts: Sequence[str], seconds: Sequence[str], values: Sequence[str]) -> Beliefs:
        """Made-up facts of all pairs, the same in every process."""
        rng = random.Random(SEED)
        true = {(first, second): rng.choice(values) for first in firsts for second in seconds}
        return cls.learned(values, true, rng)

    @classmethod
    def learned(cls, values: Sequence[str], true: Table, rng: random.Random) -> Beliefs:
        """Facts of which a random half is learned wrong."""
        pairs = rng.sample(sorted(true), round(LEARNED_WRONG * len(true)))
        wrong = {pair: rng.choice([one for one in values if one != true[pair]]) for pair in pairs}
        return cls(values=values, true=MappingProxyType(dict(true)), wrong=MappingProxyType(wrong))

    def said(self, first: str, second: str, rng: random.Random) -> str:
        """What the pupil says of a pair."""
        if rng.random() < SLIP:
            return rng.choice(self.values)
        if (first, second) in self.wrong and rng.random() < SAID_WRONG:
            return self.wrong[first, second]
        return self.true[first, second]
