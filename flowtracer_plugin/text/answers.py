"""Finders of the answer in a text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from flowtracer_plugin.text.finders import FINDERS, Finder, found_in_parts
from flowtracer_plugin.text.thinking import visible_parts
from flowtracer_plugin.text.values import Span

__all__ = [
    "FINDERS",
    "AnswerFinder",
    "FoundAnswer",
    "check_finder",
    "find_answer",
    "finder_name",
    "same_answer",
]

AnswerFinder = str | re.Pattern[str] | Finder

LITERAL = "text:"
"""Stands before an answer that is named itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundAnswer:
    """The place of the answer: characters `[start, end)` of the response text, never empty.

    `rule` names the finder that matched: a key of `FINDERS`, "text", "regex", or the name of a
    callable.
    """

    start: int
    end: int
    rule: str


def find_answer(
    text: str, finder: AnswerFinder = "auto", *, in_thinking: bool = False
) -> FoundAnswer | None:
    r"""The place of the answer in `text`, or None if the finder finds no answer.

    What stands between the marks of thinking, such as `<think>` and `</think>`, is no answer; nor
    is thinking that never ends. Only a function is handed the whole text.

    Args:
        text: The model's response.
        finder: A key of `FINDERS`; "auto" for the first finder that matches; "text:" before the
            answer itself, whose last place counts, such as "text:Paris"; a compiled regex whose
            only group is the answer (the last match counts); or a function from the text to the
            answer's span `(start, end)` or None.
        in_thinking: Whether the response begins inside thinking that its prompt has opened.

    Raises:
        ValueError: No finder has that name, the regex does not have exactly one group, or the
            function's span is empty or not in the text.
        TypeError: The function returned neither None nor a tuple of two integers.

    Example:
        >>> find_answer(r"Three and four make \boxed{7}.")
        FoundAnswer(start=27, end=28, rule='boxed')
    """
    check_finder(finder)
    found = next(_matches(text, finder, in_thinking), None)
    return FoundAnswer(start=found[1][0], end=found[1][1], rule=found[0]) if found else None


def _matches(text: str, finder: AnswerFinder, in_thinking: bool) -> Iterator[tuple[str, Span]]:
    literal = named_answer(finder)
    if isinstance(finder, str) and not literal:
        yield from found_in_parts(text, finder, in_thinking=in_thinking)
    elif isinstance(finder, str | re.Pattern):
        pattern = _pattern_of(literal) if isinstance(finder, str) else finder
        parts = visible_parts(text, in_thinking=in_thinking)
        groups = [m.span(1) for m in pattern.finditer(text) if m.end(1) > m.start(1)]
        for start, end in reversed(groups):
            if any(part.start <= start and end <= part.end for part in parts):
                yield "text" if literal else "regex", (start, end)
    else:
        name = getattr(finder, "__name__", type(finder).__name__)
        span = _checked_span(text, finder(text), name)
        if span:
            yield name, span


def same_answer(one: str | None, other: str | None) -> bool:
    """Whether two answers are equal apart from spaces, case, commas, and the signs around them.

    Numbers are equal if their values are.

    Example:
        >>> same_answer("$1,000.", "1e3"), same_answer(None, "0")
        (True, False)
    """
    plain = _plain(one), _plain(other)
    if plain[0] == plain[1] or None in plain:
        return plain[0] == plain[1]
    values = [_value(answer or "") for answer in plain]
    return values[0] is not None and values[0] == values[1]


def _plain(answer: str | None) -> str | None:
    if answer is None:
        return None
    return "".join(answer.split()).strip("$.").replace(",", "").casefold()


def _value(answer: str) -> Decimal | None:
    try:
        value = Decimal(answer.replace("\N{MINUS SIGN}", "-"))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def finder_name(finder: AnswerFinder) -> str:
    """The name of a finder in messages: its own name, its pattern, or its function's name."""
    if isinstance(finder, re.Pattern):
        return str(finder.pattern)
    return finder if isinstance(finder, str) else getattr(finder, "__name__", repr(finder))


def named_answer(finder: AnswerFinder) -> str:
    """The answer behind "text:"; empty if the finder is another one."""
    if isinstance(finder, str) and finder.startswith(LITERAL):
        return finder.removeprefix(LITERAL).strip()
    return ""


def itself(text: str) -> str:
    """How to name an answer itself, where a text was no finder."""
    return LITERAL + (text.removeprefix(LITERAL).strip() or "Paris")


def _pattern_of(literal: str) -> re.Pattern[str]:
    """The literal, not as a part of a longer word or number."""
    before = r"(?<!\w)" if re.match(r"\w", literal) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", literal) else ""
    return re.compile(f"{before}({re.escape(literal)}){after}")


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
        ValueError: No finder has that name, there is nothing behind "text:", or the regex does not
            have exactly one group.
    """
    if isinstance(finder, re.Pattern) and finder.groups != 1:
        raise ValueError(
            f"wanted a regex with exactly one group, the answer, found {finder.groups} in "
            f"{finder.pattern!r}; write (...) around the answer, (?:...) around anything else"
        )
    if isinstance(finder, str) and finder != "auto" and finder not in FINDERS:
        if named_answer(finder):
            return
        raise ValueError(
            f"wanted the name of an answer finder, one of {['auto', *FINDERS]}, found {finder!r}; "
            f"for the answer itself write {itself(finder)!r}, for a regex "
            "pass re.compile(...)"
        )
