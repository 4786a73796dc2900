"""What an evaluation says as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from flowtracer_plugin.evaluation.run import REASONS, Example, Outcome
from flowtracer_plugin.evaluation.summaries import (
    EvaluationSummary,
    Measured,
    summarise_all,
)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Examples, and what became of them.

    Attributes:
        settings: What the results depend on, plain values.
        examples: Of the data.
        outcomes: One for each, in their order.
    """

    settings: Mapping[str, Any]
    examples: Sequence[Example]
    outcomes: Sequence[Outcome]

    @cached_property
    def measured(self) -> tuple[Measured, ...]:
        """What was found in those that count."""
        return tuple(one.measured for one in self.outcomes if one.measured is not None)

    @cached_property
    def summary(self) -> EvaluationSummary:
        """Over the examples that count."""
        return summarise_all(self.measured, seed=self.settings["options"]["seed"])

    @property
    def right(self) -> int | None:
        """How many of the answers that count are right; None if nobody knows of any."""
        return sum(self._known) if self._known else None

    @property
    def known(self) -> int:
        """Of how many answers that count the right one is known."""
        return len(self._known)

    @property
    def _known(self) -> list[bool]:
        return [one.correct for one in self.outcomes if one.measured and one.correct is not None]

    @property
    def skipped(self) -> Mapping[str, tuple[int, str]]:
        """How often a protocol could not be run, and why the first time."""
        found: dict[str, tuple[int, str]] = {}
        for one in self.outcomes:
            for name, measured in (one.measured or {}).items():
                if "skipped" in measured:
                    times, reason = found.get(name, (0, f"row {one.row}: {measured['skipped']}"))
                    found[name] = times + 1, reason
        return found

    @property
    def left_out(self) -> tuple[tuple[str, str, int, Outcome], ...]:
        """Reason, the same in words, how often, and the first example of it."""
        found = []
        for reason, words in REASONS.items():
            of_it = [one for one in self.outcomes if one.left_out == reason]
            if of_it:
                found.append((reason, words, len(of_it), of_it[0]))
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
