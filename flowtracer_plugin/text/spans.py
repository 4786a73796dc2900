"""Which tokens are question and answer.

Finders search the text for the answer (`answers.py`), and `decode_tokens` says which of the sampled
tokens hold each character: tokenising the text again could give other ids than the sampled ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Shaped

from flowtracer_plugin.flow.arrays import mask_on_host
from flowtracer_plugin.text.answers import (
    AnswerFinder,
    FoundAnswer,
    check_finder,
    find_answer,
    finder_name,
)
from flowtracer_plugin.text.encoding import Prompt, user_turns
from flowtracer_plugin.text.thinking import leaves_thinking_open, mark_places
from flowtracer_plugin.text.values import Span

if TYPE_CHECKING:
    import transformers

Region = Literal["prompt", "question", "response", "answer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedTokens:
    """A text, and the characters `[starts, ends)` of it that each token touches.

    A token that holds only some bytes of a character touches it, so neighbours can overlap; a token
    without text has `starts == ends`. Neither array ever decreases; every character is touched.
    `pieces` divides the text: a split character is in the piece of the token that completes it.
    """

    text: str
    pieces: tuple[str, ...]
    starts: Int[np.ndarray, " token"]
    ends: Int[np.ndarray, " token"]


def decode_tokens(
    tokenizer: transformers.PreTrainedTokenizerBase, ids: Sequence[int]
) -> DecodedTokens:
    """The text of `ids`, special tokens included, and the characters that each token touches.

    The text is `tokenizer.decode(ids)`, except for bytes that are not UTF-8: each of them becomes
    one U+FFFD, while tokenizers differ in how many they write for a run of such bytes. An id that
    the tokenizer does not know, such as one of a padded embedding, is `<|unknown 151700|>`.

    Raises:
        ValueError: An id is below 0.

    Example:
        >>> decode_tokens(tokenizer, tokenizer.encode("5 €")).pieces
        ('5', ' ', '', '', '€')
    """
    ids = [int(token) for token in ids]
    unknown = unknown_ids(tokenizer, ids)
    known = iter(_token_bytes(tokenizer, [token for token in ids if token not in unknown]))
    chunks = [_STAND_IN % token if token in unknown else next(known) for token in ids]
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


def unknown_ids(
    tokenizer: transformers.PreTrainedTokenizerBase, ids: Sequence[int]
) -> frozenset[int]:
    """The ids that the tokenizer does not know; a padded embedding has some.

    Raises:
        ValueError: An id is below 0.
    """
    unknown = frozenset(token for token in {*ids} if not _knows(tokenizer, token))
    if min(unknown, default=0) < 0:
        raise ValueError(
            f"wanted token ids of at least 0, found {min(unknown)}; leave out padding and labels "
            "to ignore, such as -100"
        )
    return unknown


def known_ids(tokenizer: transformers.PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """The ids without those that the tokenizer does not know, which some decoders cannot take."""
    unknown = unknown_ids(tokenizer, ids)
    return [token for token in ids if token not in unknown]


def _knows(tokenizer: transformers.PreTrainedTokenizerBase, token: int) -> bool:
    # not by the size alone: where ids have gaps, some are larger than the size
    if tokenizer.is_fast:
        return token >= 0 and tokenizer.convert_ids_to_tokens(token) is not None
    return 0 <= token < len(tokenizer) or token in tokenizer.added_tokens_decoder


# Not tokenizers' DecodeStream: it returns nothing until the bytes are valid UTF-8 (in the output of
# an untrained model it decodes an ever longer tail, and keeps it at the end), does not say which
# token holds which byte, and supports only fast tokenizers.
def _token_bytes(tokenizer: transformers.PreTrainedTokenizerBase, ids: list[int]) -> list[bytes]:
    def decode(start: int, end: int) -> str:
        keep = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(tokenizer.decode(ids[start:end], **keep))

    names, whole = tokenizer.convert_ids_to_tokens(ids), decode(0, len(ids))
    # Decoding token by token takes fifty times as long, so it is done only if no spelling fits.
    for spelled in _spellings(names):
        if b"".join(spelled).decode(errors="replace") == whole:
            return spelled

    def chunk(place: int, name: str) -> bytes:
        alone, context = decode(place, place + 1), max(0, place - _CONTEXT)
        # decoders strip the first space of a text, even if it is written as a byte
        stored = _stored_bytes(name, alone) if place or _UNKNOWN in alone else None
        if stored is not None:
            return stored
        before, through = decode(context, place), decode(context, place + 1)
        return (through.removeprefix(before) if through.startswith(before) else alone).encode()

    return [chunk(place, name) for place, name in enumerate(names)]


def _spellings(names: Sequence[str]) -> Iterator[list[bytes]]:
    """The bytes of the names, read in GPT-2's alphabet, as plain text, and as sentencepiece's."""
    if all(char in _BYTE_LEVEL for name in names for char in name):
        yield [bytes(_BYTE_LEVEL[char] for char in name) for name in names]
    yield [name.encode(errors="replace") for name in names]
    pieces = [_sentencepiece(name) for name in names]
    yield pieces
    # decoders strip the first space of a text
    yield [pieces[0].removeprefix(b" "), *pieces[1:]]


def _sentencepiece(name: str) -> bytes:
    byte = _BYTE_NAME.fullmatch(name)
    return bytes.fromhex(byte[1]) if byte else name.replace("▁", " ").encode(errors="replace")


def _stored_bytes(name: str, alone: str) -> bytes | None:
    """The bytes that a token's name stands for, if they may be parts of characters."""
    byte = _BYTE_NAME.fullmatch(name)
    if byte and alone != name:
        return bytes.fromhex(byte[1])
    if _UNKNOWN in alone and all(char in _BYTE_LEVEL for char in name):
        return bytes(_BYTE_LEVEL[char] for char in name)
    return None


_CONTEXT = 8  # tokens decoded before a token, because decoders strip the first space of a text
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_STAND_IN = b"<|unknown %d|>"
_STRAY_BYTE = re.compile("[\udc80-\udcff]")  # as "surrogateescape" decodes it
_BYTE_NAME = re.compile("<0x([0-9A-Fa-f]{2})>")  # sentencepiece's byte fallback
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = sorted(set(range(256)).difference(_PRINTABLE))
_BYTE_LEVEL = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + place): byte for place, byte in enumerate(_OTHERS)
}  # GPT-2's alphabet


def tokens_in_span(decoded: DecodedTokens, start: int, end: int) -> Bool[np.ndarray, " token"]:
    """The tokens that touch the characters `[start, end)`, even if they begin before `start`.

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
    *,
    in_thinking: bool = False,
) -> tuple[Bool[np.ndarray, " token"], FoundAnswer] | None:
    r"""The tokens that touch the answer, and its place in `decode_tokens(...).text`.

    None if there is no answer. Special tokens, and ids that the tokenizer does not know, are not
    part of an answer. The finder does not see those around the response, and sees line breaks in
    place of those inside, so that "5<|end|>6" is not 56. It does see `<answer>`, the marks of
    a box and those of thinking, even if they are special. `in_thinking` says whether the prompt
    has opened the thinking; see `prompt_opens_thinking`.

    Raises:
        FinderError: A function that finds answers has failed.
        ValueError: As for `find_answer` and `decode_tokens`.
        TypeError: As for `find_answer`.

    Example:
        >>> answer_mask(tokenizer, tokenizer.encode("x=10"))
        (array([False, False,  True,  True]), FoundAnswer(start=2, end=4, rule='last_number'))
    """
    return _located_answer(shown_text(tokenizer, response_ids), finder, in_thinking)


class ShownText(NamedTuple):
    """A response as finders see it: `text` begins at the character `first` of `decoded.text`."""

    decoded: DecodedTokens
    hidden: Bool[np.ndarray, " token"]
    text: str
    first: int


def shown_text(
    tokenizer: transformers.PreTrainedTokenizerBase, response_ids: Sequence[int]
) -> ShownText:
    """The response as finders see it; raises ValueError as `decode_tokens` does."""
    ids = [int(token) for token in response_ids]
    decoded = decode_tokens(tokenizer, ids)
    unseen = special_ids(tokenizer) | unknown_ids(tokenizer, ids)
    hidden = np.array([token in unseen for token in ids], bool)
    tags = [tag.span() for tag in _TAG.finditer(decoded.text)]
    for start, end in [*mark_places(decoded.text), *tags]:
        hidden &= ~tokens_in_span(decoded, start, end)
    shown = ~hidden & (decoded.starts < decoded.ends)
    first = int(decoded.starts[shown].min(initial=len(decoded.text)))
    last = int(decoded.ends[shown].max(initial=0))
    pieces = zip(hidden, decoded.pieces, strict=True)
    blanked = ["\n" * len(piece) if unseen else piece for unseen, piece in pieces]
    return ShownText(decoded, hidden, "".join(blanked)[first:last], first)


_TAG = re.compile(r"</?(?:final_?)?answer>|<\|(?:begin|end)_of_box\|>", re.IGNORECASE)


def prompt_opens_thinking(
    tokenizer: transformers.PreTrainedTokenizerBase, prompt_ids: Sequence[int]
) -> bool:
    """Whether the prompt ends in an opened block of thinking, so that the response begins in it."""
    return leaves_thinking_open(decode_tokens(tokenizer, prompt_ids[-_LAST_TOKENS:]).text)


_LAST_TOKENS = 24  # of a prompt; more than an opening mark has


def _located_answer(
    shown: ShownText, finder: AnswerFinder, in_thinking: bool
) -> tuple[Bool[np.ndarray, " token"], FoundAnswer] | None:
    if not shown.text:  # a function need not expect that
        check_finder(finder)
        return None
    with finder_errors("the answer finder", finder):
        found = find_answer(shown.text, finder, in_thinking=in_thinking)
    if found is None:
        return None
    found = replace(found, start=found.start + shown.first, end=found.end + shown.first)
    mask = tokens_in_span(shown.decoded, found.start, found.end) & ~shown.hidden
    return (mask, found) if mask.any() else None


class FinderError(ValueError):
    """A function that searches a text has failed."""


@contextmanager
def finder_errors(kind: str, finder: object) -> Iterator[None]:
    """Say which function has failed and how; the errors that finders document pass unchanged."""
    try:
        yield
    except (ValueError, TypeError):
        raise
    except Exception as error:
        name = getattr(finder, "__name__", type(finder).__name__)
        raise FinderError(f"{kind} {name!r} raised {type(error).__name__}: {error}") from error


def special_ids(tokenizer: transformers.PreTrainedTokenizerBase) -> set[int]:
    """The ids of tokens that are not text, such as those for begin, end, padding and roles."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(token for token, kind in added if kind.special)}


def question_mask(
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    question: str | Sequence[bool] | Shaped[np.ndarray, "..."] = "prompt",
    user_text: str | None = None,
) -> Bool[np.ndarray, " token"]:
    """The prompt tokens at which flow is injected, at least one.

    Args:
        tokenizer: The tokenizer of the ids.
        prompt_ids: The prompt, as the model read it.
        question: "prompt" for all tokens except special ones and the first (an attention sink),
            or, where that leaves none, all except special ones, all except the first, or the only
            token; "auto", the same, since only messages tell what the user said (`turns_mask`);
            "all"; "user" for the tokens that touch the last `user_text`; or a boolean mask.
        user_text: The user's words; whitespace around them does not count.

    Raises:
        ValueError: The prompt or the mask is empty, `question` is neither a known name nor a
            boolean mask of the prompt's length, or `user_text` is missing or not in the prompt.
        TypeError: `question` is a mask whose values cannot be read, such as a masked array.

    Example:
        >>> question_mask(tokenizer, tokenizer.encode("Hi!"))
        array([False,  True,  True])
    """
    length = len(prompt_ids)
    if not length:
        raise ValueError("wanted at least one prompt token, found none; pass the tokenized prompt")
    if not isinstance(question, str):
        mask = mask_on_host("question", question)
    elif question == "user":
        mask = _user_mask(tokenizer, prompt_ids, user_text)
    elif question == "all":
        mask = np.ones(length, bool)
    elif question in ("prompt", "auto"):
        mask = _prompt_mask(tokenizer, prompt_ids)
    else:
        raise ValueError(
            f"wanted question to be 'auto', 'prompt', 'all', 'user' or a boolean mask, found "
            f"{question!r}"
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


def turns_mask(
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompt: Prompt,
    prompt_ids: Sequence[int],
    template_kwargs: Mapping[str, Any] | None = None,
) -> Bool[np.ndarray, " token"] | None:
    """The prompt tokens that touch what the user said, in all turns, without special tokens.

    None if that cannot be known: the prompt is a text, the user said nothing, or the template or
    the tokenizer changes the words.

    Args:
        tokenizer: The tokenizer of the ids.
        prompt: Text or chat messages.
        prompt_ids: The token ids that `encode_prompt` makes of it.
        template_kwargs: Arguments of the chat template.
    """
    turns = user_turns(tokenizer, prompt, template_kwargs)
    if turns is None:
        return None
    decoded, mask = decode_tokens(tokenizer, prompt_ids), np.zeros(len(prompt_ids), bool)
    for start, end in turns.spans:
        # Some decoders add blanks or leave them out, so places differ between the two texts.
        again = re.compile(f"(?={re.escape(turns.text[start:end])})")
        earlier = sum(1 for _ in again.finditer(turns.text[: end - 1]))
        found = next(islice(again.finditer(decoded.text), earlier, None), None)
        if found is None:
            return None
        mask |= tokens_in_span(decoded, found.start(), found.start() + end - start)
    mask &= _prompt_mask(tokenizer, prompt_ids)
    return mask if mask.any() else None


def target_mask(
    answer: Bool[np.ndarray, "*batch token"], target: str
) -> Bool[np.ndarray, "*batch token"]:
    """The tokens at which flow ends: the answer, or those whose logits choose it ("decision")."""
    return answer if target == "answer" else np.roll(answer, -1, axis=-1)


class AnswerNotFoundError(ValueError):
    """The answer finder finds no answer in the response."""


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Spans:
    """The parts of a text. All masks cover prompt and response.

    Attributes:
        prompt_length: Tokens before the response.
        question: The tokens at which flow is injected.
        answer: The answer's tokens.
        target: The tokens at which flow ends: the answer's, or those whose logits choose them.
        rule: Name of the finder that found the answer.
        answer_text: The answer as the finder saw it.
    """

    prompt_length: int
    question: Bool[np.ndarray, " token"]
    answer: Bool[np.ndarray, " token"]
    target: Bool[np.ndarray, " token"]
    rule: str
    answer_text: str

    def __repr__(self) -> str:
        asked, said = self.question.sum(), len(self.answer) - self.prompt_length
        return (
            f"Spans({asked} of {self.prompt_length} prompt tokens ask, {self.answer.sum()} of "
            f"{said} response tokens answer: {self.answer_text!r} by {self.rule!r})"
        )

    @property
    def response(self) -> Bool[np.ndarray, " token"]:
        """The response's tokens, including the answer."""
        return np.arange(len(self.question)) >= self.prompt_length

    @property
    def regions(self) -> tuple[Region, ...]:
        """The most specific region of every token."""
        names = np.where(self.response, "response", "prompt")
        names = np.where(self.question, "question", names)
        return tuple(np.where(self.answer, "answer", names).tolist())


def find_spans(
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    *,
    finder: AnswerFinder,
    question: str | Sequence[bool] | Bool[np.ndarray, "..."],
    user_text: str | None,
    target: str,
) -> Spans:
    """Question, answer and target of one response, over the tokens of prompt and response.

    Raises:
        AnswerNotFoundError: The finder finds no answer; the message quotes the response.
        ValueError: The response is empty, or as for `question_mask` and `answer_mask`.
    """
    if not len(response_ids):
        raise ValueError("the response is empty, so there is no answer to trace")
    shown = shown_text(tokenizer, response_ids)
    opened = prompt_opens_thinking(tokenizer, prompt_ids)
    found, text = _located_answer(shown, finder, opened), shown.decoded.text
    if found is None:
        quoted = text if len(text) <= _QUOTED else f"…{text[-_QUOTED:]}"
        raise AnswerNotFoundError(
            f"no answer found by {finder_name(finder)!r} in the response {quoted!r}; say how to "
            "find it with answer=: a finder's name, re.compile(...) with one group, or a function "
            "from text to (start, end)"
        )
    source = question_mask(tokenizer, prompt_ids, question, user_text)
    answer = np.concatenate([np.zeros(len(prompt_ids), bool), found[0]])
    return Spans(
        prompt_length=len(prompt_ids),
        question=np.concatenate([source, np.zeros(len(response_ids), bool)]),
        answer=answer,
        target=target_mask(answer, target),
        rule=found[1].rule,
        answer_text=text[found[1].start : found[1].end],
    )


_QUOTED = 160  # characters of a response that an error quotes


def _prompt_mask(
    tokenizer: transformers.PreTrainedTokenizerBase, ids: Sequence[int]
) -> Bool[np.ndarray, " token"]:
    special = special_ids(tokenizer)
    ordinary = np.array([int(token) not in special for token in ids])
    later = np.arange(len(ids)) > 0
    choices = ordinary & later, ordinary, later
    return next((mask for mask in choices if mask.any()), ~later)


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
