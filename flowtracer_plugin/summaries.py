"""How scores compare over many examples, with intervals by a bootstrap over the examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from flowtracer_plugin.faithfulness import Effect

RESAMPLES = 4000
"""Of the examples, for one interval."""

CONFIDENCE = 0.95

BASELINES = {"chance": "random", "one_hop": "attention:decision"}
"""What every score is compared with, example by example: sets that chance chooses, and what the
rows that choose the answer attend to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean over examples and its 95 % interval; a single example has none.

    Attributes:
        mean: Over the examples.
        low: Lower end.
        high: Upper end.
    """

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSummary:
    """What knocking out the top or the bottom of one score does, over examples.

    Attributes:
        gap: Tokens before the answer that were no candidates.
        score: Its name, or a control's.
        side: `"top"` or `"bottom"`.
        drop: Of the mean log-probability of the answer's tokens, in nats, for each of the percents.
        aopc: The mean of `drop` over the percents.
        flipped: Share of sets under which the greedy answer changed, for each of the percents.
        flips: The mean of `flipped` over the percents.
        over_chance: `aopc` minus that of random sets, in the same examples.
        over_one_hop: `aopc` minus that of one-hop attention.
    """

    gap: int
    score: str
    side: str
    drop: tuple[Interval, ...]
    aopc: Interval
    flipped: tuple[Interval, ...]
    flips: Interval
    over_chance: Interval | None
    over_one_hop: Interval | None


def summarise(
    examples: Sequence[Sequence[Effect]], *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[ScoreSummary, ...]:
    """Every score and side, in the order of the first example.

    Differences are taken within examples before they are resampled: intervals of a difference say
    whether two scores differ, where two overlapping intervals of means do not. All intervals come
    of the same resamples.

    Raises:
        ValueError: Examples hold effects of different scores, gaps or percents.
    """
    if not examples:
        return ()
    keys = [_key(effect) for effect in examples[0]]
    if any([_key(effect) for effect in effects] != keys for effects in examples):
        raise ValueError("examples hold effects of different scores or gaps; measure them alike")
    drops = np.array([[effect.drop for effect in effects] for effects in examples])
    flips = np.array([[effect.flipped for effect in effects] for effects in examples])
    at = {key: number for number, key in enumerate(keys)}

    def interval(values: Float[np.ndarray, " example"]) -> Interval:
        return bootstrap_interval(values, seed=seed, resamples=resamples)

    def over(number: int, gap: int, baseline: str) -> Interval | None:
        other = at.get((gap, baseline, "top"))
        if other is None or other == number:
            return None
        return interval((drops[:, number] - drops[:, other]).mean(1))

    return tuple(
        ScoreSummary(
            gap=gap,
            score=score,
            side=side,
            drop=tuple(interval(part) for part in drops[:, number].T),
            aopc=interval(drops[:, number].mean(1)),
            flipped=tuple(interval(part) for part in flips[:, number].T),
            flips=interval(flips[:, number].mean(1)),
            over_chance=over(number, gap, BASELINES["chance"]),
            over_one_hop=over(number, gap, BASELINES["one_hop"]),
        )
        for number, (gap, score, side) in enumerate(keys)
    )


def bootstrap_interval(
    values: Float[np.ndarray, " example"], *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """The mean, and between which values 95 % of the means of resamples lie.

    Resamples are as large as the sample and drawn with replacement; quantiles are interpolated.
    """
    mean, size = float(values.mean()), len(values)
    if size < 2:
        return Interval(mean=mean, low=None, high=None)
    draws = np.random.default_rng(seed).integers(0, size, (resamples, size))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values[draws].mean(1), [tail, 1 - tail]).tolist()
    return Interval(mean=mean, low=low, high=high)


def _key(effect: Effect) -> tuple[int, str, str]:
    return effect.gap, effect.score, effect.side


def effects_of(records: Sequence[Mapping[str, Any]]) -> tuple[Effect, ...]:
    """Effects as they were written down."""
    lists = ("drop", "flipped", "divergence")
    return tuple(
        Effect(**{**record, **{name: tuple(record[name]) for name in lists}}) for record in records
    )
