"""The built-in finders of the answer in a response."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType

from flowtracer_plugin.text.concluded_answers import (
    concluded_answer,
    first_sentence_answer,
    formula_answer,
)
from flowtracer_plugin.text.cues import REFUSAL, RUN_ON, VERB
from flowtracer_plugin.text.numbers import NUMBER, UNSIGNED
from flowtracer_plugin.text.stated_answers import LAST, described_answers, stated_answer
from flowtracer_plugin.text.thinking import visible_parts
from flowtracer_plugin.text.values import Span, has_words, value_in

Finder = Callable[[str], Span | None]


def _trimmed(text: str, start: int, end: int, chars: str | None = None) -> Span | None:
    kept = text[start:end].lstrip(chars)
    start, kept = end - len(kept), kept.rstrip(chars)
    return (start, start + len(kept)) if kept else None


def last_filled(text: str, spans: Iterable[Span], chars: str | None = None) -> Span | None:
    """The last of the spans that holds more than `chars`, by default blanks, without those."""
    trimmed = (_trimmed(text, start, end, chars) for start, end in reversed(list(spans)))
    return next((span for span in trimmed if span), None)


_BRACE = re.compile(
    r"(?P<box>\\(?:boxed|fbox|framebox)\s*\{|<\|begin_of_box\|>)|(?P<end><\|end_of_box\|>)|\\[{}]|[{}]"
)
_BARE_BOX = re.compile(
    rf"\\(?:boxed|fbox)(?:(?=\s|\\)\s{{0,9}}(?P<number>[-+]?(?:{UNSIGNED}))"
    r"|\s{1,9}(?P<letter>[A-Za-z])(?![A-Za-z]))",
    re.IGNORECASE,
)


_REJECTED = re.compile(r"\bnot\s\$?\\(?:boxed|fbox)\{\Z")


def _boxed(text: str) -> Span | None:
    opened: list[re.Match[str]] = []
    closed = [match.span(match.lastgroup or 0) for match in _BARE_BOX.finditer(text)]
    for brace in _BRACE.finditer(text):
        if brace[0] in ("}", "<|end_of_box|>") and opened:
            opening = opened.pop()
            if opening["box"]:
                closed.append((opening.end(), brace.start()))
        elif brace["box"] or brace[0] == "{":
            opened.append(brace)
    values = (
        _in_marks(text, *span)
        for span in sorted(closed, reverse=True)
        if not _REJECTED.search(text, max(0, span[0] - 20), span[0])
    )
    return next((value for value in values if value), None)


def _in_marks(text: str, start: int, end: int) -> Span | None:
    """The content of marks made for an answer: all of it, but for dressing around it."""
    span = _trimmed(text, start, end)
    if span is None:
        return None
    value = value_in(text, *span)
    whole = value is not None and not has_words(text[span[0] : value[0]] + text[value[1] : span[1]])
    return value if whole else span


_STRING = r"\"(?P<double>(?:[^\"\\\n]|\\.){0,2000})\"|'(?P<single>(?:[^'\\\n]|\\.){0,2000})'"
_LITERAL = (
    r"(?P<literal>-?\d[\d.eE+-]{0,40}|true|false|\[[^\[\]{}]{0,500}\])(?=\s{0,9}(?:[,}\n]|\Z))"
)


def _field(names: str) -> re.Pattern[str]:
    pattern = rf"[\"'](?:{names})[\"']\s{{0,20}}:\s{{0,20}}(?:{_STRING}|{_LITERAL})"
    return re.compile(pattern, re.IGNORECASE)


_FIELDS = (
    _field(r"(?:the[ _]?)?(?:final|correct|predicted)?[ _-]?answers?|答案"),
    _field(r"(?:final[ _-]?)?(?:result|solution|output|value)|prediction"),
    _field(r"(?:correct[ _-]?)?(?:choice|option)"),
)


def _json(text: str) -> Span | None:
    """The value of a field for the answer in a record of JSON, or in one as Python prints it."""
    for field in _FIELDS:
        filled = last_filled(text, (m.span(m.lastgroup or 0) for m in field.finditer(text)))
        if filled:
            return filled if text[filled[0]] == "[" else _in_marks(text, *filled)
    return None


_ANSWER_TAG = re.compile(
    r"<(final_?answer|answer|output)>((?:(?!</?(?:final_?answer|answer|output)>)[\s\S])*+)</\1>",
    re.IGNORECASE,
)


def _answer_tag(text: str) -> Span | None:
    filled = last_filled(text, (match.span(2) for match in _ANSWER_TAG.finditer(text)))
    if filled is None:
        return None
    inside = text[slice(*filled)]
    stated = _json(inside)
    if not stated and has_words(inside) and VERB.search(inside):  # a sentence
        stated = stated_answer(inside) or concluded_answer(inside) or first_sentence_answer(inside)
    if stated:
        return filled[0] + stated[0], filled[0] + stated[1]
    return _in_marks(text, *filled)


_HASH = re.compile(r"#{4,}((?:(?!####)[^\n])*+)")
_HEADING = re.compile(
    r"(?:step|part|case|solution|answer|final|conclusion|explanation|summary|note|verification|"
    r"check|result|calculation|analysis|understanding|given|approach|reasoning|step-by-step)\b",
    re.IGNORECASE,
)
_ANSWER_LINE = 80  # characters of an answer behind ####


def _hash(text: str) -> Span | None:
    """The rest of a line after ####, GSM8K's mark, unless it is a heading of Markdown.

    It is an answer if it ends the text and is short, or if it is a number.
    """
    stated_later = False
    for line in reversed(list(_HASH.finditer(text))[-LAST:]):
        span = _trimmed(text, *line.span(1))
        value = value_in(text, *span) if span else None
        if span is None or value is None:
            continue
        inside, rest = text[slice(*span)], text[line.end() :].strip("# \n\t")
        if not rest and len(inside) <= _ANSWER_LINE and inside[-1] != ":":
            stated = stated_answer(inside)
            if stated:
                return span[0] + stated[0], span[0] + stated[1]
            if not _HEADING.match(inside):
                return value
        elif NUMBER.fullmatch(text, *value) and not stated_later:
            stated_later = stated_answer(rest) is not None
            if not stated_later:
                return value
    return None


# A calculation, a sentence or a record was cut off.
_CUT_OFF = re.compile(
    r"(?:[-+/×÷·=(^,{\\<≤≥]|\s\*|\\(?:cdot|times|frac|boxed(?:\{[^{}]*)?))\s{0,9}\Z"
)
_UNFINISHED = re.compile(
    r"\b(?:is|are|be|the|a|an|of|to|and|or|but|so|then|if|because|which|that|with|for|from|by|in|on|"
    r"at|we|have|has|need|needs|can|will|first)\s{0,9}\Z"
)
_PROSE = 80  # characters; in shorter texts, how a sentence ends says little
_OPEN_RECORD = re.compile(r"\s{0,9}(?:```\w{0,9}\s{0,9})?\{\s{0,9}\"[^{}]*+\Z")


def _gives_no_answer(text: str) -> bool:
    """Whether a text breaks off or refuses, so that a number in it is no answer."""
    end = text[-40:]
    unfinished = _CUT_OFF.search(end) or (len(text) > _PROSE and _UNFINISHED.search(end))
    return bool(unfinished or _OPEN_RECORD.match(text) or REFUSAL.search(text))


_MARKED = (_boxed, _answer_tag, _hash, stated_answer)


def _first_turn(text: str) -> str:
    """The text without the questions that a model asks itself after it has answered."""
    run_on = RUN_ON.search(text)
    turn = text[: run_on.start()] if run_on else text
    return turn if run_on and any(find(turn) for find in _MARKED) else text


def _last_number(text: str) -> Span | None:
    """The last number, line by line from the end, since no number spans two lines."""
    end = len(text)
    while end >= 0:
        start = text.rfind("\n", 0, end) + 1
        numbers = [match.span(1) for match in NUMBER.finditer(text, start, end)]
        if numbers:
            return numbers[-1]
        end = start - 1
    return None


_WORD = re.compile(r"\S+")
_OPENING = "\"'“‘*_`"
_CLOSING = _OPENING + "”’.,;:!?…。！？"


def _last_word(text: str) -> Span | None:
    words = ((m.start(), m.start() + len(m[0].rstrip(_CLOSING))) for m in _WORD.finditer(text))
    return last_filled(text, words, _OPENING)


def _remainder(text: str) -> Span | None:
    return (_trimmed if has_words(text) else _in_marks)(text, 0, len(text))


_MARKS: Mapping[str, Finder] = {
    "boxed": _boxed,
    "answer_tag": _answer_tag,
    "json": _json,
    "hash": _hash,
    "phrase": stated_answer,
}
_GUESSES: Mapping[str, Finder] = {
    "conclusion": concluded_answer,
    "formula": formula_answer,
    "first_sentence": first_sentence_answer,
    "last_number": _last_number,
}
_IN_A_PART = {**_MARKS, "after_think": _remainder, **_GUESSES, "last_word": _last_word}
_AFTER_THINKING = ("after_think", "first_sentence")


def found_in_parts(
    text: str, name: str = "auto", *, in_thinking: bool = False
) -> Iterator[tuple[str, Span]]:
    """The name and the span of each finder that matches, the last visible part first."""
    for part in reversed(visible_parts(text, in_thinking=in_thinking)):
        inside = _first_turn(text[part.start : part.end])
        if name == "auto":
            found = _auto(inside, part.after_thinking)
        elif part.after_thinking or name not in _AFTER_THINKING:
            found = iter([(name, _IN_A_PART[name](inside))])
        else:
            continue
        for finder, span in found:
            if span:
                yield finder, (part.start + span[0], part.start + span[1])
    if name == "auto":  # nothing else is found in any part
        yield from found_in_parts(text, "after_think", in_thinking=in_thinking)


def _auto(text: str, after_thinking: bool) -> Iterator[tuple[str, Span | None]]:
    """Marked answers first; in a text that breaks off or refuses, no answer is guessed."""
    box = _boxed(text)
    if box:
        yield "phrase", _option_behind(text, box)
        yield "boxed", box
    for name in ("answer_tag", "json", "hash", "phrase"):
        yield name, _MARKS[name](text)
    rest = text.strip()
    if after_thinking and "\n" not in rest and not has_words(rest):
        yield "after_think", _remainder(text)
    if not _gives_no_answer(text):
        named = _without_descriptions(text)
        for name, find in _GUESSES.items():
            if after_thinking or name not in _AFTER_THINKING:
                yield name, find(named)


def _option_behind(text: str, box: Span) -> Span | None:
    """The letter of "Answer: D" behind a boxed formula, which is then only a step."""
    stated = stated_answer(text[box[1] :]) if box[1] - box[0] > 1 else None
    if stated is None or stated[1] - stated[0] != 1:
        return None
    letter = box[1] + stated[0]
    return (letter, letter + 1) if "A" <= text[letter] <= "J" else None


def _without_descriptions(text: str) -> str:
    for start, end in described_answers(text):
        text = f"{text[:start]}{' ' * (end - start)}{text[end:]}"
    return text


def _finder(name: str) -> Finder:
    return lambda text: next((span for _, span in found_in_parts(text, name)), None)


FINDERS: Mapping[str, Finder] = MappingProxyType({name: _finder(name) for name in _IN_A_PART})
"""The built-in finders; each returns its last match outside the response's thinking.

"auto" tries them in this order, except for "last_word", which finds something in nearly every text.
A letter that is announced behind a boxed formula, as by "Answer: D", comes before the formula.
No finder looks behind a question that the model asks itself ("Question: …") after it has answered.
"auto" takes what follows thinking as a whole ("after_think") if that is only a value, or if nothing
else is found there.
"""
