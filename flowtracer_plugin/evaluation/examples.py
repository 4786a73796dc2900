"""Examples to evaluate, from a file of JSON lines or a data set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from flowtracer_plugin.text.data_sets import TEMPLATES, as_prompt, json_lines, load_rows
from flowtracer_plugin.text.encoding import Prompt

PROMPTS = ("prompt", "question")
"""Columns that may hold the prompt; the first of them that the data have is used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One question.

    Attributes:
        row: Its number in the data.
        prompt: Text or chat messages.
        response: The text that is traced; None if the model is to answer.
        answer: The right answer, if it is known.
        columns: The other columns of the data, for reward functions.
    """

    row: int
    prompt: Prompt
    response: str | None = None
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """A hash of the texts, the same in every process."""
        said = json.dumps([self.prompt, self.response, self.answer])
        return blake2b(said.encode(), digest_size=8).hexdigest()


def load_examples(
    data: str,
    *,
    split: str = "train",
    limit: int | None = None,
    prompt_column: str | None = None,
    response_column: str | None = None,
    answer_column: str | None = None,
    template: str | None = None,
    system: str | None = None,
    chat: bool = False,
) -> tuple[Example, ...]:
    """The examples of a `.jsonl` file, another file or a data set, in their order.

    Args:
        data: A file or name that `datasets` can load; files of JSON lines are read without it.
        split: The split of a data set.
        limit: How many rows are read.
        prompt_column: By default `prompt` or `question`.
        response_column: By default `response`, if there is one. The model answers rows without a
            response.
        answer_column: By default `answer`, if there is one. A longer answer may end like a
            response, for example with `#### 72`.
        template: A key of `data_sets.TEMPLATES`, or a text with `{prompt}` in it.
        system: The system message that comes first.
        chat: Whether texts become user messages.

    Raises:
        ValueError: There is no such file, data set or column, no row, or a row is damaged.
        ModuleNotFoundError: datasets is missing, and `data` is no file of JSON lines.
    """
    text = TEMPLATES.get(template or "", template)
    if text is not None and "{prompt}" not in text:
        raise ValueError(
            f"the template must be {', '.join(TEMPLATES)} or a text with {{prompt}} where the "
            f"question goes, got {template!r}"
        )
    lines = Path(data).suffix.lower() == ".jsonl"
    rows = list(islice(json_lines(Path(data)) if lines else load_rows(data, split), limit))
    if not rows:
        raise ValueError(f"there are no rows in {data!r}")
    asked = _column(rows[0], prompt_column, PROMPTS)
    if asked is None:
        raise ValueError(
            f"{data!r} has no column {' or '.join(map(repr, PROMPTS))}, it has "
            f"{', '.join(map(repr, rows[0]))}; name the one that holds the prompts "
            "(--prompt-column)"
        )
    said = _column(rows[0], response_column, ("response",))
    right = _column(rows[0], answer_column, ("answer",))
    try:
        return tuple(
            Example(
                row=number,
                prompt=as_prompt(_value(row, asked, number), text, system, chat),
                response=_text(row, said, number),
                answer=_text(row, right, number),
                columns={name: row[name] for name in row if name not in (asked, said, right)},
            )
            for number, row in enumerate(rows)
        )
    except ValueError as error:
        raise ValueError(f"cannot use {data!r}: {error}") from error


def _column(row: Mapping[str, Any], named: str | None, usual: Sequence[str]) -> str | None:
    if named is None:
        return next((name for name in usual if name in row), None)
    if named not in row:
        raise ValueError(
            f"the data have no column {named!r}, they have {', '.join(map(repr, row))}"
        )
    return named


def _value(row: Mapping[str, Any], column: str, number: int) -> Any:
    if row.get(column) is None:
        raise ValueError(f"row {number} of the data has no {column!r}; leave that row out")
    return row[column]


def _text(row: Mapping[str, Any], column: str | None, number: int) -> str | None:
    value = None if column is None else row.get(column)
    if isinstance(value, str | None):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{column!r} of row {number} is not text: {value!r:.80}")
    return str(value)
