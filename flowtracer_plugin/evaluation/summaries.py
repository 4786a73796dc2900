"""How scores compare over many examples by every protocol, with bootstrapped intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from flowtracer_plugin.evaluation.faithfulness import Effect

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


Measured = Mapping[str, Any]
"""What `protocols.measure` found in one example."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveSummary:
    """Areas under the curves of one score: deletion lower, insertion higher is better.

    Attributes:
        score: Its name; `random` is the mean of draws.
        deletion: Mean height of the deletion curve.
        insertion: Mean height of the insertion curve.
        gap: Insertion minus deletion: how far the score tells what the answer stands on.
        over_chance: `gap` minus that of random orders, in the same examples.
        over_one_hop: `gap` minus that of one hop of attention.
    """

    score: str
    deletion: Interval
    insertion: Interval
    gap: Interval
    over_chance: Interval | None
    over_one_hop: Interval | None


@dataclass(frozen=True, kw_only=True, slots=True)
class LineSummary:
    """Rank correlation of a score's lines with what knocking each of them out did.

    Attributes:
        score: Its name.
        by_sum: With the lines' summed scores.
        by_max: With the highest score of each line.
        over_one_hop: `by_sum` minus that of one hop of attention.
    """

    score: str
    by_sum: Interval
    by_max: Interval
    over_one_hop: Interval | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeSummary:
    """What cutting the edges with the most flow did, beside others of as much attention.

    Attributes:
        percent: Share of the edges that was cut.
        backbone: Drop of the answer's mean log-probability, in nats per token.
        others: The same without others.
        over_others: The difference, in the same examples.
    """

    percent: int
    backbone: Interval
    others: Interval
    over_others: Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class RegenerationSummary:
    """What became of the answers when the rest was written again without some tokens.

    Attributes:
        score: By what these were chosen.
        side: `"top"` or `"bottom"`.
        changed: Share of the answers that changed.
        reversed: Share that went from right to wrong or from wrong to right; None if the right
            answers are not known.
        over_chance: `changed` minus that of random sets, in the same examples.
    """

    score: str
    side: str
    changed: Interval
    reversed: Interval | None
    over_chance: Interval | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSummary:
    """What was found by each protocol that was run; the others are empty.

    Attributes:
        knock_out: Of every gap, score and side.
        curves: Of every score.
        lines: Of every score.
        edges: Of every percent.
        regeneration: Of every score and side.
        counted: Examples of each protocol.
    """

    knock_out: tuple[ScoreSummary, ...]
    curves: tuple[CurveSummary, ...]
    lines: tuple[LineSummary, ...]
    edges: tuple[EdgeSummary, ...]
    regeneration: tuple[RegenerationSummary, ...]
    counted: Mapping[str, int]


def summarise_all(examples: Sequence[Measured], *, seed: int = 0) -> EvaluationSummary:
    """Every protocol over the examples in which it could be run."""
    found = {
        name: [one[name] for one in examples if name in one and "skipped" not in one[name]]
        for name in ("knock_out", "curves", "lines", "edges", "regeneration")
    }
    found["lines"] = [one for one in found["lines"] if _orders(one)]
    effects = [effects_of(one["effects"]) for one in found["knock_out"]]
    return EvaluationSummary(
        knock_out=summarise(effects, seed=seed),
        curves=_curves(found["curves"], seed),
        lines=_lines(found["lines"], seed),
        edges=_edges(found["edges"], seed),
        regeneration=_regeneration(found["regeneration"], seed),
        counted={
            name: len(ones) for name, ones in found.items() if any(name in one for one in examples)
        },
    )


def _curves(examples: Sequence[Any], seed: int) -> tuple[CurveSummary, ...]:
    if not examples:
        return ()
    names = [curve["score"] for curve in examples[0]]
    areas = {
        side: np.array([[curve[f"{side}_area"] for curve in curves] for curves in examples])
        for side in ("deletion", "insertion")
    }
    gaps = areas["insertion"] - areas["deletion"]

    def over(place: int, baseline: str) -> Interval | None:
        return _over(gaps, names, place, BASELINES[baseline], seed)

    return tuple(
        CurveSummary(
            score=name,
            deletion=bootstrap_interval(areas["deletion"][:, place], seed=seed),
            insertion=bootstrap_interval(areas["insertion"][:, place], seed=seed),
            gap=bootstrap_interval(gaps[:, place], seed=seed),
            over_chance=over(place, "chance"),
            over_one_hop=over(place, "one_hop"),
        )
        for place, name in enumerate(names)
    )


def _lines(examples: Sequence[Any], seed: int) -> tuple[LineSummary, ...]:
    if not examples:
        return ()
    names = list(examples[0]["by_sum"])
    sums, most = (
        np.array([[one[kind][name] for name in names] for one in examples])
        for kind in ("by_sum", "by_max")
    )
    return tuple(
        LineSummary(
            score=name,
            by_sum=bootstrap_interval(sums[:, place], seed=seed),
            by_max=bootstrap_interval(most[:, place], seed=seed),
            over_one_hop=_over(sums, names, place, BASELINES["one_hop"], seed),
        )
        for place, name in enumerate(names)
    )


def _orders(lines: Any) -> bool:
    """Whether every score orders the lines of a text: only then are they compared on it."""
    return None not in (*lines["by_sum"].values(), *lines["by_max"].values())


def _edges(examples: Sequence[Any], seed: int) -> tuple[EdgeSummary, ...]:
    if not examples:
        return ()
    ours, others = (
        np.array([[one[kind] for one in cuts] for cuts in examples])
        for kind in ("backbone", "others")
    )
    return tuple(
        EdgeSummary(
            percent=one["percent"],
            backbone=bootstrap_interval(ours[:, place], seed=seed),
            others=bootstrap_interval(others[:, place], seed=seed),
            over_others=bootstrap_interval((ours - others)[:, place], seed=seed),
        )
        for place, one in enumerate(examples[0])
    )


def _regeneration(examples: Sequence[Any], seed: int) -> tuple[RegenerationSummary, ...]:
    if not examples:
        return ()
    keys = [f"{one['score']}/{one['side']}" for one in examples[0]]
    changed = np.array([[one["changed"] for one in ones] for ones in examples])
    known = [ones for ones in examples if ones[0]["reversed"] is not None]
    turned = np.array([[one["reversed"] for one in ones] for ones in known])
    return tuple(
        RegenerationSummary(
            score=one["score"],
            side=one["side"],
            changed=bootstrap_interval(changed[:, place], seed=seed),
            reversed=bootstrap_interval(turned[:, place], seed=seed) if known else None,
            over_chance=_over(changed, keys, place, f"{BASELINES['chance']}/top", seed),
        )
        for place, one in enumerate(examples[0])
    )


def _over(
    values: np.ndarray, names: Sequence[str], place: int, other: str, seed: int
) -> Interval | None:
    """The difference from another score, in the same examples."""
    if other not in names or names[place] == other:
        return None
    differences = values[:, place] - values[:, names.index(other)]
    return bootstrap_interval(differences, seed=seed)
