"""Which tokens are question, response and answer.

Finders look for the answer in the text, and `decode_tokens` says which of the sampled tokens hold
each character of it: tokenising the text again would give other ids than those that were sampled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int, Shaped

if TYPE_CHECKING:
    import transformers

Span = tuple[int, int]
Finder = Callable[[str], Span | None]
AnswerFinder = str | re.Pattern[str] | Finder


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundAnswer:
    """Where the answer stands: characters `[start, end)` of the response text, never empty.

    `rule` names the finder that matched: a key of `FINDERS`, "regex", or the name of a callable.
    """

    start: int
    end: int
    rule: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedTokens:
    """A text, and the characters `[starts, ends)` of it that each token touches.

    A token that holds only some bytes of a character touches it, so neighbours can overlap; a token
    without text has `starts == ends`. Neither array ever decreases; every character is touched.
    `pieces` cuts the text: a split character is in the piece of the token that completes it.
    """

    text: str
    pieces: tuple[str, ...]
    starts: Int[np.ndarray, " token"]
    ends: Int[np.ndarray, " token"]


def _trimmed(text: str, start: int, end: int, chars: str | None = None) -> Span | None:
    kept = text[start:end].lstrip(chars)
    start, kept = end - len(kept), kept.rstrip(chars)
    return (start, start + len(kept)) if kept else None


def _last_filled(text: str, spans: Iterable[Span], chars: str | None = None) -> Span | None:
    trimmed = (_trimmed(text, start, end, chars) for start, end in reversed(list(spans)))
    return next((span for span in trimmed if span), None)


def _last_group(pattern: str | re.Pattern[str], chars: str | None = None) -> Finder:
    compiled = re.compile(pattern, re.IGNORECASE) if isinstance(pattern, str) else pattern
    return lambda text: _last_filled(text, (m.span(1) for m in compiled.finditer(text)), chars)


_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]")


def _boxed(text: str) -> Span | None:
    opened: list[re.Match[str]] = []
    closed: list[Span] = []
    for brace in _BRACE.finditer(text):
        if brace[0] == "}" and opened:
            opening = opened.pop()
            if len(opening[0]) > 1:
                closed.append((opening.end(), brace.start()))
        elif brace[0].endswith("{") and brace[0] != r"\{":
            opened.append(brace)
    return _last_filled(text, sorted(closed))


def _after_think(text: str) -> Span | None:
    _, marker, answer = text.rpartition("</think>")
    return _trimmed(text, len(text) - len(answer), len(text)) if marker else None


def _last_word(text: str) -> Span | None:
    words = ((m.start(), m.start() + len(m[0].rstrip(_CLOSING))) for m in _WORD.finditer(text))
    return _last_filled(text, words, _OPENING)


_WORD = re.compile(r"\S+")
_OPENING = "\"'“‘*_`"  # noqa: RUF001
_CLOSING = _OPENING + "”’.,;:!?…。！？"  # noqa: RUF001

# Every pattern stops before its own next match, which keeps it linear and lets the last match win.
_ANSWER_TAG = r"<answer>((?:(?!</?answer>)[\s\S])*+)</answer>"
_HASH = r"#{4,}((?:(?!####)[^\n])*+)"
_CUE = r"(?:\b(?:the|my|our|final|correct)\s+answer\s+is\b|\banswer[\s*]*:)"
# a full stop ends the sentence only before a space or a closing mark: "3.5" goes on
_STOP = r"(?:\n|[。！？]|(?<![.!?])[.!?]++(?=[\s*$\"')\]]|\Z))"  # noqa: RUF001
_PHRASE = rf"{_CUE}[\s:=*$]*+((?:(?!{_CUE}|{_STOP})[\s\S])*+)"
_UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?"
_NUMBER = rf"(?<![a-z0-9_])(?<!\d\.)((?:(?<![)\]])[-+\u2212])?{_UNSIGNED}(?:/{_UNSIGNED})?)"

FINDERS: Mapping[str, Finder] = MappingProxyType(
    {
        "boxed": _boxed,
        "answer_tag": _last_group(_ANSWER_TAG),
        "hash": _last_group(_HASH),
        "phrase": _last_group(_PHRASE, " \t\r*$"),
        "after_think": _after_think,
        "last_number": _last_group(_NUMBER),
        "last_word": _last_word,
    }
)
"""The built-in finders, in the order in which "auto" tries them. Each takes the last match.

"auto" leaves out "last_word", which finds something in nearly every text.
"""


def find_answer(text: str, finder: AnswerFinder = "auto") -> FoundAnswer | None:
    r"""Where the answer stands in `text`, or None where the finder finds none.

    Args:
        text: What the model answered.
        finder: A key of `FINDERS`; "auto" for the first of them that matches; a compiled regex
            whose only group is the answer (the last match counts); or a function from the text to
            the answer's span `(start, end)` or None.

    Raises:
        ValueError: No finder has that name, the regex has not exactly one group, or the function's
            span is empty or not in the text.
        TypeError: The function returned neither None nor a tuple of two integers.

    Example:
        >>> find_answer(r"Three and four make \boxed{7}.")
        FoundAnswer(start=27, end=28, rule='boxed')
    """
    spans = ((rule, find(text)) for rule, find in _rules(finder).items())
    found = (FoundAnswer(start=span[0], end=span[1], rule=rule) for rule, span in spans if span)
    return next(found, None)


def _rules(finder: AnswerFinder) -> Mapping[str, Finder]:
    if isinstance(finder, re.Pattern):
        if finder.groups != 1:
            raise ValueError(
                f"wanted a regex with exactly one group, the answer, found {finder.groups} in "
                f"{finder.pattern!r}; write (...) around the answer, (?:...) around anything else"
            )
        return {"regex": _last_group(finder, "")}  # strips nothing
    if not isinstance(finder, str):
        name = getattr(finder, "__name__", type(finder).__name__)
        return {name: lambda text: _checked_span(text, finder(text), name)}
    if finder != "auto" and finder not in FINDERS:
        raise ValueError(
            f"wanted the name of an answer finder, one of {['auto', *FINDERS]}, found {finder!r}; "
            "for a regex pass re.compile(...)"
        )
    if finder == "auto":
        return {name: find for name, find in FINDERS.items() if name != "last_word"}
    return {finder: FINDERS[finder]}


def _checked_span(text: str, span: object, name: str) -> Span | None:
    if span is None:
        return None
    if not isinstance(span, tuple) or [type(part) for part in span] != [int, int]:
        raise TypeError(
            f"wanted None or a tuple of two integers from the answer finder {name!r}, "
            f"found {span!r}; return (start, end), as re.Match.span() does"
        )
    start, end = span
    if not 0 <= start < end <= len(text):
        raise ValueError(
            f"wanted 0 <= start < end <= {len(text)} from the answer finder {name!r}, "
            f"found {span!r}; return None where there is no answer"
        )
    return start, end


def decode_tokens(
    tokenizer: transformers.PreTrainedTokenizerBase, ids: Sequence[int]
) -> DecodedTokens:
    """The text of `ids`, special tokens included, and the characters that each token touches.

    The text is `tokenizer.decode(ids)`, except where bytes are not UTF-8: each stray byte is one
    U+FFFD here, while decoders differ in how many they make of a run.

    Raises:
        ValueError: An id is not in the tokenizer's vocabulary.

    Example:
        >>> decode_tokens(tokenizer, tokenizer.encode("5 €")).pieces
        ('5', ' ', '', '', '€')
    """
    chunks = _token_bytes(tokenizer, _checked_ids(tokenizer, ids))
    chars = b"".join(chunks).decode("utf-8", "surrogateescape")
    text = _STRAY_BYTE.sub(_UNKNOWN, chars)
    char_sizes = [len(char.encode("utf-8", "surrogateescape")) for char in chars]
    char_ends = np.cumsum(char_sizes, dtype=np.int64)
    token_ends = np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)
    begun = np.searchsorted(char_ends - char_sizes, token_ends, side="left")
    completed = [0, *np.searchsorted(char_ends, token_ends, side="right").tolist()]
    return DecodedTokens(
        text=text,
        pieces=tuple(text[left:right] for left, right in pairwise(completed)),
        starts=np.array(completed[:-1], dtype=np.int64),
        ends=begun.astype(np.int64),
    )


def _checked_ids(tokenizer: transformers.PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    unknown = [token for token in set(ids) if not _knows(tokenizer, int(token))]
    if unknown:
        raise ValueError(
            f"wanted ids of the tokenizer's {len(tokenizer)} tokens, found {min(unknown)!r}; where "
            "the model's embedding is padded beyond the tokenizer, suppress those ids when sampling"
        )
    return [int(token) for token in ids]


def _knows(tokenizer: transformers.PreTrainedTokenizerBase, token: int) -> bool:
    # the size alone does not tell: ids may have gaps, and then lie beyond it
    if tokenizer.is_fast:
        return token >= 0 and tokenizer.convert_ids_to_tokens(token) is not None
    return 0 <= token < len(tokenizer) or token in tokenizer.added_tokens_decoder


# Not tokenizers' DecodeStream: it is silent until the bytes are valid UTF-8 (in the garbage of an
# untrained model it decodes an ever longer tail, and keeps it at the end), does not tell which
# token holds which byte, and knows only fast tokenizers.
def _token_bytes(tokenizer: transformers.PreTrainedTokenizerBase, ids: list[int]) -> list[bytes]:
    def decode(start: int, end: int) -> str:
        keep = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(tokenizer.decode(ids[start:end], **keep))

    def chunk(place: int, name: str) -> bytes:
        alone, context = decode(place, place + 1), max(0, place - _CONTEXT)
        # decoders strip the space that a text begins with, even one that is written as a byte
        stored = _stored_bytes(name, alone) if place or _UNKNOWN in alone else None
        if stored is not None:
            return stored
        before, through = decode(context, place), decode(context, place + 1)
        return (through.removeprefix(before) if through.startswith(before) else alone).encode()

    return [chunk(place, name) for place, name in enumerate(tokenizer.convert_ids_to_tokens(ids))]


def _stored_bytes(name: str, alone: str) -> bytes | None:
    """The bytes behind a token's name, if it may hold parts of characters."""
    byte = _BYTE_NAME.fullmatch(name)
    if byte and alone != name:
        return bytes.fromhex(byte[1])
    if _UNKNOWN in alone and all(char in _BYTE_LEVEL for char in name):
        return bytes(_BYTE_LEVEL[char] for char in name)
    return None


_CONTEXT = 8  # tokens decoded ahead of one, whose space shows only in the middle of a text
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_STRAY_BYTE = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of one
_BYTE_NAME = re.compile("<0x([0-9A-Fa-f]{2})>")  # sentencepiece's byte fallback
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = sorted(set(range(256)).difference(_PRINTABLE))
_BYTE_LEVEL = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + place): byte for place, byte in enumerate(_OTHERS)
}  # GPT-2's alphabet


def tokens_in_span(decoded: DecodedTokens, start: int, end: int) -> Bool[np.ndarray, " token"]:
    """Every token that touches the characters `[start, end)`, even if it begins before them.

    Raises:
        ValueError: The span is not in the text.

    Example:
        >>> ends = np.array([1, 3, 4])
        >>> x10 = DecodedTokens(text="x=10", pieces=("x", "=1", "0"), starts=ends - 1, ends=ends)
        >>> tokens_in_span(x10, 2, 4)
        array([False,  True,  True])
    """
    if not 0 <= start <= end <= len(decoded.text):
        raise ValueError(
            f"wanted a span in a text of {len(decoded.text)} characters, found {(start, end)!r}; "
            "count in the characters of decoded.text"
        )
    return np.maximum(decoded.starts, start) < np.minimum(decoded.ends, end)


def answer_mask(
    tokenizer: transformers.PreTrainedTokenizerBase,
    response_ids: Sequence[int],
    finder: AnswerFinder = "auto",
) -> tuple[Bool[np.ndarray, " token"], FoundAnswer] | None:
    r"""The tokens that touch the answer, and its place in `decode_tokens(...).text`; None without.

    Special tokens are no part of an answer. The finder does not see those around the response, and
    sees line breaks instead of those inside, so that "5<|end|>6" is not 56; but it sees `<think>`,
    `<answer>` and their closing tags even if the tokenizer calls them special.

    Raises:
        ValueError: As `find_answer` and `decode_tokens` do.
        TypeError: As `find_answer` does.

    Example:
        >>> answer_mask(tokenizer, tokenizer.encode("x=10"))
        (array([False, False,  True,  True]), FoundAnswer(start=2, end=4, rule='last_number'))
    """
    decoded, special = decode_tokens(tokenizer, response_ids), _special_ids(tokenizer)
    tokens = list(zip(response_ids, decoded.pieces, strict=True))
    hidden = np.array([i in special and not _MARKER.fullmatch(piece) for i, piece in tokens], bool)
    shown = ~hidden & (decoded.starts < decoded.ends)
    first = int(decoded.starts[shown].min(initial=len(decoded.text)))
    last = int(decoded.ends[shown].max(initial=0))
    blanked = ["\n" * len(piece) if hidden[at] else piece for at, (_, piece) in enumerate(tokens)]
    found = find_answer("".join(blanked)[first:last], finder)
    if found is None:
        return None
    found = replace(found, start=found.start + first, end=found.end + first)
    mask = tokens_in_span(decoded, found.start, found.end) & ~hidden
    return (mask, found) if mask.any() else None


_MARKER = re.compile(r"\s*</?(?:think|answer)>\s*", re.IGNORECASE)


def _special_ids(tokenizer: transformers.PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(token for token, kind in added if kind.special)}


def question_mask(
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    question: str | Sequence[bool] | Shaped[np.ndarray, "..."] = "prompt",
    user_text: str | None = None,
) -> Bool[np.ndarray, " token"]:
    """The prompt tokens over which the flow enters, at least one.

    Args:
        tokenizer: The one that the ids come from.
        prompt_ids: The prompt, as the model read it.
        question: "prompt" for all but the special tokens and the first one (an attention sink);
            "all"; "user" for the tokens that touch the last `user_text`; or a boolean mask.
        user_text: The user's words; whitespace around them does not count.

    Raises:
        ValueError: The prompt or the mask would be empty, `question` is no known name and no
            boolean mask of the prompt's length, or `user_text` is missing or not in the prompt.

    Example:
        >>> question_mask(tokenizer, tokenizer.encode("Hi!"))
        array([False,  True,  True])
    """
    length = len(prompt_ids)
    if not length:
        raise ValueError("wanted at least one prompt token, found none; pass the tokenized prompt")
    if not isinstance(question, str):
        mask = np.asarray(question)
    elif question == "user":
        mask = _user_mask(tokenizer, prompt_ids, user_text)
    elif question in ("prompt", "all"):
        special = _special_ids(tokenizer) if question == "prompt" else ()
        mask = np.array([token not in special for token in prompt_ids])
        mask[0] &= question == "all"
    else:
        raise ValueError(
            f"wanted question to be 'prompt', 'all', 'user' or a boolean mask, found {question!r}"
        )
    if mask.shape != (length,) or mask.dtype != np.bool_:
        raise ValueError(
            f"wanted a boolean question mask of shape {(length,)}, one entry per prompt token, "
            f"found {mask.dtype} of shape {mask.shape}"
        )
    if not mask.any():
        raise ValueError(
            f"wanted at least one question token, found none among {length} prompt tokens; "
            "pass question='all' or a boolean mask with a True"
        )
    return mask


def _user_mask(
    tokenizer: transformers.PreTrainedTokenizerBase, ids: Sequence[int], user_text: str | None
) -> Bool[np.ndarray, " token"]:
    words = (user_text or "").strip()
    if not words:
        raise ValueError(
            f"wanted user_text for question='user', found {user_text!r}; pass the user's words"
        )

    def last_words(text: str) -> Span | None:
        start = text.rfind(words)
        return None if start < 0 else (start, start + len(words))

    located = answer_mask(tokenizer, ids, last_words)
    if located is None:
        raise ValueError(
            f"wanted user_text in the prompt, found no {words!r} there; pass the words as the "
            "tokenizer decodes them, or a boolean mask"
        )
    return located[0]
