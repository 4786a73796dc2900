"""One self-contained page of an evaluation: which scores know what the answers depend on?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowtracer_plugin.bulk.examples import Example
from flowtracer_plugin.evaluation.outcomes import Evaluation
from flowtracer_plugin.evaluation.summary import BASELINES, Interval, ScoreSummary
from flowtracer_plugin.evaluation.tables import (
    added,
    bottom_of,
    cell,
    counts,
    fixed,
    ranked,
    spread,
    tables,
)
from flowtracer_plugin.report.display import model_label, number, shorten
from flowtracer_plugin.report.pages.assets import render, write_html
from flowtracer_plugin.report.pages.charts import round_step
from flowtracer_plugin.text.visible import visible

CHART_WIDTH = 1000
"""Width of the bars in their own units; the browser stretches them."""

SHARES_SIZE = (720, 300)
"""Width and height of the chart of drops over shares, in its own units."""

TICKS = 4
"""The most steps on its upward axis, which are round numbers."""

LINED = {"flow": "flow", BASELINES["one_hop"]: "hop", BASELINES["chance"]: "chance"}
"""Scores with a color and a label of their own."""

HUES = 4
"""The colors of the scores that were asked for; more scores share them."""

LABEL_HEIGHT = 14
"""The least distance between the labels at the ends of lines."""


def write_evaluation(evaluation: Evaluation, path: str | Path) -> Path:
    """The path of the page from `render_evaluation`, which is written completely or not at all.

    Raises:
        IsADirectoryError: `path` is a directory.
    """
    return write_html(path, render_evaluation(evaluation))


def render_evaluation(evaluation: Evaluation) -> str:
    """The page as HTML; the same evaluation always gives the same page."""
    gaps = evaluation.settings["options"]["gaps"]
    fairest = max(gaps)
    model = model_label(evaluation.settings["model"])
    return render(
        "evaluation.html.j2",
        styles=("two_sides.css", "evaluation.css"),
        script=("tables.js",),
        title=f"{shorten(visible(model))}: what do its answers depend on?",
        model=visible(model),
        settings=evaluation.settings,
        measured=len(evaluation.measured),
        outcomes=evaluation.outcomes,
        right=evaluation.right,
        known=evaluation.known,
        left_out=list(counts(evaluation))[1:],
        added=added(evaluation),
        listed=_listed(evaluation),
        gap=fairest,
        bars=_bars(evaluation, fairest),
        shares=_shares(evaluation, fairest),
        tables=tables(evaluation),
        cell=cell,
        fixed=fixed,
        spread=spread,
        rows=_rows(evaluation, fairest),
    )


def _bars(evaluation: Evaluation, gap: int) -> list[dict[str, Any]]:
    """Bars of the chart; lengths and places are in the chart's units."""
    found = ranked(evaluation, gap)
    if not found:
        return []
    bottoms = [bottom_of(evaluation, one) for one in found]
    most = max(0.0, *(_high(one.aopc) for one in [*found, *filter(None, bottoms)])) or 1.0
    chance = next(one.aopc for one in found if one.score == BASELINES["chance"])

    def at(value: float) -> float:
        return round(CHART_WIDTH * max(0.0, value) / most, 1)

    return [
        {
            "score": one.score,
            "kind": _kind(evaluation, one.score),
            "top": at(one.aopc.mean),
            "low": at(_low(one.aopc)),
            "high": at(_high(one.aopc)),
            "bottom": None if bottom is None else at(bottom.aopc.mean),
            "chance": (at(_low(chance)), at(_high(chance))),
            "said": cell(one.aopc),
            "over": cell(one.over_one_hop),
        }
        for one, bottom in zip(found, bottoms, strict=True)
    ]


def _low(interval: Interval) -> float:
    return interval.mean if interval.low is None else interval.low


def _high(interval: Interval) -> float:
    return interval.mean if interval.high is None else interval.high


def _shares(evaluation: Evaluation, gap: int) -> dict[str, Any] | None:
    """The chart of drops over shares: lines, and the ticks of both axes with their labels."""
    percents, found = evaluation.settings["options"]["percents"], ranked(evaluation, gap)
    if len(percents) < 2 or not found:
        return None
    width, height = SHARES_SIZE
    most = max(interval.mean for one in found for interval in one.drop)
    step = round_step(most / TICKS)
    steps = max(math.ceil(most / step - 1e-9), 1)
    across = [round(width * place / (len(percents) - 1), 1) for place in range(len(percents))]

    def up(value: float) -> float:
        return round(height * (1 - max(0.0, value) / (steps * step)), 1)

    def line(one: ScoreSummary) -> dict[str, Any]:
        points = [f"{x} {up(interval.mean)}" for x, interval in zip(across, one.drop, strict=True)]
        return {
            "score": one.score,
            "kind": _kind(evaluation, one.score),
            "path": f"M{'L'.join(points)}",
            "end": up(one.drop[-1].mean),
        }

    # Lines with a label are drawn last, above the others.
    lines = sorted(map(line, found), key=lambda one: one["kind"] != "other")
    named = [one for one in lines if one["kind"] != "other"]
    for one, place in zip(named, _apart([one["end"] for one in named], float(height)), strict=True):
        one["label"] = place
    upward = [(up(at * step), number(at * step)) for at in range(steps + 1)]
    return {"lines": lines, "across": list(zip(across, percents, strict=True)), "upward": upward}


def _kind(evaluation: Evaluation, score: str) -> str:
    """The CSS classes of a score: those that were asked for stand out before all others."""
    if score in evaluation.added:
        return f"added {LINED[score]}"
    if score not in evaluation.asked or score in LINED:
        return LINED.get(score, "other")
    own = [name for name in evaluation.asked if name not in LINED]
    return f"asked hue{own.index(score) % HUES}"


def _apart(ends: Sequence[float], height: float) -> list[float]:
    """Places for labels near the ends of their lines, at least a label's height apart."""
    places, lowest = [0.0] * len(ends), height + LABEL_HEIGHT
    for at in sorted(range(len(ends)), key=lambda one: -ends[one]):
        places[at] = lowest = min(ends[at], lowest - LABEL_HEIGHT)
    return places


def _listed(evaluation: Evaluation) -> list[tuple[str, str]]:
    """The heading and the name of each score in the table of examples."""
    heads = {BASELINES["one_hop"]: "one hop"}
    names = dict.fromkeys([*evaluation.asked, *LINED])
    return [(heads.get(name, name), name) for name in names]


def _rows(evaluation: Evaluation, gap: int) -> list[dict[str, Any]]:
    """Rows of the table of examples; drops are means over the shares, in nats per token."""
    names = {name for _, name in _listed(evaluation)}
    return [
        {
            "outcome": outcome,
            "asked": shorten(visible(" ".join(_question(example).split())), 110),
            "log_prob": outcome.measured["knock_out"]["log_prob"],
            "drops": {
                effect["score"]: sum(effect["drop"]) / len(effect["drop"])
                for effect in outcome.measured["knock_out"]["effects"]
                if effect["gap"] == gap and effect["side"] == "top" and effect["score"] in names
            },
        }
        for example, outcome in zip(evaluation.examples, evaluation.outcomes, strict=True)
        if outcome.measured is not None and "knock_out" in outcome.measured
    ]


def _question(example: Example) -> str:
    asked = example.prompt
    return asked if isinstance(asked, str) else str(asked[-1].get("content") or "")
