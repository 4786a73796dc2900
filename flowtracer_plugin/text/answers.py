"""Finders of the answer in a text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

Span = tuple[int, int]
Finder = Callable[[str], Span | None]
AnswerFinder = str | re.Pattern[str] | Finder


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundAnswer:
    """The place of the answer: characters `[start, end)` of the response text, never empty.

    `rule` names the finder that matched: a key of `FINDERS`, "regex", or the name of a callable.
    """

    start: int
    end: int
    rule: str


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

# Every pattern stops before its own next match, so it takes linear time and the last match wins.
_ANSWER_TAG = r"<answer>((?:(?!</?answer>)[\s\S])*+)</answer>"
_HASH = r"#{4,}((?:(?!####)[^\n])*+)"
_CUE = r"(?:\b(?:the|my|our|final|correct)\s+answer\s+is\b|\banswer[\s*]*:)"
# A full stop ends the sentence only before a space or a closing mark: in "3.5" it does not.
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
"""The built-in finders, in the order in which "auto" tries them. Each returns its last match.

"auto" does not try "last_word", which finds something in nearly every text.
"""


def find_answer(text: str, finder: AnswerFinder = "auto") -> FoundAnswer | None:
    r"""The place of the answer in `text`, or None if the finder finds no answer.

    Args:
        text: The model's response.
        finder: A key of `FINDERS`; "auto" for the first finder that matches; a compiled regex
            whose only group is the answer (the last match counts); or a function from the text to
            the answer's span `(start, end)` or None.

    Raises:
        ValueError: No finder has that name, the regex does not have exactly one group, or the
            function's span is empty or not in the text.
        TypeError: The function returned neither None nor a tuple of two integers.

    Example:
        >>> find_answer(r"Three and four make \boxed{7}.")
        FoundAnswer(start=27, end=28, rule='boxed')
    """
    spans = ((rule, find(text)) for rule, find in _rules(finder).items())
    found = (FoundAnswer(start=span[0], end=span[1], rule=rule) for rule, span in spans if span)
    return next(found, None)


def same_answer(one: str | None, other: str | None) -> bool:
    """Whether two answers are equal apart from spaces, case, commas, and the signs around them.

    Example:
        >>> same_answer("$1,000.", "1000"), same_answer(None, "0")
        (True, False)
    """
    return _plain(one) == _plain(other)


def _plain(answer: str | None) -> str | None:
    if answer is None:
        return None
    return "".join(answer.split()).strip("$.").replace(",", "").casefold()


def finder_name(finder: AnswerFinder) -> str:
    """The name of a finder in messages: its own name, its pattern, or its function's name."""
    if isinstance(finder, re.Pattern):
        return str(finder.pattern)
    return finder if isinstance(finder, str) else getattr(finder, "__name__", repr(finder))


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


def check_finder(finder: AnswerFinder) -> None:
    """Raise for an unknown finder at once, and not only after a long generation.

    Raises:
        ValueError: No finder has that name, or the regex does not have exactly one group.
    """
    if isinstance(finder, str | re.Pattern):
        find_answer("", finder)
