"""How scores compare over many examples by every protocol, with bootstrapped intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

RESAMPLES = 4000
"""Resamples of the examples for one interval."""

CONFIDENCE = 0.95

BASELINES = {"chance": "random", "one_hop": "attention:decision"}
"""What every score is compared with in the same examples: random tokens, and one hop of attention
from the rows that choose the answer."""

Measured = Mapping[str, Any]
"""What `protocols.measure` found in one example."""

Records = Sequence[Mapping[str, Any]]
"""What one protocol found in one example: a record for each score, side or share."""

Column = Float[np.ndarray, "example record *percent"]
Summary = TypeVar("Summary")


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean over examples and its 95 % interval; a single example has none.

    Attributes:
        mean: Mean over the examples.
        low: Lower end.
        high: Upper end.
    """

    mean: float
    low: float | None
    high: float | None


Bootstrap = Callable[[Float[np.ndarray, " example"]], Interval]
"""Computes a mean over examples and its interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSummary:
    """The effect of knocking out the top or the bottom of one score, over examples.

    Attributes:
        gap: Number of tokens right before the answer that were not candidates.
        score: The name of the score or control.
        side: `"top"` or `"bottom"`.
        drop: How far the mean log-probability of the answer's tokens falls, for each of the
            percents, in nats.
        aopc: The mean of `drop` over the percents.
        flipped: Share of sets under which the greedy answer changes, for each of the percents.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveSummary:
    """Areas under the curves of one score; lower is better for deletion, higher for insertion.

    Attributes:
        score: Its name; `random` is the mean over random orders.
        deletion: Mean height of the deletion curve.
        insertion: Mean height of the insertion curve.
        gap: Insertion minus deletion: how well the score tells what the answer depends on.
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
    """Rank correlation of a score's lines with the effect of knocking each of them out.

    Attributes:
        score: Its name.
        by_sum: The correlation with the lines' summed scores.
        by_max: The correlation with the highest score of each line.
        over_one_hop: `by_sum` minus that of one hop of attention.
    """

    score: str
    by_sum: Interval
    by_max: Interval
    over_one_hop: Interval | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeSummary:
    """The effect of cutting the edges with the most flow, and others with as much attention.

    Attributes:
        percent: Share of the edges that was cut.
        backbone: Drop of the answer's mean log-probability, in nats per token.
        others: The same drop for the other edges.
        over_others: The difference, in the same examples.
    """

    percent: int
    backbone: Interval
    others: Interval
    over_others: Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class RegenerationSummary:
    """How often answers change when the rest is written again without some tokens.

    Attributes:
        score: The score that chose the tokens, or `random`.
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
    """The summaries of each protocol that was run; the others are empty.

    Attributes:
        knock_out: One for each gap, score and side.
        curves: One for each score.
        lines: One for each score.
        edges: One for each percent.
        regeneration: One for each score and side.
        counted: Number of examples of each protocol that was run.
    """

    knock_out: tuple[ScoreSummary, ...]
    curves: tuple[CurveSummary, ...]
    lines: tuple[LineSummary, ...]
    edges: tuple[EdgeSummary, ...]
    regeneration: tuple[RegenerationSummary, ...]
    counted: Mapping[str, int]


def summarise_all(examples: Sequence[Measured], *, seed: int = 0) -> EvaluationSummary:
    """The summaries of every protocol over the examples in which it could be run."""
    found: dict[str, list[Any]] = {
        name: [one[name] for one in examples if name in one and "skipped" not in one[name]]
        for name in _SUMMARISE
    }
    found["knock_out"] = [one["effects"] for one in found["knock_out"]]
    lines = map(_by_score, found["lines"])
    # Lines are compared only in texts where every score orders them.
    found["lines"] = [one for one in lines if all(None not in line.values() for line in one)]
    interval = partial(bootstrap_interval, seed=seed)
    return EvaluationSummary(
        **{name: _SUMMARISE[name](ones, interval) if ones else () for name, ones in found.items()},
        counted={
            name: len(ones) for name, ones in found.items() if any(name in one for one in examples)
        },
    )


def bootstrap_interval(
    values: Float[np.ndarray, " example"], *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """The mean, and the interval that holds 95 % of the means of resamples.

    Resamples are as large as the sample and drawn with replacement, the same ones for all values;
    quantiles are interpolated.
    """
    mean, size = float(values.mean()), len(values)
    if size < 2:
        return Interval(mean=mean, low=None, high=None)
    draws = np.random.default_rng(seed).integers(0, size, (resamples, size))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values[draws].mean(1), [tail, 1 - tail]).tolist()
    return Interval(mean=mean, low=low, high=high)


def summarise_knock_outs(
    examples: Sequence[Records], interval: Bootstrap
) -> tuple[ScoreSummary, ...]:
    """The effects of every gap, score and side, in the order of the first example.

    Raises:
        ValueError: Examples hold effects of different scores, gaps or sides.
    """
    drop, flipped = _column(examples, "drop"), _column(examples, "flipped")
    columns = {"drop": drop, "aopc": drop.mean(-1), "flipped": flipped, "flips": flipped.mean(-1)}
    keys, over = ("gap", "score", "side"), {"over_chance": drop, "over_one_hop": drop}
    return _summaries(ScoreSummary, examples, keys, columns, over, interval)


def _curves(examples: Sequence[Records], interval: Bootstrap) -> tuple[CurveSummary, ...]:
    deletion, insertion = _column(examples, "deletion_area"), _column(examples, "insertion_area")
    gap = insertion - deletion
    columns = {"deletion": deletion, "insertion": insertion, "gap": gap}
    over = {"over_chance": gap, "over_one_hop": gap}
    return _summaries(CurveSummary, examples, ("score",), columns, over, interval)


def _lines(examples: Sequence[Records], interval: Bootstrap) -> tuple[LineSummary, ...]:
    columns = {name: _column(examples, name) for name in ("by_sum", "by_max")}
    over = {"over_one_hop": columns["by_sum"]}
    return _summaries(LineSummary, examples, ("score",), columns, over, interval)


def _by_score(lines: Mapping[str, Any]) -> Records:
    sums, most = lines["by_sum"], lines["by_max"]
    return [{"score": name, "by_sum": sums[name], "by_max": most[name]} for name in sums]


def _edges(examples: Sequence[Records], interval: Bootstrap) -> tuple[EdgeSummary, ...]:
    backbone, others = _column(examples, "backbone"), _column(examples, "others")
    columns = {"backbone": backbone, "others": others, "over_others": backbone - others}
    return _summaries(EdgeSummary, examples, ("percent",), columns, {}, interval)


def _regeneration(
    examples: Sequence[Records], interval: Bootstrap
) -> tuple[RegenerationSummary, ...]:
    changed = _column(examples, "changed")
    known = [records for records in examples if records[0]["reversed"] is not None]
    columns = {"changed": changed, "reversed": _column(known, "reversed") if known else None}
    over = {"over_chance": changed}
    return _summaries(RegenerationSummary, examples, ("score", "side"), columns, over, interval)


_SUMMARISE: Mapping[str, Callable[[Sequence[Records], Bootstrap], tuple[Any, ...]]] = {
    "knock_out": summarise_knock_outs,
    "curves": _curves,
    "lines": _lines,
    "edges": _edges,
    "regeneration": _regeneration,
}


def _column(examples: Sequence[Records], name: str) -> Column:
    return np.array([[record[name] for record in records] for records in examples])


def _summaries(
    kind: Callable[..., Summary],
    examples: Sequence[Records],
    keys: tuple[str, ...],
    columns: Mapping[str, Column | None],
    over: Mapping[str, Column],
    interval: Bootstrap,
) -> tuple[Summary, ...]:
    """One summary for each record of the first example.

    Differences are taken within examples before they are resampled: their intervals say whether two
    scores differ, where two overlapping intervals of means do not.

    Args:
        kind: The summary's class.
        examples: The findings of all examples, each with the same records.
        keys: The fields that tell records apart.
        columns: For each field of the summary, the values to average; None if they are unknown.
        over: For each field that holds a difference from a baseline, the differing values.
        interval: Computes a mean and its interval.
    """
    rows, *others = [[{key: one[key] for key in keys} for one in records] for records in examples]
    if any(other != rows for other in others):
        raise ValueError("examples hold effects of different scores or gaps; measure them alike")
    places = {tuple(row.values()): place for place, row in enumerate(rows)}

    def means(values: Column | None, place: int) -> Interval | tuple[Interval, ...] | None:
        if values is None:
            return None
        here = values[:, place]
        return interval(here) if here.ndim == 1 else tuple(map(interval, here.T))

    def difference(field: str, place: int) -> Interval | None:
        baseline = {"score": BASELINES[field.removeprefix("over_")], "side": "top"}
        other = places.get(tuple(baseline.get(key, rows[place][key]) for key in keys))
        if other is None or other == place:
            return None
        paired = over[field][:, place] - over[field][:, other]
        return interval(paired if paired.ndim == 1 else paired.mean(1))

    return tuple(
        kind(
            **row,
            **{field: means(values, place) for field, values in columns.items()},
            **{field: difference(field, place) for field in over},
        )
        for place, row in enumerate(rows)
    )
