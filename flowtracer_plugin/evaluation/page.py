"""One self-contained page of an evaluation: which scores know what the answers hang on?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowtracer_plugin.evaluation.overview import Evaluation
from flowtracer_plugin.evaluation.run import Example, Outcome
from flowtracer_plugin.evaluation.summaries import BASELINES, Interval, ScoreSummary
from flowtracer_plugin.evaluation.tables import bottom_of, cell, counts, ranked, tables
from flowtracer_plugin.report.display import shorten
from flowtracer_plugin.report.pages.assets import render, write_html
from flowtracer_plugin.text.visible import visible

CHART_WIDTH = 1000
"""Of the drawings, in units of their own; they stretch."""

SHARES_SIZE = (720, 300)
"""Of the drawing of drops over shares, in its own units."""

LINED = {"flow": "flow", BASELINES["one_hop"]: "hop", BASELINES["chance"]: "chance"}
"""Scores whose lines are told apart by more than a hover."""


def write_evaluation(evaluation: Evaluation, path: str | Path) -> Path:
    """Write `render_evaluation` to `path`, whole or not at all, and return `path`.

    Raises:
        IsADirectoryError: `path` is a directory.
    """
    return write_html(path, render_evaluation(evaluation))


def render_evaluation(evaluation: Evaluation) -> str:
    """The page as HTML; the same evaluation always gives the same page."""
    gaps = evaluation.settings["options"]["gaps"]
    fairest = max(gaps)
    return render(
        "evaluation.html.j2",
        styles=("two_sides.css", "evaluation.css"),
        script=("tables.js",),
        title=f"{shorten(visible(evaluation.settings['model']))}: what do its answers hang on?",
        settings=evaluation.settings,
        measured=len(evaluation.measured),
        outcomes=evaluation.outcomes,
        right=evaluation.right,
        known=evaluation.known,
        left_out=list(counts(evaluation))[1:],
        gap=fairest,
        bars=_bars(evaluation, fairest),
        shares=_shares(evaluation, fairest),
        tables=tables(evaluation),
        cell=cell,
        rows=_rows(evaluation, fairest),
    )


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A score in the chart, in the chart's units.

    Attributes:
        score: Its name.
        kind: Whether it is flow, one hop, chance, or any.
        top: Where the top's drop ends.
        low: Lower end of its interval.
        high: Upper end.
        bottom: Where the bottom's drop ends; None for controls.
        chance: Ends of the interval of random sets.
        said: The drop in words.
        over: The difference from one hop, in words.
    """

    score: str
    kind: str
    top: float
    low: float
    high: float
    bottom: float | None
    chance: tuple[float, float]
    said: str
    over: str


def _bars(evaluation: Evaluation, gap: int) -> list[Bar]:
    found = ranked(evaluation, gap)
    if not found:
        return []
    bottoms = [bottom_of(evaluation, one) for one in found]
    most = max(_high(one.aopc) for one in [*found, *filter(None, bottoms)]) or 1.0
    chance = next(one.aopc for one in found if one.score == BASELINES["chance"])

    def at(value: float) -> float:
        return round(CHART_WIDTH * max(0.0, value) / most, 1)

    def bar(one: ScoreSummary) -> Bar:
        bottom = bottom_of(evaluation, one)
        return Bar(
            score=one.score,
            kind=LINED.get(one.score, "other"),
            top=at(one.aopc.mean),
            low=at(_low(one.aopc)),
            high=at(_high(one.aopc)),
            bottom=None if bottom is None else at(bottom.aopc.mean),
            chance=(at(_low(chance)), at(_high(chance))),
            said=cell(one.aopc),
            over=cell(one.over_one_hop),
        )

    return [bar(one) for one in found]


def _low(interval: Interval) -> float:
    return interval.mean if interval.low is None else interval.low


def _high(interval: Interval) -> float:
    return interval.mean if interval.high is None else interval.high


@dataclass(frozen=True, kw_only=True)
class ShareLine:
    """Drops of one score over the shares, as an SVG path, and where its end is."""

    score: str
    kind: str
    path: str
    end: float


@dataclass(frozen=True, kw_only=True)
class Shares:
    """The drawing of drops over shares: lines, and where the shares and the drops are."""

    lines: Sequence[ShareLine]
    across: Sequence[tuple[float, int]]
    upward: Sequence[tuple[float, str]]


def _shares(evaluation: Evaluation, gap: int) -> Shares | None:
    percents, found = evaluation.settings["options"]["percents"], ranked(evaluation, gap)
    if len(percents) < 2 or not found:
        return None
    width, height = SHARES_SIZE
    most = max(interval.mean for one in found for interval in one.drop) or 1.0
    across = [round(width * place / (len(percents) - 1), 1) for place in range(len(percents))]

    def up(value: float) -> float:
        return round(height * (1 - max(0.0, value) / most), 1)

    def line(one: ScoreSummary) -> ShareLine:
        points = [f"{x} {up(interval.mean)}" for x, interval in zip(across, one.drop, strict=True)]
        return ShareLine(
            score=one.score,
            kind=LINED.get(one.score, "other"),
            path=f"M{'L'.join(points)}",
            end=up(one.drop[-1].mean),
        )

    # What is told apart is drawn last, above the others.
    lines = sorted(map(line, found), key=lambda one: one.kind != "other")
    upward = [(up(most * part / 4), f"{most * part / 4:.2f}") for part in range(5)]
    return Shares(lines=lines, across=list(zip(across, percents, strict=True)), upward=upward)


@dataclass(frozen=True, kw_only=True)
class ExampleRow:
    """An example in the table; drops are means over the shares, in nats per token."""

    outcome: Outcome
    asked: str
    answer_tokens: int
    log_prob: float
    drops: Mapping[str, float]


def _rows(evaluation: Evaluation, gap: int) -> list[ExampleRow]:
    return [
        _row(example, outcome, outcome.measured["knock_out"], gap)
        for example, outcome in zip(evaluation.examples, evaluation.outcomes, strict=True)
        if outcome.measured is not None and "knock_out" in outcome.measured
    ]


def _row(example: Example, outcome: Outcome, measured: Mapping[str, Any], gap: int) -> ExampleRow:
    asked = example.prompt
    if not isinstance(asked, str):
        asked = str(asked[-1]["content"])
    drops = {
        effect["score"]: sum(effect["drop"]) / len(effect["drop"])
        for effect in measured["effects"]
        if effect["gap"] == gap and effect["side"] == "top" and effect["score"] in LINED
    }
    return ExampleRow(
        outcome=outcome,
        asked=shorten(visible(" ".join(asked.split())), 110),
        answer_tokens=measured["answer_tokens"],
        log_prob=measured["log_prob"],
        drops=drops,
    )
