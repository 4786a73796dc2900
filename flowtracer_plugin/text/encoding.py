"""The token ids of prompts and responses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from inspect import signature
from itertools import count
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from jinja2 import Environment, TemplateError, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flowtracer_plugin.flow.arrays import check_readable
from flowtracer_plugin.text.values import Span

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or chat messages whose `content` is a text or a list of text parts. A message that calls
tools needs no content."""

TokenIds = (
    Mapping[str, Any]
    | Sequence[int]
    | Sequence[Sequence[int]]
    | Int[Tensor, "..."]
    | Int[np.ndarray, "..."]
)
"""The token ids of one text, also as a batch of one, or what a tokenizer returns for a text."""


def token_ids(name: str, ids: TokenIds) -> list[int]:
    """The token ids of one text as a list; a batch of one is unpacked, and padding left out.

    Raises:
        TypeError: They are no whole numbers, or in an array that cannot be read.
        ValueError: There are several texts.
    """
    if isinstance(ids, Mapping) and "input_ids" in ids:  # a BatchEncoding
        tokens = token_ids(name, ids["input_ids"])
        mask = token_ids("attention_mask", ids.get("attention_mask", [1] * len(tokens)))
        return [token for token, seen in zip(tokens, mask, strict=True) if seen]
    check_readable(name, ids)
    if isinstance(ids, Tensor):
        ids = ids.detach().cpu().numpy()
    if not isinstance(ids, Sequence | np.ndarray) or isinstance(ids, str | bytes):
        raise TypeError(
            f"{name} must be a list, an array or a tensor of token ids, got a "
            f"{type(ids).__name__}; pass tokenizer(text)['input_ids'], or trace a text with trace"
        )
    try:
        array = np.asarray(ids)
    except ValueError as error:
        raise ValueError(
            f"{name} must be the token ids of one text, got rows of different lengths; trace_ids "
            "traces a padded batch"
        ) from error
    if array.ndim not in (1, 2) or (array.ndim == 2 and len(array) != 1):
        raise ValueError(
            f"{name} must be the token ids of one text, [token] or [1, token], got the shape "
            f"{array.shape}; trace_ids traces a padded batch"
        )
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be whole numbers, got {array.ravel()[0]!r:.80} among them")
    return [int(token) for token in array.ravel()]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[int], str]:
    """The token ids of a prompt, and the text that they encode.

    `template_kwargs`, such as `tools` or `enable_thinking`, are passed to the chat template. By
    default it begins the assistant's turn, unless `continue_final_message` leaves the last open.

    Raises:
        ValueError: The prompt is empty or cannot be written as UTF-8, a message has no role, or
            neither content nor calls of tools, the tokenizer has no chat template for messages, or
            its template does not read one of the arguments.
    """
    if not prompt:
        raise ValueError("the prompt is empty, so there is no question to trace from")
    if isinstance(prompt, str):
        ids, start = _ids(tokenizer, prompt), tokenizer.bos_token_id
        # A text that a chat template has made begins with the token that the tokenizer would add.
        twice = start is not None and ids[:2] == [start, start]
        return ids[1:] if twice else ids, prompt
    if tokenizer.chat_template is None:
        raise ValueError(
            "chat messages need a tokenizer with a chat template, and this one has none; "
            "pass the prompt as a string"
        )
    _check_arguments(tokenizer, template_kwargs or {})
    text = _rendered(tokenizer, [_message(message) for message in prompt], template_kwargs)
    return _ids(tokenizer, text, add_special_tokens=False), text


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    template_kwargs: Mapping[str, Any] | None,
) -> str:
    given = dict(template_kwargs or {})
    begins = not given.get("continue_final_message")
    options = {"tokenize": False, "add_generation_prompt": begins, **given}
    try:
        try:
            return str(tokenizer.apply_chat_template(messages, **options))
        except (TemplateError, TypeError):
            # A few templates need content in every message, even in one that only calls tools.
            if all("content" in message for message in messages):
                raise
            filled = [{"content": "", **message} for message in messages]
            return str(tokenizer.apply_chat_template(filled, **options))
    except TypeError as error:
        raise ValueError(
            f"the tokenizer's chat template cannot take these messages ({error}); pass texts as "
            "their content, or the whole prompt as a string"
        ) from error


def _check_arguments(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> None:
    """Refuse arguments that the tokenizer's chat template does not read, and so would ignore."""
    apply = PreTrainedTokenizerBase.apply_chat_template
    if not template_kwargs or type(tokenizer).apply_chat_template is not apply:
        return  # a tokenizer with a way of its own may read more
    passed = {name for name in signature(apply).parameters if not name.startswith("return_")}
    own = tokenizer.chat_template, template_kwargs.get("chat_template", "")
    texts = [text for one in own for text in (one.values() if isinstance(one, Mapping) else [one])]
    try:
        read = (passed - _FORM).union(*(_variables(str(text)) for text in texts))
    except TemplateSyntaxError:
        return  # transformers says so when it fills the template
    for name in template_kwargs.keys() - read:
        meant = get_close_matches(name, read, n=1)
        wish = f"did you mean {meant[0]!r}?" if meant else "leave it out"
        raise ValueError(f"this model's chat template reads no argument {name!r}; {wish}")


@lru_cache(maxsize=16)
def _variables(template: str) -> frozenset[str]:
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    parsed = environment.parse(_GENERATION.sub("", template))
    return frozenset(find_undeclared_variables(parsed) - _NO_ARGUMENTS)


_FORM = {"conversation", "tokenize", "tokenizer_kwargs", "padding", "truncation", "max_length"}
"""Arguments of `apply_chat_template` that do not shape the text; nor do any `return_…`."""

_NO_ARGUMENTS = {"messages", "raise_exception", "strftime_now"}
"""Names in templates whose values transformers itself gives."""

_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""Tags of transformers that only it can parse."""


class UserTurns(NamedTuple):
    """The text of a chat prompt, and where in it the words of the user stand, in order."""

    text: str
    spans: tuple[Span, ...]


def user_turns(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    template_kwargs: Mapping[str, Any] | None = None,
) -> UserTurns | None:
    """All that the user said in chat messages that `encode_prompt` accepts.

    None for a text, and where the template does not show the words as they are, but for blanks at
    their ends. To tell them from equal words elsewhere, the messages go through the template once
    more, with a mark in the place of each text of the user; all other characters are the template's
    or another role's.
    """
    if isinstance(prompt, str):
        return None
    messages = [_message(message) for message in prompt]
    numbers = count()
    marked = [_marked(message, numbers) for message in messages]
    said = [words for message in messages for words in _said_by_user(message)]
    text = _rendered(tokenizer, messages, template_kwargs)
    try:
        frame = _MARK.split(_rendered(tokenizer, marked, template_kwargs))
    except (TemplateError, ValueError):  # a template that checks what the user says
        return None
    spans, place = [], len(frame[0])
    for number, after in zip(frame[1::2], frame[2::2], strict=True):
        words = said[int(number)] if int(number) < len(said) else ""
        shown = (words, words.rstrip(), words.lstrip(), words.strip())
        end = next((len(one) for one in shown if text.startswith(one + after, place)), None)
        if end is None:
            return None
        spans.append((place, place + end))
        place += end + len(after)
    whole = text.startswith(frame[0]) and place == len(text)
    seen = tuple(span for span in spans if span[0] < span[1])
    return UserTurns(text, seen) if whole else None


_MARK = re.compile(r"flowtracerturn(\d+)mark")


def _said_by_user(message: Mapping[str, Any]) -> list[str]:
    """The texts in a message of the user; images and others beside them are left out."""
    content = message.get("content", "") if message["role"] == "user" else ""
    parts = [{"text": content}] if isinstance(content, str) else content
    return [part["text"] for part in parts if part.get("text")]


def _marked(message: dict[str, Any], numbers: Iterator[int]) -> dict[str, Any]:
    """The message with a numbered mark in place of each text of the user."""
    if not _said_by_user(message):
        return message

    def mark() -> str:
        return f"flowtracerturn{next(numbers)}mark"

    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": mark()}
    parts = [{**part, "text": mark()} if part.get("text") else part for part in content]
    return {**message, "content": parts}


def _message(given: Any) -> dict[str, Any]:
    """A chat message without missing parts, which tables hold as None, and with its text joined."""
    held = given.items() if isinstance(given, Mapping) else ()
    message = {key: value for key, value in held if value is not None}
    if "role" not in message or not message.keys() & {"content", "tool_calls", "function_call"}:
        raise ValueError(
            f"a chat message needs 'role' and 'content', got {given!r:.200}; only one that calls "
            "tools needs no content"
        )
    if not _is_content(message.get("content", "")):
        raise ValueError(
            "the content of a chat message must be a text or a list of parts, and each part of "
            f"text needs 'text', got {message['content']!r:.200}"
        )
    if is_text(message.get("content")):  # few chat templates accept text parts
        message["content"] = content_text(message["content"])
    return message


def check_turn(prompt: Prompt, template_kwargs: Mapping[str, Any] | None = None) -> None:
    """Refuse chat messages after which a response would be a second turn of the assistant.

    Raises:
        ValueError: They end with the assistant's message, and the chat template does not leave it
            open (`continue_final_message`).
    """
    if isinstance(prompt, str) or (template_kwargs or {}).get("continue_final_message"):
        return
    if prompt and isinstance(prompt[-1], Mapping) and prompt[-1].get("role") == "assistant":
        raise ValueError(
            "the messages end with one of the assistant, so a response would be its second turn; "
            "leave out that message, or, if the response goes on with it, pass template_kwargs="
            "{'continue_final_message': True} (--template-arg continue_final_message=true)"
        )


def encode_response(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> list[int]:
    """The token ids of a response that continues the prompt.

    Some tokenizers add a space before the first word of a text. So prompt and response are encoded
    together, unless that changes the prompt's tokens.

    Raises:
        ValueError: The text cannot be written as UTF-8.
    """

    def encode(text: str) -> list[int]:
        return _ids(tokenizer, text, add_special_tokens=False)

    before, joint = encode(prompt), encode(prompt + response)
    if joint[: len(before)] == before:
        return joint[len(before) :]
    return encode(response)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"wanted text that UTF-8 can hold, found half a character, "
            f"{text[error.start : error.end]!r:.40}; leave it out"
        ) from error
    return list(tokenizer(text, **options)["input_ids"])


def user_text(prompt: Prompt) -> str | None:
    """The text of the user's last message; None if there is none, or if it is not only text."""
    if isinstance(prompt, str):
        return prompt
    said = (m.get("content") for m in reversed(prompt) if m["role"] == "user")
    content: Any = next(said, None)
    return content_text(content) if is_text(content) else None


def _is_content(content: Any) -> bool:
    """Whether a chat template may know what to do with the content of a message."""
    return isinstance(content, str) or (
        isinstance(content, list)
        and all(
            isinstance(part, Mapping) and (part.get("type") != "text" or is_text([part]))
            for part in content
        )
    )


def is_text(content: Any) -> bool:
    """Whether the content of a chat message is a text, or a list of only text parts."""
    return isinstance(content, str) or (
        isinstance(content, list)
        and all(
            isinstance(part, Mapping)
            and part.get("type") == "text"
            and isinstance(part.get("text"), str)
            for part in content
        )
    )


def content_text(content: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a message content for which `is_text` is true."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
