"""How two groups of rollouts differ, in numbers that the tables of a data set hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from flowtracer_plugin.comparison.different import Different
from flowtracer_plugin.comparison.permutation import Contrast, Sides, effects
from flowtracer_plugin.comparison.texts import Word

JSON_SCHEMA_VERSION = 1

FLOW_MEASURES = (
    "reasoning_share",
    "concentration",
    "from_prompt",
    "from_early",
    "from_middle",
    "from_late",
    "stops",
)
"""Measures of the flow that the table of answers holds."""

ANSWER_MEASURES = (*FLOW_MEASURES, "question_reached", "prompt_tokens", "response_tokens")
"""All measures that the table of answers holds."""

PARTS = ("in_question", "in_prompt", "in_answer")
"""The tokens of a part that a unit of flow passes on average; `stops` is that of the reasoning."""

TENTHS = tuple(f"tenth_{number}" for number in range(1, 11))
"""The share of the reasoning's flow that passes each tenth of its tokens."""

MEASURES = (*ANSWER_MEASURES, *PARTS, *TENTHS)
"""What is compared for each rollout, in the order of `GroupComparison.measures`."""

MOST_WORDS = 1_000
"""The most words that are compared: those with the most flow, whichever group it is in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownRollout:
    """A rollout that is shown as an example.

    Attributes:
        row: Its number in the data.
        id: Its name in the data, or its number.
        prompt: The prompt.
        answer: The answer that was found.
        right_answer: The right answer, if it is known.
        page: The file of its page, if it has one.
    """

    row: int
    id: str
    prompt: str | None = None
    answer: str | None = None
    right_answer: str | None = None
    page: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GroupComparison:
    """The differences between two groups of rollouts.

    Attributes:
        by: The column of the answers that tells the groups.
        sides: The compared rollouts of each group, by their place in `rows`.
        rows: The numbers of the compared rollouts in the data, ascending.
        left_out: How many rollouts are not compared, by the reason.
        done: The rows of the data that are traced.
        total: All rows of the data.
        settings: What the rollouts were traced with.
        values: The measures of each rollout, in the order of `MEASURES`.
        measures: Their differences; corrected for their number in standard deviations.
        words: The words that flow passes in the responses, without the answers' tokens; at most
            `MOST_WORDS`.
        words_found: The number of words in at least two rollouts.
        different: The most different pairs of rollouts.
        examples: The rollouts of these pairs.
    """

    by: str
    sides: Sides
    rows: Int[np.ndarray, " rollout"]
    left_out: Mapping[str, int]
    done: int
    total: int
    settings: Mapping[str, Any]
    values: Float[np.ndarray, "rollout measure"]
    measures: Contrast
    words: tuple[Word, ...]
    words_found: int
    different: Different
    examples: tuple[tuple[ShownRollout, ShownRollout], ...]

    @property
    def names(self) -> tuple[str, str]:
        """The names of the groups."""
        return self.sides.names

    @property
    def sizes(self) -> tuple[int, int]:
        """The number of compared rollouts in each group."""
        return len(self.sides.first), len(self.sides.second)

    @property
    def effects(self) -> Float[np.ndarray, " measure"]:
        """The difference of each measure in standard deviations of all compared rollouts."""
        return effects(self.values, self.sides)

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain Python values, without those of single rollouts."""
        numbers = zip(MEASURES, self.measures.columns(), self.effects.tolist(), strict=True)
        pairs = enumerate(self.examples)
        return {
            "schema": JSON_SCHEMA_VERSION,
            "by": self.by,
            "groups": [
                {"name": name, "rollouts": size}
                for name, size in zip(self.names, self.sizes, strict=True)
            ],
            "left_out": dict(self.left_out),
            "rows": {"done": self.done, "total": self.total},
            "assignments": self.sides.tried,
            "measures": {name: {**one, "effect": effect} for name, one, effect in numbers},
            "words": [asdict(word) for word in self.words],
            "most_different": {
                "measure": self.different.measure,
                "pairs": [
                    {
                        "first": first.row,
                        "second": second.row,
                        "same_prompt": at < self.different.same_prompt,
                    }
                    for at, (first, second) in pairs
                ],
            },
        }
