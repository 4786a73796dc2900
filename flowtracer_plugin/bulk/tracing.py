"""Rows of data to results: each row is traced, or its result says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool
from transformers import PreTrainedTokenizerBase

from flowtracer_plugin.bulk.examples import Columns, Example
from flowtracer_plugin.bulk.row_errors import EVERY_ROW, ONE_ROW, in_words
from flowtracer_plugin.bulk.rows import Row, chosen_columns, open_rows, windows
from flowtracer_plugin.bulk.traced_row import TracedRow
from flowtracer_plugin.credit.own_scorers import Measure, scorer_name
from flowtracer_plugin.credit.token_scores import score_text, token_score
from flowtracer_plugin.model.generation import breaks_off, generate_many
from flowtracer_plugin.text.answers import same_answer
from flowtracer_plugin.text.encoding import check_turn, encode_prompt, encode_response, user_text
from flowtracer_plugin.text.spans import turns_mask
from flowtracer_plugin.trace.flow_trace import FlowTrace
from flowtracer_plugin.trace.found_text import FoundText
from flowtracer_plugin.trace.tracer import FlowTracer

BATCH = 8
"""Texts in a forward pass: three times as fast as one by one on the embedded reasoner."""

Given = TypeVar("Given")
Made = TypeVar("Made")

WINDOW = 64
"""Rows among which `trace_many` looks for texts of like length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowOptions:
    """How rows are traced: the options of `trace_many`.

    Attributes:
        columns: From `Columns.chosen`.
        scores: The names of scores.
        max_new_tokens: Length of the model's answers.
        batch_size: Texts in one forward pass.
    """

    columns: Columns
    scores: tuple[str, ...] = ()
    max_new_tokens: int = 256
    batch_size: int = BATCH

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: There is no such score, or a number is below 1.
        """
        for name in self.scores:
            token_score(name)
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")


def trace_many(
    tracer: FlowTracer,
    rows: Any,
    *,
    columns: Columns | None = None,
    scores: Sequence[str | Measure] = (),
    max_new_tokens: int = 256,
    batch_size: int = BATCH,
) -> Iterator[TracedRow]:
    """The result of each row, in the order of the rows; a bad row has an error and ends nothing.

    Texts of like length, among 64 rows at a time, share a forward pass. `trace_dataset` writes
    tables and continues after a crash.

    Args:
        tracer: Made with `wrap`.
        rows: Mappings, such as dicts or the rows of a data set; or the name of a data set or file.
            The columns are `prompt`, `question` or `messages`; `response`, or `prompt_ids` and
            `completion_ids`; and `answer`. All others are carried through.
        columns: Other names of these columns, and templates for the prompts.
        scores: Scores of the tokens, such as `"flow:sharp"`, or functions of your own that stand
            at the top of a module; they take a trace that is not streamed.
        max_new_tokens: The model answers rows without a response, with so many tokens at most.
        batch_size: Texts in one forward pass.

    Raises:
        ValueError: There are no rows, a column is missing in the first row, or there is no such
            score.
        NoAttentionError, UnsupportedArchitectureError: The tracer cannot read the model.
    """
    if isinstance(rows, str | Path | Mapping) or hasattr(rows, "columns"):  # of pandas
        rows = open_rows(rows)
    parts = iter(windows(rows, WINDOW))
    first = next(parts, None)
    if first is None:
        raise ValueError("there are no rows to trace")
    options = RowOptions(
        columns=chosen_columns((row for _, row in first), columns or Columns()),
        scores=tuple(dict.fromkeys(map(scorer_name, scores))),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    return chain.from_iterable(
        sorted(trace_rows(tracer, part, options), key=lambda result: result.row)
        for part in chain([first], parts)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Text:
    """A row on its way: its result so far, its token ids, and what the user said in it.

    Attributes:
        user_text: The user's last message.
        turns: The prompt's tokens of all that the user said; None if that is not known.
    """

    result: TracedRow
    prompt_ids: list[int]
    response_ids: list[int] | None
    user_text: str | None
    turns: Bool[np.ndarray, " token"] | None

    @property
    def order(self) -> tuple[int, int]:
        """By length, then by row."""
        return len(self.prompt_ids) + len(self.response_ids or ()), self.result.row


def trace_rows(
    tracer: FlowTracer, rows: Sequence[tuple[int, Row]], options: RowOptions
) -> Iterator[TracedRow]:
    """The results of numbered rows: unreadable ones, given responses by length, then new ones.

    Raises:
        NoAttentionError, UnsupportedArchitectureError: The tracer cannot read the model.
    """
    given: list[_Text] = []
    asked: list[_Text] = []
    for number, row in rows:
        text = _read(tracer, number, row, options)
        if isinstance(text, TracedRow):
            yield text
        else:
            (asked if text.response_ids is None else given).append(text)
    for batch in _batches(given, options.batch_size):
        yield from _traced(tracer, batch, options)
    for batch in _batches(asked, options.batch_size):
        answered = _together(partial(_answers, tracer, options), batch)
        ready: list[_Text] = []
        for text, answer in zip(batch, answered, strict=True):
            if isinstance(answer, Exception):
                yield _failed(tracer, text, answer)
            else:
                result = replace(text.result, truncated=breaks_off(tracer.model, answer))
                ready.append(replace(text, response_ids=answer, result=result))
        yield from _traced(tracer, ready, options)


def _batches(texts: list[_Text], size: int) -> Iterator[list[_Text]]:
    ordered = sorted(texts, key=lambda text: text.order)
    return (ordered[start : start + size] for start in range(0, len(ordered), size))


def _read(tracer: FlowTracer, number: int, row: Row, options: RowOptions) -> _Text | TracedRow:
    """The texts of a row as token ids, or a result with the error."""
    result = TracedRow(row=number, id=str(number))
    try:
        if isinstance(row, ValueError):
            raise row
        if row.get("id") is not None:
            result = replace(result, id=str(row["id"]))
        example = options.columns.example(row, number)
        result = replace(
            result,
            digest=example.digest,
            prompt=user_text(example.prompt),
            response=example.response,
            right_answer=example.right_answer,
            columns=example.columns,
            generated=example.response is None and example.completion_ids is None,
        )
        tokenizer = tracer.require_tokenizer()
        asked, said = _ids(tokenizer, example)
        # Of token ids in the place of a text nobody knows whether they spell the messages.
        turns = None
        if example.prompt_ids is None:
            turns = turns_mask(tokenizer, example.prompt, asked, example.template_kwargs)
    except EVERY_ROW:
        raise
    except ONE_ROW as error:
        return replace(result, error=in_words(error))
    said_by_user = user_text(example.prompt) if example.prompt else None
    return _Text(
        result=result, prompt_ids=asked, response_ids=said, user_text=said_by_user, turns=turns
    )


def _ids(
    tokenizer: PreTrainedTokenizerBase, example: Example
) -> tuple[list[int], list[int] | None]:
    if example.prompt_ids is not None and example.completion_ids is not None:
        return list(example.prompt_ids), list(example.completion_ids)
    check_turn(example.prompt, example.template_kwargs)
    asked, text = encode_prompt(tokenizer, example.prompt, example.template_kwargs)
    if example.response is None:
        return asked, None
    return asked, encode_response(tokenizer, text, example.response)


def _answers(tracer: FlowTracer, options: RowOptions, texts: list[_Text]) -> list[list[int]]:
    with tracer.reader.exclusive():
        return generate_many(
            tracer.model,
            [text.prompt_ids for text in texts],
            tokenizer=tracer.require_tokenizer(),
            max_new_tokens=options.max_new_tokens,
        )


def _traced(tracer: FlowTracer, texts: list[_Text], options: RowOptions) -> Iterator[TracedRow]:
    """The results of texts that share a forward pass."""
    waiting: list[tuple[_Text, FoundText]] = []
    for text in texts:
        try:
            found = tracer.find(
                text.prompt_ids,
                text.response_ids or (),
                user_text=text.user_text,
                turns=text.turns,
            )
        except EVERY_ROW:
            raise
        except ONE_ROW as error:
            yield _failed(tracer, text, error)
        else:
            waiting.append((text, found))
    traces = _together(tracer.trace_found, [found for _, found in waiting])
    for (text, _), trace in zip(waiting, traces, strict=True):
        if isinstance(trace, Exception):
            yield _failed(tracer, text, trace)
        else:
            yield _finished(tracer, text.result, trace, options)


def _failed(tracer: FlowTracer, text: _Text, error: Exception) -> TracedRow:
    """The result of a text that cannot be traced, with its texts as the model got or gave them."""
    decode, said = tracer.require_tokenizer().decode, text.response_ids
    return replace(
        text.result,
        prompt=str(decode(text.prompt_ids)),
        response=None if said is None else str(decode(said)),
        error=in_words(error),
    )


def _together(
    do: Callable[[list[Given]], Sequence[Made]], given: list[Given]
) -> list[Made | Exception]:
    """What is made of each, or its error; if they fail together, each is tried alone."""
    if not given:
        return []
    try:
        return [*do(given)]
    except EVERY_ROW:
        raise
    except ONE_ROW as error:
        if len(given) == 1:
            return [error.with_traceback(None)]  # its frames hold the attention
    return [result for one in given for result in _together(do, [one])]


def _finished(
    tracer: FlowTracer, result: TracedRow, trace: FlowTrace, options: RowOptions
) -> TracedRow:
    start, right = trace.spans.prompt_length, result.right_answer
    result = replace(
        result,
        prompt="".join(trace.tokens[:start]),
        response="".join(trace.tokens[start:]),
        trace=trace,
        correct=None if right is None else same_answer(trace.spans.answer_text, right),
    )
    if not options.scores:
        return result
    try:
        return replace(result, scores=score_text(tracer, trace, options.scores))
    except EVERY_ROW:
        raise
    except ONE_ROW as error:
        return replace(result, error=f"no scores: {in_words(error)}")
