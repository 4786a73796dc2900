"""Knock-outs over a data set: examples in, outcomes out, as they come."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from flowtracer_plugin.credit.token_scores import TOKEN_SCORES, TokenScore
from flowtracer_plugin.evaluation.faithfulness import KnockOutOptions, TooFewTokensError
from flowtracer_plugin.evaluation.knockout import knock_out
from flowtracer_plugin.evaluation.protocols import check_protocols, measure
from flowtracer_plugin.text.answers import find_answer, same_answer
from flowtracer_plugin.text.encoding import Prompt
from flowtracer_plugin.text.result_cut import NotComputedError, cut_at_result
from flowtracer_plugin.text.spans import AnswerNotFoundError
from flowtracer_plugin.trace.flow_trace import FlowTrace
from flowtracer_plugin.trace.memory import TooLittleMemoryError
from flowtracer_plugin.trace.tracer import FlowTracer


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One question.

    Attributes:
        row: Its number in the data.
        prompt: Text or chat messages.
        response: What is traced; None if the model is to answer.
        answer: The right one, if it is known.
        columns: What else the data say of it, for reward functions.
    """

    row: int
    prompt: Prompt
    response: str | None = None
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Tells examples apart, also in another process."""
        said = json.dumps([self.prompt, self.response, self.answer])
        return blake2b(said.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one example: its effects, or why it has none.

    Attributes:
        row: Its number in the data.
        digest: Of its texts.
        left_out: Why it does not count: a key of `REASONS`, or None.
        detail: The same in words.
        measured: What `protocols.measure` found, as plain values.
        correct: Whether the answer is the right one, if that is known.
    """

    row: int
    digest: str
    left_out: str | None = None
    detail: str | None = None
    measured: Mapping[str, Any] | None = None
    correct: bool | None = None


REASONS: Mapping[str, str] = MappingProxyType(
    {
        "no_answer": "no answer was found in the response",
        "not_computed": "the answer is not computed, or stands in the response before it is",
        "not_predicted": "the model itself would have given another answer",
        "few_tokens": "too few tokens before the answer",
        "not_traced": "the text cannot be traced",
    }
)
"""Why examples are left out."""

SETTINGS = ("given", "compute")
"""Responses are judged as they are, or cut where the answer is computed: `answer_cut`."""


def evaluate(
    tracer: FlowTracer,
    examples: Iterable[Example],
    options: KnockOutOptions | None = None,
    *,
    scores: Mapping[str, TokenScore] = TOKEN_SCORES,
    protocols: Sequence[str] = ("knock_out",),
    setting: str = "given",
    max_new_tokens: int = 256,
    predicted_only: bool = True,
    batch_size: int | None = None,
) -> Iterator[Outcome]:
    """Measure examples one by one.

    Args:
        tracer: Made with `wrap(..., mode="dense")`.
        examples: Without a response, the model answers greedily.
        options: What is knocked out.
        scores: What is compared.
        protocols: Keys of `protocols.PROTOCOLS`.
        setting: `"given"`, or `"compute"`: every response is cut where its answer is computed.
        max_new_tokens: Length of the model's answers.
        predicted_only: Leave out given responses whose answer the model would not have chosen,
            token by token: what it does not say, no knock-out can take from it.
        batch_size: Cuts in one forward pass.

    Raises:
        KnockOutError: The model's attention cannot be cut.
        ValueError: There is no such protocol or setting, or as `measure_knock_outs`, for options
            and scores.
    """
    if setting not in SETTINGS:
        raise ValueError(f"setting must be one of {', '.join(SETTINGS)}, got {setting!r}")
    check_protocols(protocols)
    chosen = options or KnockOutOptions()
    for example in examples:
        known: dict[str, Any] = {"row": example.row, "digest": example.digest}
        trace = _traced_or_why(tracer, example, setting, max_new_tokens)
        if isinstance(trace, _Why):
            yield Outcome(**known, left_out=trace.reason, detail=trace.detail)
            continue
        known["correct"] = _is_right(trace.spans.answer_text, example.answer)
        if predicted_only and (doubt := _doubt(tracer, trace)) is not None:
            yield Outcome(**known, left_out="not_predicted", detail=doubt)
            continue
        try:
            measured = measure(
                tracer,
                trace,
                chosen,
                protocols=protocols,
                scores=scores,
                right=_right_answer(example.answer),
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
            )
        except TooFewTokensError as error:
            yield Outcome(**known, left_out="few_tokens", detail=str(error))
            continue
        yield Outcome(**known, measured=measured)


class _Why(NamedTuple):
    """Why an example is left out: a key of `REASONS`, and the same in words."""

    reason: str
    detail: str


def _traced_or_why(
    tracer: FlowTracer, example: Example, setting: str, max_new_tokens: int
) -> FlowTrace | _Why:
    try:
        return _traced(tracer, example, setting, max_new_tokens)
    except AnswerNotFoundError as error:
        return _Why("no_answer", str(error))
    except NotComputedError as error:
        return _Why("not_computed", str(error))
    except TooLittleMemoryError:
        return _Why("not_traced", _TOO_LONG)
    except ValueError as error:
        return _Why("not_traced", str(error))


def _traced(tracer: FlowTracer, example: Example, setting: str, max_new_tokens: int) -> FlowTrace:
    if example.response is not None:
        trace = tracer.trace(example.prompt, example.response)
    else:
        trace = tracer.generate(example.prompt, max_new_tokens=max_new_tokens)
    if setting == "given":
        return trace
    response = example.response
    if response is None:
        response = "".join(trace.tokens[trace.spans.prompt_length :])
    response = cut_at_result(response, trace.spans.answer_text)
    ends = re.compile(r"(-?[\d,.]*\d)\Z")
    return tracer.trace(example.prompt, response, answer=ends)


def _doubt(tracer: FlowTracer, trace: FlowTrace) -> str | None:
    """What speaks against the answer being the model's own, if something does."""
    ids, answer = torch.from_numpy(trace.token_ids), torch.from_numpy(trace.spans.answer)
    found = knock_out(tracer.model, ids, answer, torch.zeros(0, len(ids), dtype=torch.bool))
    if found.predicted:
        return None
    return (
        f"the tokens of {trace.spans.answer_text!r} have a mean log-probability of "
        f"{found.log_prob:.2f}, and one is not the likeliest"
    )


_TOO_LONG = (
    "the attention between all pairs of its tokens, which scores are compared on, takes more "
    "memory than is free"
)


def _is_right(said: str, wanted: str | None) -> bool | None:
    right = _right_answer(wanted)
    return None if right is None else same_answer(said, right)


def _right_answer(wanted: str | None) -> str | None:
    """The answer alone, where the data bring a whole solution."""
    found = None if wanted is None else find_answer(wanted)
    return wanted if found is None or wanted is None else wanted[found.start : found.end]
