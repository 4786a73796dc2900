"""What carried an answer, in a sentence each: the tokens and the steps with the most flow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flowtracer_plugin.report.display import ShownTrace, Unit
from flowtracer_plugin.report.drawing import StepRow, step_row

MOST_TOKENS, MOST_STEPS = 5, 3

_TOLD = ("question", "response")
"""The parts of a text that people read; the rest is the chat template and the answer itself."""


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """A token with much flow, or the tokens that spell one character.

    Attributes:
        unit: The token.
        drop: The fall of the answer's log-probability when it is knocked out, in nats; None if
            that was not measured.
    """

    unit: Unit
    drop: float | None


def carriers(shown: ShownTrace, drops: Mapping[int, float] | None = None) -> tuple[Carrier, ...]:
    """The tokens with the most flow, but for the chat template and those where flow ends.

    Blanks and formatting are left out too, unless they have more flow than all other tokens.
    """
    ends = shown.trace.spans.target
    told = [
        unit
        for unit in shown.units
        if unit.region in _TOLD
        and unit.throughput > 0
        and not ends[unit.first : unit.last + 1].any()
    ]
    most = max((unit.throughput for unit in told if not shown.empty[unit.index]), default=0.0)
    told = [unit for unit in told if not shown.empty[unit.index] or unit.throughput > most]
    best = sorted(told, key=lambda unit: (-unit.throughput, unit.index))[:MOST_TOKENS]
    return tuple(Carrier(unit=unit, drop=drop_of(unit, drops)) for unit in best)


def _is_told(unit: Unit) -> bool:
    return unit.region in _TOLD and not unit.text.isspace()


def drop_of(unit: Unit, drops: Mapping[int, float] | None) -> float | None:
    """The largest fall that was measured for one of the unit's tokens; None if there is none."""
    measured = drops or {}
    tokens = range(unit.first, unit.last + 1)
    return max((measured[token] for token in tokens if token in measured), default=None)


def leading_steps(shown: ShownTrace) -> tuple[StepRow, ...]:
    """The steps that most flow enters, but for the chat template and those that hold its end."""
    rows = [step_row(shown, index) for index in range(len(shown.steps.steps))]
    ends = shown.trace.spans.target | shown.trace.spans.answer
    told = [
        row
        for row in rows
        if row.region in _TOLD
        and row.step.inflow > 0
        and not ends[row.step.start : row.step.stop].any()
        and not is_template(shown, row)
    ]
    return tuple(sorted(told, key=lambda row: (-row.step.inflow, row.number))[:MOST_STEPS])


def is_template(shown: ShownTrace, row: StepRow) -> bool:
    """Whether a step is a mark of the chat template and the name of a role."""
    units = shown.units[row.first : row.last + 1]
    return any(unit.region == "prompt" for unit in units) and sum(map(_is_told, units)) < 2


def nats(drop: float) -> str:
    """By how many nats an answer becomes likelier (+) or less likely (−), with two decimals."""
    return f"{-drop:+.2f}".replace("-", "−").replace("−0.00", "0.00").replace("+0.00", "0.00")
