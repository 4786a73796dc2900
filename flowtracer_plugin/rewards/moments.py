r"""Dates, times of day and ratios: answers of numbers that are no sums or quotients."""

from __future__ import annotations

import re
from fractions import Fraction

Date = tuple[int | None, int, int]
_MONTHS = "january february march april may june july august september october november december"
_MONTH = {name[:length]: at for at, name in enumerate(_MONTHS.split(), 1) for length in (3, 9)}
_MONTH["sept"] = 9
_NAME = rf"(?P<month>{'|'.join(sorted(_MONTH, key=len, reverse=True))})\.?"
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_YEAR = r"(?:,?\s*(?P<year>\d{4}))?"
_WEEKDAY = r"(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day,?\s+)?"
_DATES = [
    re.compile(rf"\A{_WEEKDAY}{pattern}")
    for pattern in (
        rf"(?:the\s+)?{_DAY}\s*(?:of\s+)?{_NAME}{_YEAR}",
        rf"{_NAME}\s*(?:the\s+)?{_DAY}{_YEAR}",
        r"(?P<year>\d{4})-(?P<month>\d{2})-(?P<day>\d{2})",
        r"(?P<year>\d{4})/(?P<month>\d{1,2})/(?P<day>\d{1,2})",
        r"(?P<year>\d{4})年(?P<month>\d{1,2})月(?P<day>\d{1,2})日",
        r"(?P<day>\d{1,2})\.\s?(?P<month>\d{1,2})\.\s?(?P<year>\d{4})",
        r"(?P<month>\d{1,2})/(?P<day>\d{1,2})/(?P<year>\d{4})",
    )
]
_CLOCK = re.compile(
    r"\A(?P<hour>\d{1,2})(?::(?P<minute>\d{2}))?(?::(?P<second>\d{2}))?\s*"
    r"(?P<half>[ap]\.?\s?m\.?|o'clock|noon|h|hrs|hours)?"
)
_RATIO = re.compile(r"\A-?[\d./]++(?:\s*+(?::|\bto\b)\s*+-?[\d./]++)+")


def date(text: str) -> Date | None:
    """Year, month and day of a date. With slashes the month comes first, unless it cannot.

    Example:
        >>> date("March 5th, 2024"), date("25/12/2023"), date("5 of May")
        ((2024, 3, 5), (2023, 12, 25), (None, 5, 5))
    """
    for pattern in _DATES if len(text) < 60 else ():
        found = pattern.fullmatch(text.lower())
        if not found:
            continue
        month = _MONTH.get(found["month"][:9]) or int(found["month"])
        day, year = int(found["day"]), found["year"]
        if "/" in text and month > 12:
            month, day = day, month
        if 1 <= month <= 12 and 1 <= day <= 31:
            return (int(year) if year else None, month, day)
    return None


def clock(text: str) -> tuple[int, str] | None:
    """The second of the day, and what names its half: "said", "hour" or ""; None if it is no time.

    Example:
        >>> clock("3:15 PM"), clock("15:15"), clock("3:15"), clock("3")
        ((54900, 'said'), (54900, 'hour'), (11700, ''), None)
    """
    text = text.lower()
    if text in ("noon", "midnight"):
        return (12 * 3600 if text == "noon" else 0, "said")
    found = _CLOCK.fullmatch(text) if len(text) < 30 else None
    half = found["half"] if found else None
    afternoon = {"a": False, "p": True}.get((half or " ")[0])
    named = afternoon is not None or half in ("noon", "o'clock")
    if not found or not (named or (found["minute"] and half is None)):
        return None
    hour, minute, second = (int(found[part] or 0) for part in ("hour", "minute", "second"))
    if hour > 24 or minute > 59 or second > 59:
        return None
    source = "hour" if hour > 12 or hour == 0 else ""
    if afternoon is not None:
        hour, source = hour % 12 + 12 * afternoon, "said"
    return (hour * 3600 + minute * 60 + second, "said" if half == "noon" else source)


def same_time(one: tuple[int, str], other: tuple[int, str]) -> bool:
    """Whether two times are equal, or would be if neither said which half of the day it is in."""
    if {one[1], other[1]} == {"", "said"}:
        return one[0] % 43_200 == other[0] % 43_200
    return one[0] == other[0]


def ratio(text: str) -> tuple[Fraction, ...] | None:
    """The parts of a ratio, of which the first is 1.

    Example:
        >>> ratio("6 : 8")
        (Fraction(1, 1), Fraction(4, 3))
    """
    if len(text) > 200 or not _RATIO.fullmatch(text):
        return None
    try:
        parts = [Fraction(part.strip()) for part in re.split(r":|to", text)]
    except (ValueError, ZeroDivisionError):
        return None
    return tuple(part / parts[0] for part in parts) if all(parts) else None
