"""Comparison of traces: from where right and wrong answers draw flow, and through which words."""

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
    compare_measures,
    first_identical,
    sides_by_truth,
)
from flowtracer_plugin.comparison.texts import Beginning, Word, compare_beginnings, compare_words
from flowtracer_plugin.flow.arrays import check_readable
from flowtracer_plugin.result.trace_data import TraceData

JSON_SCHEMA_VERSION = 2

RIGHT_AND_WRONG = ("right", "wrong")
HIGHEST_AND_LOWEST = ("highest", "lowest")
"""The names of the two values that are compared if there are no sides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origins:
    """The parts of the text from which flow enters the answer's line, as shares that sum to 1.

    Attributes:
        prompt: The share from the prompt.
        early: The share from the first third of the response's tokens before that line.
        middle: The share from the second third.
        late: The share from the last third.
    """

    prompt: float
    early: float
    middle: float
    late: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedTrace:
    """One trace in numbers.

    Attributes:
        label: Its name in the comparison.
        right: Whether its answer is right; None if that is unknown.
        answer: Text of the answer.
        model: Name of the model.
        prompt_tokens: Length of the prompt.
        response_tokens: Length of the response.
        reasoning_share: See `TraceData.reasoning_share`.
        stops: The number of the response's tokens, without the answer, through which the unit of
            flow passes on average.
        origins: The parts of the text from which flow enters the answer's line.
        same_as: Number of the first trace with the same text and flow; None if this is the first.
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
"""The measures of a whole trace, in the order of `Comparison.measures`."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Comparison:
    """The differences between traces.

    Attributes:
        traces: The traces in numbers, in the given order.
        sides: The groups that are compared: right and wrong traces, or two single traces; None if
            there are no two groups.
        beginning: The shared beginning of all traces.
        words: The words that flow passes in the responses, without the answers' tokens.
        measures: The differences of whole traces, in the order of `MEASURES`.
        tokens: The tokens of the shared beginning.
    """

    traces: tuple[ComparedTrace, ...]
    sides: Sides | None
    beginning: Beginning
    words: tuple[Word, ...]
    measures: Contrast
    tokens: tuple[str, ...]

    @property
    def names(self) -> tuple[str, str]:
        """The names of `first` and `second` in all contrasts."""
        return HIGHEST_AND_LOWEST if self.sides is None else self.sides.names

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain Python values."""
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
    """The differences between traces with right and with wrong answers.

    Without both right and wrong answers in `right`, two traces are compared with each other, and
    for more traces the highest and the lowest values are reported.

    Args:
        traces: Traces of one tokenizer, usually of one prompt.
        labels: Their names; letters by default.
        right: Whether each answer is right; None for unknown.

    Raises:
        ValueError: There are fewer than two traces, there are more or fewer labels or truths than
            traces, or the traces come from different tokenizers.
    """
    labels, truths = _checked(traces, labels, right)
    same = first_identical(
        [(truth, *trace.token_ids.tolist()) for trace, truth in zip(traces, truths, strict=True)],
        [trace.throughput for trace in traces],
    )
    sides = sides_by_truth(RIGHT_AND_WRONG, truths, same)
    if sides is None and len(traces) == 2:
        sides = Sides(names=(labels[0], labels[1]), first=(0,), second=(1,))
    compared = tuple(map(_in_numbers, traces, labels, truths, same, range(len(traces))))
    ids = [trace.token_ids.tolist() for trace in traces]
    pieces, flows = [trace.tokens for trace in traces], [trace.throughput for trace in traces]
    beginning = compare_beginnings(ids, pieces, flows, sides)
    return Comparison(
        traces=compared,
        sides=sides,
        beginning=beginning,
        words=compare_words(pieces, flows, list(map(_reasoning, traces)), sides),
        measures=compare_measures(np.array([_measures(trace) for trace in compared]), sides),
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
        stops=stops(trace),
        origins=origins(trace),
        same_as=None if same == number else same,
    )


def stops(trace: TraceData) -> float:
    """The number of response tokens outside the answer that a unit of flow passes on average."""
    return float(trace.throughput[_reasoning(trace)].sum(dtype=float))


def origins(trace: TraceData) -> Origins:
    """The parts of the text from which flow enters the answer's line or sentence, in one hop."""
    bounds = np.array(trace.outline.bounds)
    starts, stops = bounds.T
    line = int(np.searchsorted(stops, trace.spans.target.argmax(), side="right"))
    # All of the flow enters this line or a later one exactly once.
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
    check_readable("right", right)
    for name, given in (("labels", labels), ("right", right)):
        if given is not None and len(given) != count:
            raise ValueError(
                f"wanted one of {name} for each of the {count} traces, found {len(given)}"
            )
    if labels is None:
        few = count <= len(string.ascii_uppercase)
        labels = [string.ascii_uppercase[at] if few else str(at + 1) for at in range(count)]
    _check_tokenizers(traces, labels)
    # Numpy's booleans are not `True`.
    truths = (
        [None] * count if right is None else [one if one is None else bool(one) for one in right]
    )
    return labels, truths


def _check_tokenizers(traces: Sequence[TraceData], labels: Sequence[str]) -> None:
    known: dict[int, tuple[str, str]] = {}
    for trace, label in zip(traces, labels, strict=True):
        for token, piece in zip(trace.token_ids.tolist(), trace.tokens, strict=True):
            text = piece.strip()
            # The text of tokens with parts of characters depends on their neighbours.
            if not text or not text.isascii():
                continue
            before, other = known.setdefault(token, (text, label))
            if before != text:
                raise ValueError(
                    "wanted traces of one tokenizer, but token "
                    f"{token} is {before!r} in {other} and {text!r} in {label}; "
                    "compare traces of models that share a tokenizer"
                )
