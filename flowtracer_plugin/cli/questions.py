"""The questions of a command, from the shell, a file or a data set, and how the model gets them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowtracer_plugin.cli import parsing
from flowtracer_plugin.cli.options import PromptOptions

if TYPE_CHECKING:
    from flowtracer_plugin.bulk.examples import Example

_data = partial(typer.Option, rich_help_panel="Data")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Questions, and how they are put to a model."""

    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A JSON Lines file, another data file, a folder, or a dataset on the hub.",
        ),
    ]
    split: Annotated[str, _data(help="Split of the dataset.")] = "train"
    dataset_config: Annotated[
        str | None, _data(help="Configuration of a dataset that has several, such as main.")
    ] = None
    prompt_column: Annotated[
        str | None, _data(help="Column of the prompts; by default prompt, question or messages.")
    ] = None
    answer_column: Annotated[
        str | None, _data(help="Column of the right answers; by default answer.")
    ] = None
    prompt_template: Annotated[
        str | None, _data(help="hash, boxed, or a text with {prompt} where the question goes.")
    ] = None
    system_prompt: Annotated[str | None, _data(help="System message before every prompt.")] = None
    chat: Annotated[
        bool, _data(help="Put prompts into the model's chat template, if it has one.")
    ] = True
    template_arg: Annotated[
        list[str] | None,
        _data(
            metavar="KEY=VALUE",
            help=parsing.TEMPLATE_ARG,
        ),
    ] = None

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """The arguments of the chat template."""
        return parsing.keys_and_values(self.template_arg)

    @property
    def settings(self) -> dict[str, Any]:
        """What results depend on, without arguments of the template that were not given."""
        held = asdict(self)
        return {name: held[name] for name in held if name != "template_arg" or held[name]}


def load_prompts(
    options: DataOptions, tokenizer: Any, limit: int | None, **others: Any
) -> Sequence[Example]:
    """The questions; `others` are passed to `bulk.examples.load_examples`."""
    from flowtracer_plugin.bulk.examples import load_examples

    return load_examples(
        options.data,
        split=options.split,
        dataset_config=options.dataset_config,
        limit=limit,
        prompt_column=options.prompt_column,
        answer_column=options.answer_column,
        template=options.prompt_template,
        system=options.system_prompt,
        chat=options.chat and tokenizer.chat_template is not None,
        template_kwargs=options.template_kwargs,
        **others,
    )


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked, read and checked before the model is loaded.

    Attributes:
        messages: Chat messages; a text is one of the user.
        text: The text, if the prompt is one.
        response: The words of the assistant that end the messages.
        chat: Whether a text goes into the chat template.
        template_kwargs: Arguments of the chat template.
    """

    messages: list[dict[str, Any]]
    text: str | None = None
    response: str | None = None
    chat: bool = True
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def prompt(self, tokenizer: Any) -> str | list[dict[str, Any]]:
        """The messages, if the tokenizer has a template for them, or else the text.

        Raises:
            ValueError: Messages, a system prompt or arguments of the template need one.
        """
        if self.text is None and tokenizer.chat_template is None:
            raise ValueError(
                "--messages need a chat template, and this model has none; pass the text with "
                "--prompt or --prompt-file"
            )
        if self.text is None or (self.chat and tokenizer.chat_template is not None):
            return self.messages
        if len(self.messages) > 1 or self.template_kwargs:
            raise ValueError(
                "--system-prompt and --template-arg need a chat template, and this model has none; "
                "leave them out"
            )
        return self.text


def read_question(asked: PromptOptions) -> Question:
    """The prompt that the options name.

    Raises:
        ValueError: It is empty or no UTF-8 text, or a file does not hold chat messages.
    """
    if asked.messages is not None:
        return _conversation(asked.messages, asked.template_kwargs)
    text = checked("prompt", _text(asked))
    system = [] if asked.system_prompt is None else [_said("system", asked.system_prompt)]
    return Question(
        messages=[*system, _said("user", text)],
        text=text,
        chat=asked.chat,
        template_kwargs=asked.template_kwargs,
    )


def checked(name: str, text: str) -> str:
    """The text, checked for what a tokenizer cannot read.

    Raises:
        ValueError: It is empty, or no UTF-8 text.
    """
    if not text.strip():
        raise ValueError(f"the {name} is empty, so there is nothing to trace; pass a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # Python keeps undecodable bytes from a shell as surrogates
        raise ValueError(f"the {name} must be UTF-8 text: {error}") from error
    return text


def _text(asked: PromptOptions) -> str:
    try:
        if asked.prompt_file is not None:
            return asked.prompt_file.read_text("utf-8-sig").removesuffix("\n")
        if asked.prompt == "-":
            return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt must be UTF-8 text: {error}") from error
    return asked.prompt or ""


def _conversation(path: Path, template_kwargs: Mapping[str, Any]) -> Question:
    try:
        messages = json.loads(path.read_text("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON text: {error}") from error
    if isinstance(messages, dict):
        messages = messages.get("messages")
    if not messages or not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise ValueError(
            f"{str(path)!r} must hold a list of chat messages such as "
            '[{"role": "user", "content": "How many?"}], got ' + f"{messages!r:.80}"
        )
    open_turn = template_kwargs.get("continue_final_message")  # the response goes on with the last
    last = messages[-1] if len(messages) > 1 and not open_turn else {}
    response = last.get("content") if last.get("role") == "assistant" else None
    if isinstance(response, str):
        messages = messages[:-1]
        return Question(messages=messages, response=response, template_kwargs=template_kwargs)
    return Question(messages=messages, template_kwargs=template_kwargs)


def _is_message(one: Any) -> bool:
    """Whether it has a role and, unless it calls tools, content that a template may read."""
    called = isinstance(one, dict) and ("tool_calls" in one or "function_call" in one)
    return called or (
        isinstance(one, dict) and "role" in one and isinstance(one.get("content"), str | list)
    )


def _said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}
