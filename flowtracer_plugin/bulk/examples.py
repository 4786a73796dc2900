"""Rows of data as questions and responses: which columns hold them, and how they are read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from flowtracer_plugin.text.answers import find_answer
from flowtracer_plugin.text.data_sets import TEMPLATES, as_prompt, json_lines, load_rows
from flowtracer_plugin.text.encoding import Prompt, content_text, is_text, token_ids

PROMPTS = ("prompt", "question", "messages")
"""Columns that may hold the prompt; the first of them that the data have is used."""

IDS = ("prompt_ids", "completion_ids")
"""Columns that hold sampled token ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One question.

    Attributes:
        row: Its number in the data.
        prompt: Text or chat messages; empty if the data have its token ids alone.
        response: The text that is traced; None if the model is to answer.
        answer: The right answer, if it is known.
        columns: The other columns of the data, for reward functions.
        prompt_ids: The token ids of the prompt, in place of its text.
        completion_ids: The token ids of the response, in place of its text.
        template_kwargs: Arguments of the chat template, such as `enable_thinking`.
    """

    row: int
    prompt: Prompt
    response: str | None = None
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    prompt_ids: tuple[int, ...] | None = None
    completion_ids: tuple[int, ...] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """A hash of the texts and the template's arguments, the same in every process."""
        held: list[Any] = [self.prompt, self.response, self.answer]
        if self.completion_ids is not None:
            held += [self.prompt_ids, self.completion_ids]
        if self.template_kwargs:
            held.append(dict(self.template_kwargs))
        return blake2b(json.dumps(held).encode(), digest_size=8).hexdigest()

    @property
    def right_answer(self) -> str | None:
        """The answer alone, where the data give a whole solution."""
        found = None if self.answer is None else find_answer(self.answer)
        if found is None or self.answer is None:
            return self.answer
        return self.answer[found.start : found.end]


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Which columns of the data hold what, and how the model gets the prompts.

    Attributes:
        prompt: By default `prompt`, `question` or `messages`: texts, or chat messages. If messages
            end with one of the assistant, it is the response.
        response: By default `response`. The model answers rows without a response.
        answer: By default `answer`. A longer answer may end like a response, for example with
            `#### 72`.
        template: A key of `data_sets.TEMPLATES`, or a text with `{prompt}` in it.
        system: The system message that comes first.
        chat: Whether texts become user messages.
        ids: Whether the token ids in `prompt_ids` and `completion_ids` are used, if the data have
            both. They are what was sampled, which a text may not tell.
        template_kwargs: Arguments of the chat template, such as `{"enable_thinking": False}`.
    """

    prompt: str | None = None
    response: str | None = None
    answer: str | None = None
    template: str | None = None
    system: str | None = None
    chat: bool = False
    ids: bool = True
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the template, the system message and the chat template's arguments.

        Raises:
            ValueError: The template has no place for the prompt, or a system message or arguments
                come without `chat`.
        """
        if self.template is not None and "{prompt}" not in self._template:
            raise ValueError(
                f"the template must be {', '.join(TEMPLATES)} or a text with {{prompt}} where the "
                f"question goes, got {self.template!r}"
            )
        if self.system is not None and not self.chat:
            raise ValueError(
                "a system prompt needs a chat template, and the model has none, or it is turned "
                "off (chat=False, --no-chat); leave the system prompt out"
            )
        if self.template_kwargs and not self.chat:
            raise ValueError(
                "arguments of the chat template need one, and the model has none, or it is turned "
                "off (chat=False, --no-chat); leave template_kwargs (--template-arg) out"
            )

    @property
    def _template(self) -> str:
        return TEMPLATES.get(self.template or "", self.template or "")

    @property
    def used(self) -> tuple[str | None, ...]:
        """The columns that are not carried through."""
        return self.prompt, self.response, self.answer, *(IDS if self.ids else ())

    def chosen(self, names: Sequence[str], data: str = "the data") -> Columns:
        """The columns that data with these names have.

        Raises:
            ValueError: A named column is missing, or nothing holds the prompts.
        """
        asked = _column(names, self.prompt, PROMPTS)
        ids = self.ids and set(IDS) <= set(names)
        if asked is None and not ids:
            raise ValueError(
                f"{data} has no column {' or '.join(map(repr, PROMPTS))}, it has "
                f"{', '.join(map(repr, names))}; name the one that holds the prompts "
                "(--prompt-column)"
            )
        return replace(
            self,
            prompt=asked,
            response=_column(names, self.response, ("response",)) or "response",
            answer=_column(names, self.answer, ("answer",)) or "answer",
            ids=ids,
        )

    def example(self, row: Mapping[str, Any], number: int) -> Example:
        """The example in a row; `self` is from `chosen`.

        Raises:
            ValueError: The row lacks a prompt, or a column holds something else than it should.
        """
        others = {name: row[name] for name in row if name not in self.used}
        said, right = _text(row, self.response, number), _text(row, self.answer, number)
        example = Example(row=number, prompt="", response=said, answer=right, columns=others)
        if self.ids:
            asked, sampled = (_ids(row, name, number) for name in IDS)
            example = replace(example, prompt_ids=asked, completion_ids=sampled)
        if self.prompt is None:
            return example
        value = _value(row, self.prompt, number)
        if said is None and not self.ids and (split := _conversation(value)) is not None:
            value, said = split
        template = None if self.template is None else self._template
        prompt = as_prompt(value, template, self.system, self.chat)
        return replace(example, prompt=prompt, response=said, template_kwargs=self.template_kwargs)


def load_examples(
    data: str,
    *,
    split: str = "train",
    dataset_config: str | None = None,
    limit: int | None = None,
    prompt_column: str | None = None,
    response_column: str | None = None,
    answer_column: str | None = None,
    template: str | None = None,
    system: str | None = None,
    chat: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Example, ...]:
    """The examples of a `.jsonl` file, another file or a data set, in their order.

    Args:
        data: A file or name that `datasets` can load; files of JSON lines are read without it.
        split: The split of a data set.
        dataset_config: The configuration of a data set, such as `"main"`.
        limit: How many rows are read.
        prompt_column: As `Columns.prompt`.
        response_column: As `Columns.response`.
        answer_column: As `Columns.answer`.
        template: As `Columns.template`.
        system: As `Columns.system`.
        chat: As `Columns.chat`.
        template_kwargs: As `Columns.template_kwargs`.

    Raises:
        ValueError: There is no such file, data set or column, no row, or a row is damaged.
        ModuleNotFoundError: datasets is missing, and `data` is no file of JSON lines.
    """
    columns = Columns(
        prompt=prompt_column,
        response=response_column,
        answer=answer_column,
        template=template,
        system=system,
        chat=chat,
        ids=False,
        template_kwargs=template_kwargs or {},
    )
    lines = Path(data).suffix.lower() == ".jsonl"
    found = json_lines(Path(data)) if lines else load_rows(data, split, config=dataset_config)
    rows = list(islice(found, limit))
    if not rows:
        raise ValueError(f"there are no rows in {data!r}")
    columns = columns.chosen(list(rows[0]), repr(data))
    try:
        return tuple(columns.example(row, number) for number, row in enumerate(rows))
    except ValueError as error:
        raise ValueError(f"cannot use {data!r}: {error}") from error


def _column(names: Sequence[str], named: str | None, usual: Sequence[str]) -> str | None:
    if named is None:
        return next((name for name in usual if name in names), None)
    if named not in names:
        raise ValueError(
            f"the data have no column {named!r}, they have {', '.join(map(repr, names))}"
        )
    return named


def _conversation(value: Any) -> tuple[Any, str] | None:
    """The prompt and the response of a conversation that ends with the assistant's words."""
    last = value[-1] if isinstance(value, list) and len(value) > 1 else None
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        return None
    content = last.get("content")
    return (value[:-1], content_text(content)) if content and is_text(content) else None


def _ids(row: Mapping[str, Any], column: str, number: int) -> tuple[int, ...]:
    try:
        return tuple(token_ids(f"{column!r} of row {number}", _value(row, column, number)))
    except TypeError as error:
        raise ValueError(str(error)) from error


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
