"""What carried an answer, in a sentence each: what it hangs on, and where most flow passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flowtracer_plugin.report.display import ShownTrace, Unit
from flowtracer_plugin.report.drawing import StepRow, step_row
from flowtracer_plugin.result.standouts import is_mark

MOST_TOKENS, MOST_STEPS = 5, 3

LEAST_DROP = 0.05
"""The least drop, in nats, of a token that an answer hangs on."""

FIRST_TOKEN = "first token, where attention often only rests"
"""The note beside a path that begins at the first token."""

_TOLD = ("question", "response")
"""The parts of a text that people read; the rest is the chat template and the answer itself."""

_ROUNDING = 1e-6
"""What is left of a step's inflow, by rounding alone, if all of it begins at the first token."""


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


@dataclass(frozen=True, kw_only=True)
class MostMissed:
    """The token without which the answer loses most, of those that were knocked out one by one.

    Attributes:
        unit: The token, or the tokens that spell one character.
        drop: The fall of the answer's log-probability without it, in nats.
        measured: How many tokens were knocked out.
    """

    unit: Unit
    drop: float
    measured: int

    @property
    def among(self) -> str:
        """The tokens that were knocked out, in words."""
        return f"the {self.measured} token{'s' * (self.measured > 1)} measured"

    @property
    def matters(self) -> bool:
        """Whether the answer hangs on it."""
        return self.drop >= LEAST_DROP


def most_missed(shown: ShownTrace, drops: Mapping[int, float] | None) -> MostMissed | None:
    """The token that the answer hangs on most; None if none was knocked out."""
    if not drops:
        return None
    token = max(sorted(drops), key=lambda one: drops[one])
    return MostMissed(unit=shown.unit_of(token), drop=drops[token], measured=len(drops))


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


@dataclass(frozen=True, kw_only=True)
class LeadingStep:
    """A step that much flow enters.

    Attributes:
        row: The step.
        inflow: The flow that enters it, without what begins at the first token of the text.
        without_first: Whether some flow begins at the first token, in this step.
    """

    row: StepRow
    inflow: float
    without_first: bool


def leading_steps(shown: ShownTrace) -> tuple[LeadingStep, ...]:
    """The steps that most flow enters, but for the chat template and those that hold its end.

    In a chat, they may be the words of the system or of an earlier answer, outside the question.

    What begins at the first token does not count: attention often only rests there.
    """
    steps = [_leading(shown, step_row(shown, index)) for index in range(len(shown.steps.steps))]
    ends = shown.trace.spans.target | shown.trace.spans.answer
    told = [
        one
        for one in steps
        if (one.row.region in _TOLD or _is_said(shown, one.row))
        and one.inflow > _ROUNDING
        and not ends[one.row.step.start : one.row.step.stop].any()
        and (one.row.region == "prompt" or not is_template(shown, one.row))
    ]
    return tuple(sorted(told, key=lambda one: (-one.inflow, one.row.number))[:MOST_STEPS])


def _leading(shown: ShownTrace, row: StepRow) -> LeadingStep:
    first = float(shown.trace.backbone.source[0]) if row.step.start == 0 else 0.0
    return LeadingStep(row=row, inflow=row.step.inflow - first, without_first=first > 0)


def is_template(shown: ShownTrace, row: StepRow) -> bool:
    """Whether a step is a mark of the chat template and the name of a role."""
    units = shown.units[row.first : row.last + 1]
    return any(unit.region == "prompt" for unit in units) and sum(map(_is_told, units)) < 2


def _is_said(shown: ShownTrace, row: StepRow) -> bool:
    """Whether a step outside the question has words, as of the system or of an earlier answer.

    Beside its marks, a chat template has the name of a role at most, which is one word.
    """
    units = shown.units[row.first : row.last + 1]
    words = "".join(" " if is_mark(unit.text) else unit.text for unit in units).split()
    return row.region == "prompt" and sum(any(map(str.isalnum, word)) for word in words) > 1


def nats(drop: float) -> str:
    """How many nats an answer loses, with two decimals; below zero if it becomes likelier."""
    return f"{drop:z.2f}".replace("-", "−")
