"""Where the sentences of a text end."""

from __future__ import annotations

import re

SENTENCE = 400  # characters of a sentence that are looked at

_STOP = re.compile(
    r"\n|[。！？．]|(?<![.!?])(?:[.?]++(?=[\s*_$\"')\]”’<]|\Z)|!++(?=[\s*_\"')\]”’<]|\Z))"
)
_ABBREVIATION = re.compile(
    r"(?:\b(?:approx|ca|etc|vs|cf|no|nr|eq|fig|dr|mr|mrs|ms|prof|st|jr|sr|inc|e\.g|i\.e|a\.m|p\.m"
    r"|u\.s|u\.k)|(?<![\w.])[A-Z])$",
    re.IGNORECASE,
)


_INITIAL = re.compile(r"\s?[A-Z]\.")


def sentence_end(text: str, start: int, end: int) -> int:
    """Where the sentence that begins at `start` ends: before its full stop, or at a line's end.

    A full stop ends it only before a space or a closing mark, unlike in "3.5", and not behind an
    abbreviation, except where that is the whole sentence, as in "B. Be careful".
    """
    end = min(end, start + SENTENCE)
    for stop in _STOP.finditer(text, start, end):
        at = stop.start()
        abbreviated = stop[0] == "." and _ABBREVIATION.search(text, max(start, at - 8), at)
        last = not text[stop.end() : stop.end() + 2].strip()
        alone = len(text[start:at].strip()) <= 1 and not _INITIAL.match(text, stop.end())
        if not abbreviated or last or alone:
            return at
    return end
