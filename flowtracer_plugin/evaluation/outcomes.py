"""The outcome of each example, and an evaluation: all outcomes with their totals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from flowtracer_plugin.bulk.examples import Example
from flowtracer_plugin.evaluation.summary import (
    BASELINES,
    EvaluationSummary,
    Measured,
    summarise_all,
)

__all__ = ["REASONS", "Evaluation", "Example", "Outcome", "document"]

REASONS: Mapping[str, str] = MappingProxyType(
    {
        "no_answer": "no answer was found in the response",
        "not_computed": "the answer is not computed, or appears before it is computed",
        "not_predicted": "the model itself would have given another answer",
        "few_tokens": "too few tokens before the answer",
        "invalid_score": "a score is invalid",
        "not_traced": "the text cannot be traced",
    }
)
"""Why examples are left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What was measured in one example, or why it was left out.

    Attributes:
        row: Its number in the data.
        digest: The digest of its texts.
        left_out: Why the example does not count: a key of `REASONS`, or None.
        detail: The reason in words.
        measured: What `protocols.measure` found, as plain values.
        correct: Whether the answer is the right one, if that is known.
    """

    row: int
    digest: str
    left_out: str | None = None
    detail: str | None = None
    measured: Mapping[str, Any] | None = None
    correct: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Examples and their outcomes.

    Attributes:
        settings: All that the results depend on, as plain values.
        examples: The examples of the data.
        outcomes: The outcome of each example, in the order of the examples.
        asked: The scores that were asked for by name; none if the usual ones are compared.
    """

    settings: Mapping[str, Any]
    examples: Sequence[Example]
    outcomes: Sequence[Outcome]
    asked: Sequence[str] = ()

    @property
    def added(self) -> tuple[str, ...]:
        """The scores that are there for comparison only: the flow and one hop of attention."""
        unasked = set(self.settings["scores"]) - {*self.asked} if self.asked else set()
        return tuple(name for name in ("flow", BASELINES["one_hop"]) if name in unasked)

    @cached_property
    def measured(self) -> tuple[Measured, ...]:
        """What was measured in the examples that count."""
        return tuple(one.measured for one in self.outcomes if one.measured is not None)

    @cached_property
    def summary(self) -> EvaluationSummary:
        """The summaries over the examples that count."""
        return summarise_all(self.measured, seed=self.settings["options"]["seed"])

    @property
    def right(self) -> int | None:
        """How many of the answers that count are right; None if no right answer is known."""
        return sum(self._correct) if self._correct else None

    @property
    def known(self) -> int:
        """The number of examples that count and whose right answer is known."""
        return len(self._correct)

    @property
    def _correct(self) -> list[bool]:
        return [one.correct for one in self.outcomes if one.measured and one.correct is not None]

    @property
    def skipped(self) -> Mapping[str, tuple[int, str]]:
        """For each protocol, in how many examples it could not be run, and the first reason."""
        found: dict[str, tuple[int, str]] = {}
        for one in self.outcomes:
            for name, measured in (one.measured or {}).items():
                if "skipped" in measured:
                    times, reason = found.get(name, (0, f"row {one.row}: {measured['skipped']}"))
                    found[name] = times + 1, reason
        return found

    @property
    def left_out(self) -> tuple[tuple[str, int, Outcome], ...]:
        """Each reason in words, how many examples it applies to, and the first of them."""
        found = []
        for reason, words in REASONS.items():
            ones = [one for one in self.outcomes if one.left_out == reason]
            if ones:
                found.append((words, len(ones), ones[0]))
        return tuple(found)


def document(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation as plain values."""
    return {
        "settings": dict(evaluation.settings),
        "examples": len(evaluation.outcomes),
        "measured": len(evaluation.measured),
        "left_out": Counter(one.left_out for one in evaluation.outcomes if one.left_out),
        "right": evaluation.right,
        **asdict(evaluation.summary),
    }
