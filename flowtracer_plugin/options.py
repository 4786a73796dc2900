"""How a trace is made: the choices that the paper leaves open, alone and as presets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypedDict

Heads = str | float | tuple[tuple[int, int], ...]

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper": {},
        "decision": {"target": "decision", "question_weights": "reach"},
        "sharp": {
            "target": "decision",
            "question_weights": "reach",
            "heads": 0.3,
            "edges": "value",
        },
    }
)
"""What each preset sets, the rest being as in the paper.

Flow to the rows whose logits choose the answer, injected where it can arrive ("decision"), and this
along the edges of the heads with which these rows look at the reasoning, weighed by what they move
("sharp"): of the configurations that were measured, the one whose top tokens an answer hung on
most.
"""


class Solving(TypedDict):
    """The options of `solve_flow`, under its own names."""

    question_weights: str
    boundary: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowOptions:
    """How a trace is made. The defaults are the paper's.

    Attributes:
        layers: `"middle"` third of the attention layers, `"early"`, `"late"`, `"all"`, five evenly
            spaced ones as `"middle:5"`, or layer numbers.
        question: `"prompt"` (without special tokens and never the first), `"all"`, or `"user"`;
            `"mask"` says that `trace` was given one.
        answer: How the answer is found in the response.
        target: Rows of the answer tokens, or `"decision"`: of the tokens before them, whose logits
            choose them.
        question_weights: Flow is injected in equal parts, or in proportion to `"reach"`.
        boundary: `"literal"`, or `"absorbing"`: flow ends at the first answer token it meets.
        first_token: `"keep"`, or `"drop"`: what is paid to the first token, a common attention
            sink, goes to the others in proportion.
        heads: `"all"`, the share of the layers' heads with the most attention from the target's
            rows to the response up to five tokens before the answer, such as 0.3, or (layer, head)
            pairs.
        edges: `"attention"`, or `"value"`: each head's attention times the length of what it moves,
            `‖W_O v‖`; rows of the mean keep their sum.
    """

    layers: str | tuple[int, ...] = "middle"
    question: str = "prompt"
    answer: str = "auto"
    target: str = "answer"
    question_weights: str = "uniform"
    boundary: str = "literal"
    first_token: str = "keep"
    heads: Heads = "all"
    edges: str = "attention"

    def __post_init__(self) -> None:
        """Refuse values that no option has.

        Raises:
            ValueError: A value is not among the choices.
        """
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if not _is_heads(self.heads):
            raise ValueError(
                "heads must be 'all', a share of them above 0 and up to 1, or (layer, head) pairs, "
                f"got {self.heads!r}"
            )

    @property
    def solving(self) -> Solving:
        """The options of `solve_flow`, to be passed on with `**`."""
        return {"question_weights": self.question_weights, "boundary": self.boundary}

    @property
    def plain(self) -> bool:
        """Whether the edges are the mean attention of all heads."""
        return self.heads == "all" and self.edges == "attention"


CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "question": ("prompt", "all", "user", "mask"),
        "target": ("answer", "decision"),
        "question_weights": ("uniform", "reach"),
        "boundary": ("literal", "absorbing"),
        "first_token": ("keep", "drop"),
        "edges": ("attention", "value"),
    }
)
"""Of the options that have a few names for values."""


def flow_options(preset: str = "paper", **chosen: Any) -> FlowOptions:
    """The options of a preset, with those in their place that are not None.

    Raises:
        ValueError: There is no such preset, or a value is not among the choices.

    Examples:
        >>> flow_options("sharp", target="answer").heads
        0.3
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    given = {name: value for name, value in chosen.items() if value is not None}
    return FlowOptions(**{**PRESETS[preset], **given})


def head_pairs(heads: str | float | Iterable[Iterable[int]]) -> Heads:
    """The option `heads`, with pairs as tuples; other things come back as they are."""
    if isinstance(heads, str | int | float):
        return heads
    return tuple(sorted({(int(layer), int(head)) for layer, head in heads}))


def _is_heads(heads: Any) -> bool:
    if isinstance(heads, str):
        return heads == "all"
    if isinstance(heads, bool) or not isinstance(heads, int | float):
        return isinstance(heads, tuple) and len(heads) > 0
    return 0 < heads <= 1
