"""The tables of an evaluation, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import compress

from flowtracer_plugin.evaluation.outcomes import Evaluation
from flowtracer_plugin.evaluation.summary import EvaluationSummary, Interval, ScoreSummary

Cell = str | Interval | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationTable:
    """A table.

    Attributes:
        name: One word that no other table has.
        title: What it shows.
        heads: Headings of the columns; the first column names the rows.
        rows: Cells in the order of the heads.
        spare: Heads of the columns that say least; where there is no room, they go in this order.
    """

    name: str
    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    spare: tuple[str, ...] = ()


def tables(evaluation: Evaluation) -> tuple[EvaluationTable, ...]:
    """The tables of all protocols that were run; the best scores come first."""
    found = [_knock_outs(evaluation, gap) for gap in evaluation.settings["options"]["gaps"]]
    summary = evaluation.summary
    every = [*found, _curves(summary), _lines(summary), _edges(summary), _regeneration(summary)]
    return tuple(_without_empty_columns(table) for table in every if table.rows)


def _without_empty_columns(table: EvaluationTable) -> EvaluationTable:
    full = [any(cell is not None for cell in column) for column in zip(*table.rows, strict=True)]
    return replace(
        table,
        heads=tuple(compress(table.heads, full)),
        rows=tuple(tuple(compress(row, full)) for row in table.rows),
    )


def ranked(evaluation: Evaluation, gap: int) -> list[ScoreSummary]:
    """The tops of all scores and controls, from the largest drop to the smallest."""
    tops = [one for one in evaluation.summary.knock_out if one.gap == gap and one.side == "top"]
    return sorted(tops, key=lambda one: -one.aopc.mean)


def bottom_of(evaluation: Evaluation, one: ScoreSummary) -> ScoreSummary | None:
    """The bottom of the same score."""
    found = evaluation.summary.knock_out
    same = (two for two in found if (two.gap, two.score) == (one.gap, one.score))
    return next((two for two in same if two.side == "bottom"), None)


def _knock_outs(evaluation: Evaluation, gap: int) -> EvaluationTable:
    options = evaluation.settings["options"]
    whom = (
        "all later tokens" if options["rows"] == "future" else "the tokens that predict the answer"
    )
    spared = f"; {gap} right before the answer are spared" if gap else ""

    def row(one: ScoreSummary) -> tuple[Cell, ...]:
        bottom = bottom_of(evaluation, one)
        low = None if bottom is None else bottom.aopc
        return one.score, *one.drop, one.aopc, low, one.flips, one.over_chance, one.over_one_hop

    shares = tuple(f"{percent} %" for percent in options["percents"])
    return EvaluationTable(
        name=f"knock-outs-{gap}",
        title="Answer log-probability lost, in nats per token: top of each score hidden from "
        f"{whom}{spared}",
        heads=("score", *shares, "mean", "bottom", "flipped", "− random", "− one hop"),
        rows=tuple(row(one) for one in ranked(evaluation, gap)),
        spare=(*shares, "flipped", "bottom"),
    )


def _curves(summary: EvaluationSummary) -> EvaluationTable:
    ordered = sorted(summary.curves, key=lambda one: -one.gap.mean)
    return EvaluationTable(
        name="curves",
        title="Curves: mean height as the top is deleted (lower is better), as it is inserted "
        "(higher is better), and the gap between both; the tokens right before the answer are "
        "spared",
        heads=("score", "deletion", "insertion", "gap", "− random", "− one hop"),
        rows=tuple(
            (one.score, one.deletion, one.insertion, one.gap, one.over_chance, one.over_one_hop)
            for one in ordered
        ),
        spare=("deletion", "insertion"),
    )


def _lines(summary: EvaluationSummary) -> EvaluationTable:
    ordered = sorted(summary.lines, key=lambda one: -one.by_sum.mean)
    return EvaluationTable(
        name="lines",
        title="Lines: rank correlation of their scores with the effect of knocking each out",
        heads=("score", "summed", "largest", "− one hop"),
        rows=tuple((one.score, one.by_sum, one.by_max, one.over_one_hop) for one in ordered),
        spare=("largest",),
    )


def _edges(summary: EvaluationSummary) -> EvaluationTable:
    return EvaluationTable(
        name="edges",
        title="Edges with the most flow, against others with as much attention: answer "
        "log-probability lost, in nats per token",
        heads=("share", "backbone", "others", "difference"),
        rows=tuple(
            (f"{one.percent} %", one.backbone, one.others, one.over_others) for one in summary.edges
        ),
    )


def _regeneration(summary: EvaluationSummary) -> EvaluationTable:
    ordered = sorted(summary.regeneration, key=lambda one: (one.side != "top", -one.changed.mean))
    return EvaluationTable(
        name="regeneration",
        title="The second half written again without these tokens: share of the answers that "
        "changed, and of those that changed from right to wrong or back",
        heads=("score", "side", "changed", "reversed", "− random"),
        rows=tuple(
            (one.score, one.side, one.changed, one.reversed, one.over_chance) for one in ordered
        ),
        spare=("reversed",),
    )


def cell(value: Cell) -> str:
    """The text of a cell: a mean with its 95 % interval."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{fixed(value.mean)} {spread(value)}".rstrip()


def cells(value: Cell) -> str | tuple[str, str]:
    """The text of a cell, or with and without the interval if it has one."""
    whole = cell(value)
    return (whole, fixed(value.mean)) if isinstance(value, Interval) and spread(value) else whole


def fixed(value: float) -> str:
    """A number with two decimals; zero has no sign."""
    return f"{value:z.2f}"


def spread(value: Interval) -> str:
    """The 95 % interval in brackets; nothing if there is none."""
    if value.low is None or value.high is None:
        return ""
    return f"({fixed(value.low)}…{fixed(value.high)})"


def added(evaluation: Evaluation) -> str:
    """Which scores were added to those that were asked for, in words; empty if none was."""
    names = evaluation.added
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} added" if names else ""


def counts(evaluation: Evaluation) -> Iterator[str]:
    """Lines that say how many examples count, and why others do not."""
    size, settings = len(evaluation.measured), evaluation.settings
    yield f"{size} of {len(evaluation.outcomes)} examples measured, {settings['model']}"
    if evaluation.added:
        yield f"{added(evaluation)} for comparison"
    for words, count, first in evaluation.left_out:
        yield f"{count} left out: {words}, as in row {first.row}: {first.detail}"
    if evaluation.right is not None:
        unknown = "" if evaluation.known == size else " that can be checked"
        yield f"{evaluation.right} of the {evaluation.known} answers{unknown} are right"
    for name, count in evaluation.summary.counted.items():
        if count < size:
            times, reason = evaluation.skipped.get(name, (0, ""))
            why = f"; {times} could not be run, as in {reason}" if times else ""
            yield f"{name}: {count} of {size} examples{why}"
