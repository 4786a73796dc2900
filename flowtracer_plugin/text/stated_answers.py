"""Answers that a text announces: "The answer is 7", "Answer: 7", 答案是 7."""

from __future__ import annotations

import re

from flowtracer_plugin.text.cues import CHOSEN, CUE, DESCRIPTION, NAMELY, NO_ANSWER, WRONG
from flowtracer_plugin.text.sentences import SENTENCE, sentence_end
from flowtracer_plugin.text.values import (
    BLOCK,
    BULLET,
    JOINT,
    Span,
    has_words,
    is_quantity,
    value_in,
)

LAST = 50  # matches of a pattern that are looked at, from the end

_LEADS = re.compile(
    rf"(?:</?\w{{1,9}}>|[\s:：=>*_#}}]|{BULLET}|"
    r"(?:therefore|thus|hence|then|now|donc|also|simply|just|going to be)\b,?){0,40}",
    re.IGNORECASE,
)
_BLOCK_OPENS = re.compile(r"(?P<long>\\\[|\$\$|```|~~~|\\begin\{)|\*\*|`|\\\(|\$|[\"“「]")
_FIRST_STEP = re.compile(r"(?:1|Step 1)[.):]\s\S")
_DENIED = re.compile(r"not\s[^,;:\n]{1,60}", re.IGNORECASE)
_CALCULATION = re.compile(r"[\d\s.+*/×÷()-]{1,80},? which\s")
_NOT_BUT = re.compile(r"not\s[^.\n]{1,60}?,?\sbut\s(?:rather )?", re.IGNORECASE)


def stated_answer(text: str) -> Span | None:
    """What follows the last cue such as "the answer is" or "Answer:", if it can be an answer."""
    limit = len(text)
    chosen = list(CHOSEN.finditer(text))[-1:]
    for cue in reversed(list(CUE.finditer(text))[-LAST:]):
        if chosen and chosen[0].start() > cue.end() + SENTENCE:
            break
        value = _value_after(text, cue.end(), limit, weak=bool(cue["weak"]))
        if value and not _taken_back(text, cue):
            return value
        limit = cue.start()
    return chosen[0].span(chosen[0].lastgroup or 0) if chosen else None


def described_answers(text: str) -> list[Span]:
    """What describes an answer and does not name it: "the sum of its digits", "not 7"."""
    found: list[Span] = []
    for cue in list(CUE.finditer(text))[-LAST:]:
        end = sentence_end(text, cue.end(), len(text))
        start = _led(text, cue.end(), end)
        if denied := _DENIED.match(text, start, end):
            found.append((cue.start(), denied.end()))
        elif DESCRIPTION.match(text, start, end) and not NAMELY.search(text, start, end):
            found.append((cue.start(), end))
    return found


def _taken_back(text: str, cue: re.Match[str]) -> bool:
    word = cue.start() + max(cue[0].lower().find("ans"), 0)
    return bool(WRONG.search(text, max(0, word - 40), word))


def _led(text: str, start: int, end: int) -> int:
    leads = _LEADS.match(text, start, end)
    return leads.end() if leads else start


def _value_after(text: str, start: int, limit: int, *, weak: bool) -> Span | None:
    begin = _led(text, start, limit)
    if _FIRST_STEP.match(text, begin, limit) and "\n" in text[start:begin]:
        return None
    if instead := _NOT_BUT.match(text, begin, limit):
        begin = instead.end()
    block = _BLOCK_OPENS.match(text, begin, limit)
    long = block and block["long"]
    end = min(limit, begin + BLOCK) if long else sentence_end(text, begin, limit)
    if not block:
        if NO_ANSWER.match(text, begin, end):
            return None
        if DESCRIPTION.match(text, begin, end) or _CALCULATION.match(text, begin, end):
            named = NAMELY.search(text, begin, end)
            if not named:
                return None
            begin = named.end()
    value = value_in(text, begin, end)
    said = text[slice(*value)] if value else r"\boxed"
    if r"\boxed" in said or (weak and not block and not _is_value(said)):
        return None
    return value


def _is_value(said: str) -> bool:
    return len(said) == 1 or is_quantity(said) or not has_words(JOINT.sub("", said))
