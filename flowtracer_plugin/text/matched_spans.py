"""The tokens of a response that a pattern, or a function of its text, selects."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool

from flowtracer_plugin.text.spans import finder_errors, shown_text, tokens_in_span

if TYPE_CHECKING:
    import transformers

SpanFinder = str | re.Pattern[str] | Callable[[str], Iterable[tuple[int, int]]]


def matched_mask(
    tokenizer: transformers.PreTrainedTokenizerBase,
    response_ids: Sequence[int],
    finder: SpanFinder,
) -> Bool[np.ndarray, " token"]:
    r"""The tokens that touch a span that `finder` finds in the response, without special tokens.

    A pattern selects all of its matches, or the groups of each match if it has groups. A function
    receives the text that `answer_mask` also shows to finders, and returns spans `(start, end)`.

    Raises:
        FinderError: The function has failed.
        ValueError: A span does not lie within the text.

    Example:
        >>> matched_mask(tokenizer, tokenizer.encode("x=10"), r"=(\d+)")
        array([False, False,  True,  True])
    """
    shown = shown_text(tokenizer, response_ids)
    mask = np.zeros(len(response_ids), bool)
    with finder_errors("the function", finder):
        found = [*_found_spans(shown.text, finder)]
    for start, end in found:
        if start == end:
            continue
        if not 0 <= start < end <= len(shown.text):
            raise ValueError(
                f"a span must lie within the text of {len(shown.text)} characters, got "
                f"{(start, end)} from {finder!r}"
            )
        mask |= tokens_in_span(shown.decoded, start + shown.first, end + shown.first)
    return mask & ~shown.hidden


def _found_spans(text: str, finder: SpanFinder) -> Iterable[tuple[int, int]]:
    if callable(finder):
        return finder(text)
    matches = re.finditer(finder, text)
    return (
        match.span(group)  # empty if the group took no part in the match
        for match in matches
        for group in (range(1, match.re.groups + 1) if match.re.groups else (0,))
    )
