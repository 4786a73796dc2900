"""Traces side by side: where do right and wrong answers draw from, and what do they pass?"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

from flowtracer_plugin.comparison.permutation import (
    Contrast,
    Sides,
    contrast,
    first_equals,
    two_sides,
)
from flowtracer_plugin.comparison.texts import Beginning, Word, contrast_beginning, contrast_words
from flowtracer_plugin.result.trace_data import TraceData

JSON_SCHEMA_VERSION = 1

RIGHT_AND_WRONG = ("right", "wrong")
HIGHEST_AND_LOWEST = ("highest", "lowest")
"""What is compared where no two sides are known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origins:
    """From where flow enters the line of the answer, as shares that sum to 1.

    Attributes:
        prompt: From the prompt.
        early: From the first third of the response's tokens before that line.
        middle: From the second third.
        late: From the last one.
    """

    prompt: float
    early: float
    middle: float
    late: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedTrace:
    """One trace in numbers.

    Attributes:
        label: What it is called.
        right: Whether its answer is right; None if that is unknown.
        answer: Text of the answer.
        model: Name of the model.
        prompt_tokens: Length of the prompt.
        response_tokens: Length of the response.
        reasoning_share: See `TraceData.reasoning_share`.
        stops: How many of the response's tokens before and around the answer a unit of flow passes
            on its way, on average.
        origins: From where flow enters the line of the answer.
        same_as: Number of the first trace that says, and routes, the same; None if this is it.
            Such traces count once.
    """

    label: str
    right: bool | None
    answer: str
    model: str
    prompt_tokens: int
    response_tokens: int
    reasoning_share: float
    stops: float
    origins: Origins
    same_as: int | None


MEASURES = ("reasoning_share", "prompt", "early", "middle", "late", "stops", "response_tokens")
"""What is known of each trace as a whole, in the order of `Comparison.measures`."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Comparison:
    """What traces do differently.

    Attributes:
        traces: The traces in numbers, in the order in which they came.
        sides: What is compared with what: right with wrong, or of two traces the one with the
            other; None if there are no two sides.
        beginning: What all of them begin with.
        words: Which words the flow passes in the responses, without the answers' tokens.
        measures: How the traces as a whole differ, in the order of `MEASURES`.
        tokens: The tokens that all begin with.
    """

    traces: tuple[ComparedTrace, ...]
    sides: Sides | None
    beginning: Beginning
    words: tuple[Word, ...]
    measures: Contrast
    tokens: tuple[str, ...]

    @property
    def names(self) -> tuple[str, str]:
        """What `first` and `second` stand for in all contrasts."""
        return HIGHEST_AND_LOWEST if self.sides is None else self.sides.names

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values."""
        sides, beginning = self.sides, self.beginning
        return {
            "schema": JSON_SCHEMA_VERSION,
            "traces": [asdict(trace) for trace in self.traces],
            "first": self.names[0],
            "second": self.names[1],
            "sides": sides and {"first": sides.first, "second": sides.second},
            "deals": sides and sides.deals,
            "measures": dict(zip(MEASURES, self.measures.columns(), strict=True)),
            "beginning": [
                {"text": text, **numbers}
                for text, numbers in zip(self.tokens, beginning.contrast.columns(), strict=True)
            ],
            "continuations": [asdict(way) for way in beginning.continuations],
            "words": [asdict(word) for word in self.words],
        }


def compare(
    traces: Sequence[TraceData],
    *,
    labels: Sequence[str] | None = None,
    right: Sequence[bool | None] | None = None,
) -> Comparison:
    """What the traces do differently, those with right answers against those with wrong ones.

    Where `right` does not name both right and wrong ones, two traces are compared with each other;
    of more, the highest and the lowest value is told.

    Args:
        traces: Of one tokenizer; usually of one prompt.
        labels: What they are called; letters by default.
        right: Whether each answer is right; None for unknown.

    Raises:
        ValueError: There are fewer than two traces, there are more or fewer labels or truths than
            traces, or the traces come from different tokenizers.
    """
    labels, truths = _checked(traces, labels, right)
    same = first_equals(
        [(truth, *trace.token_ids.tolist()) for trace, truth in zip(traces, truths, strict=True)],
        [trace.throughput for trace in traces],
    )
    sides = two_sides(RIGHT_AND_WRONG, truths, same)
    if sides is None and len(traces) == 2:
        sides = Sides(names=(labels[0], labels[1]), first=(0,), second=(1,))
    compared = tuple(map(_in_numbers, traces, labels, truths, same, range(len(traces))))
    ids = [trace.token_ids.tolist() for trace in traces]
    pieces, flows = [trace.tokens for trace in traces], [trace.throughput for trace in traces]
    beginning = contrast_beginning(ids, pieces, flows, sides)
    return Comparison(
        traces=compared,
        sides=sides,
        beginning=beginning,
        words=contrast_words(pieces, flows, list(map(_reasoning, traces)), sides),
        measures=contrast(np.array([_measures(trace) for trace in compared]), sides),
        tokens=traces[0].tokens[: beginning.length],
    )


def _reasoning(trace: TraceData) -> Bool[np.ndarray, " token"]:
    return trace.spans.response & ~trace.spans.answer


def _in_numbers(
    trace: TraceData, label: str, right: bool | None, same: int, number: int
) -> ComparedTrace:
    prompt = trace.spans.prompt_length
    return ComparedTrace(
        label=label,
        right=right,
        answer=trace.spans.answer_text,
        model=trace.model,
        prompt_tokens=prompt,
        response_tokens=len(trace.tokens) - prompt,
        reasoning_share=trace.reasoning_share,
        stops=float(trace.throughput[_reasoning(trace)].sum(dtype=float)),
        origins=origins(trace),
        same_as=None if same == number else same,
    )


def origins(trace: TraceData) -> Origins:
    """From where flow enters the line (or sentence) of the answer: the last hop into it."""
    bounds = np.array(trace.outline.bounds)
    starts, stops = bounds.T
    line = int(np.searchsorted(stops, trace.spans.target.argmax(), side="right"))
    # Lines follow each other, so that flow enters this one, or those from it on, exactly once.
    entering = trace.backbone.steps[line:, :line].sum(0, dtype=float)
    prompt = trace.spans.prompt_length
    length = max(int(starts[line]) - prompt, 1)
    third = 3 * ((starts + stops)[:line] / 2 - prompt) // length
    early, middle, late = (float(entering[third == part].sum()) for part in range(3))
    return Origins(
        prompt=max(1 - early - middle - late, 0.0), early=early, middle=middle, late=late
    )


def _measures(trace: ComparedTrace) -> list[float]:
    values = {**asdict(trace), **asdict(trace.origins)}
    return [float(values[name]) for name in MEASURES]


def _checked(
    traces: Sequence[TraceData],
    labels: Sequence[str] | None,
    right: Sequence[bool | None] | None,
) -> tuple[Sequence[str], Sequence[bool | None]]:
    count = len(traces)
    if count < 2:
        raise ValueError(f"wanted at least two traces to compare, found {count}")
    for name, given in (("labels", labels), ("right", right)):
        if given is not None and len(given) != count:
            raise ValueError(
                f"wanted one of {name} for each of the {count} traces, found {len(given)}"
            )
    if labels is None:
        few = count <= len(string.ascii_uppercase)
        labels = [string.ascii_uppercase[at] if few else str(at + 1) for at in range(count)]
    _check_tokenizers(traces, labels)
    # Comparing numbers gives numpy's own truths, which are not `True`.
    truths = (
        [None] * count if right is None else [one if one is None else bool(one) for one in right]
    )
    return labels, truths


def _check_tokenizers(traces: Sequence[TraceData], labels: Sequence[str]) -> None:
    known: dict[int, tuple[str, str]] = {}
    for trace, label in zip(traces, labels, strict=True):
        for token, piece in zip(trace.token_ids.tolist(), trace.tokens, strict=True):
            text = piece.strip()
            # Tokens that hold parts of characters read differently from text to text.
            if not text or not text.isascii():
                continue
            before, other = known.setdefault(token, (text, label))
            if before != text:
                raise ValueError(
                    "wanted traces of one tokenizer, but token "
                    f"{token} is {before!r} in {other} and {text!r} in {label}; "
                    "compare traces of models that share a tokenizer"
                )
