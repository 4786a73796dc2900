"""Rows of data to results: each row is traced, or its result says why not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from flowtracer_plugin.bulk.examples import Columns, Example
from flowtracer_plugin.bulk.row_errors import EVERY_ROW, ONE_ROW, in_words
from flowtracer_plugin.bulk.rows import Row, chosen_columns, open_rows, windows
from flowtracer_plugin.bulk.traced_row import TracedRow
from flowtracer_plugin.credit.token_scores import score_text, token_score
from flowtracer_plugin.text.answers import same_answer
from flowtracer_plugin.text.encoding import encode_prompt, encode_response, user_text
from flowtracer_plugin.trace.flow_trace import FlowTrace
from flowtracer_plugin.trace.found_text import FoundText
from flowtracer_plugin.trace.tracer import FlowTracer

BATCH = 8
"""Texts in a forward pass: three times as fast as one by one on the embedded reasoner."""

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
    scores: Sequence[str] = (),
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
        scores: Scores of the tokens, such as `"flow:sharp"`; they take a trace that is not
            streamed.
        max_new_tokens: The model answers rows without a response, with so many tokens at most.
        batch_size: Texts in one forward pass.

    Raises:
        ValueError: There are no rows, a column is missing in the first row, or there is no such
            score.
        NoAttentionError, UnsupportedArchitectureError: The tracer cannot read the model.
    """
    rows = open_rows(rows) if isinstance(rows, str | Path) else rows
    parts = iter(windows(rows, WINDOW))
    first = next(parts, None)
    if first is None:
        raise ValueError("there are no rows to trace")
    options = RowOptions(
        columns=chosen_columns((row for _, row in first), columns or Columns()),
        scores=tuple(scores),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    return chain.from_iterable(
        sorted(trace_rows(tracer, part, options), key=lambda result: result.row)
        for part in chain([first], parts)
    )


def trace_rows(
    tracer: FlowTracer, rows: Sequence[tuple[int, Row]], options: RowOptions
) -> Iterator[TracedRow]:
    """The results of numbered rows: first those that cannot be traced, then by length.

    Raises:
        NoAttentionError, UnsupportedArchitectureError: The tracer cannot read the model.
    """
    waiting: list[tuple[TracedRow, FoundText]] = []
    for number, row in rows:
        result, found = _prepared(tracer, number, row, options)
        if found is None:
            yield result
        else:
            waiting.append((result, found))
    waiting.sort(key=lambda one: (len(one[1].ids), one[0].row))
    for start in range(0, len(waiting), options.batch_size):
        batch = waiting[start : start + options.batch_size]
        traces = _traces(tracer, [found for _, found in batch])
        for (result, _), trace in zip(batch, traces, strict=True):
            yield _finished(tracer, result, trace, options)


def _prepared(
    tracer: FlowTracer, number: int, row: Row, options: RowOptions
) -> tuple[TracedRow, FoundText | None]:
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
        return result, _found(tracer, example, options)
    except EVERY_ROW:
        raise
    except ONE_ROW as error:
        return replace(result, error=in_words(error)), None


def _found(tracer: FlowTracer, example: Example, options: RowOptions) -> FoundText:
    if example.prompt_ids is not None and example.completion_ids is not None:
        asked, said = list(example.prompt_ids), list(example.completion_ids)
    elif example.response is None:
        asked, said = tracer.sample(example.prompt, max_new_tokens=options.max_new_tokens)
    else:
        tokenizer = tracer.require_tokenizer()
        asked, text = encode_prompt(tokenizer, example.prompt)
        said = encode_response(tokenizer, text, example.response)
    return tracer.find(asked, said, user_text=user_text(example.prompt) if example.prompt else None)


def _traces(tracer: FlowTracer, texts: list[FoundText]) -> list[FlowTrace | Exception]:
    """The trace of each text, or its error; if they fail together, each is tried alone."""
    try:
        return [*tracer.trace_found(texts)]
    except EVERY_ROW:
        raise
    except ONE_ROW as error:
        if len(texts) == 1:
            return [error.with_traceback(None)]  # its frames hold the attention
    return [result for text in texts for result in _traces(tracer, [text])]


def _finished(
    tracer: FlowTracer, result: TracedRow, trace: FlowTrace | Exception, options: RowOptions
) -> TracedRow:
    if isinstance(trace, Exception):
        return replace(result, error=in_words(trace))
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
