"""How scores compare over many examples by every protocol, with intervals by a bootstrap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowtracer_plugin.summaries import (
    BASELINES,
    Interval,
    ScoreSummary,
    bootstrap_interval,
    effects_of,
    summarise,
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
