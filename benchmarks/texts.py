"""Long solutions with an exact number of tokens, the same on every machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from transformers import PreTrainedTokenizerBase

NAMES = ("Ann", "Bob", "Cal", "Dan", "Eva", "Fay")
FILLER = " so"
"""One token in most vocabularies, repeated until a text has its number of tokens."""


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A problem, and lines of sums that end with an answer.

    Attributes:
        prompt: The prompt, a quarter of the tokens.
        response: The response without the end token; it ends with the answer.
        prompt_ids: Token ids of the prompt.
        response_ids: Token ids of the response, with the end token.
        answer: First and last token of the answer's number, counted in the response.
    """

    prompt: str
    response: str
    prompt_ids: list[int]
    response_ids: list[int]
    answer: tuple[int, int]


def solution(tokenizer: PreTrainedTokenizerBase, tokens: int) -> Solution:
    """Lines of sums, then an answer: `tokens` in all, a quarter in the prompt, one end token."""
    asked = tokens // 4
    prompt = _filled(tokenizer, asked, _event, "\nHow many coins do they have together?\n")
    response = _filled(tokenizer, tokens - asked - 1, _line, "\nThe answer is \\boxed{42}")
    encoded = tokenizer(response, add_special_tokens=False, return_offsets_mapping=True)
    places = encoded["offset_mapping"]
    start, end = len(response) - 3, len(response) - 1  # of the number in the braces
    answer = [place for place, (first, last) in enumerate(places) if first < end and last > start]
    return Solution(
        prompt=prompt,
        response=response,
        prompt_ids=_ids(tokenizer, prompt),
        response_ids=[*encoded["input_ids"], tokenizer.eos_token_id],
        answer=(answer[0], answer[-1]),
    )


def _event(number: int) -> str:
    return f"{NAMES[number % len(NAMES)]} finds {number % 9 + 1} coins."


def _line(number: int) -> str:
    before, more = number * 7 % 50, number % 9 + 1
    return f"{before} and {more} coins more are {before + more} coins."


def _filled(
    tokenizer: PreTrainedTokenizerBase, tokens: int, line: Callable[[int], str], ending: str
) -> str:
    """As many lines as fit, then filler, then the ending: exactly `tokens` tokens."""
    body, longer = "", line(0)
    for number in count(1):
        if _length(tokenizer, longer + ending) > tokens:
            break
        body, longer = longer, f"{longer}\n{line(number)}"
    missing = tokens - _length(tokenizer, body + ending)
    text = body + FILLER * missing + ending
    if _length(tokenizer, text) != tokens:
        raise ValueError(f"this tokenizer cannot make a text of exactly {tokens} tokens")
    return text


def _length(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(_ids(tokenizer, text))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
