"""The token ids of prompts and responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or chat messages whose `content` is a text or a list of text parts."""


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    template_options: Mapping[str, Any] | None = None,
) -> tuple[list[int], str]:
    """The token ids of a prompt, and the text that they encode.

    `template_options`, such as `tools` or `enable_thinking`, are passed to the chat template.

    Raises:
        ValueError: The prompt is empty or cannot be written as UTF-8, a message has no role or
            content, or the tokenizer has no chat template for messages.
    """
    if not prompt:
        raise ValueError("the prompt is empty, so there is no question to trace from")
    if isinstance(prompt, str):
        return _ids(tokenizer, prompt), prompt
    if tokenizer.chat_template is None:
        raise ValueError(
            "chat messages need a tokenizer with a chat template, and this one has none; "
            "pass the prompt as a string"
        )
    messages = [dict(message) for message in prompt]
    for message in messages:
        if "role" not in message or "content" not in message:
            raise ValueError(f"a chat message needs 'role' and 'content', got {message!r}")
        if is_text(message["content"]):  # few chat templates accept text parts
            message["content"] = content_text(message["content"])
    text = str(
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **(template_options or {})
        )
    )
    return _ids(tokenizer, text, add_special_tokens=False), text


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
    """The text of the user's last message; None if there is none."""
    if isinstance(prompt, str):
        return prompt
    said = (m["content"] for m in reversed(prompt) if m["role"] == "user")
    return next((content_text(content) if is_text(content) else content for content in said), None)


def is_text(content: Any) -> bool:
    """Whether the content of a chat message is a text, or a list of only text parts."""
    return isinstance(content, str) or (
        isinstance(content, list)
        and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content)
    )


def content_text(content: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a message content for which `is_text` is true."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
