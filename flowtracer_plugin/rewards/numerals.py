r"""Numbers as people write them: separators of many countries, fractions, powers, words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 1000
"""Digits of the longest number that is read, and the largest power of ten."""


@dataclass(frozen=True, slots=True)
class Exact:
    """A number that was written out.

    `places` are the decimals of a number with a decimal point, of which `digits` count, else None.
    """

    value: Fraction
    places: int | None = None
    digits: int = 0

    @property
    def is_rounding(self) -> bool:
        """Whether so many digits were written that it may stand for what rounds to it."""
        return self.places is not None and self.digits >= 6

    def same(self, other: Exact) -> bool:
        """Whether both are one number, or one is written as a rounding of the other."""
        if self.value == other.value:
            return True
        if self.is_rounding and other.places is None:
            return self.rounds(other.value)
        return other.is_rounding and self.places is None and other.rounds(self.value)

    def times(self, factor: Fraction) -> Exact:
        """This number times a factor; a percentage stays a rounding."""
        if factor == Fraction(1, 100) and self.places is not None:
            return Exact(self.value * factor, self.places + 2, self.digits)
        return Exact(self.value * factor)

    def rounds(self, value: Fraction) -> bool:
        """Whether a value, cut or rounded to as many decimals, is this number."""
        unit = Fraction(1, 10 ** (self.places or 0))
        cut = abs(value) - abs(self.value)
        return abs(self.value - value) * 2 <= unit or (self.value * value > 0 and 0 <= cut < unit)


# They match whole answers. `\A` and repeats that give nothing back keep them linear on any text.
_POINT = r"\A(?:\d++\.\d*+|\.\d++|\d++)"
_GROUPED = [  # a pattern, the sign between groups, the decimal sign
    (re.compile(rf"\A{groups}(?:{re.escape(point)}(\d+))?"), between, point)
    for groups, between, point in (
        (r"[1-9]\d{0,2}(?:,\d{3})+", ",", "."),
        (r"[1-9]\d?(?:,\d{2})+,\d{3}", ",", "."),
        (r"[1-9]\d{0,2}(?:\.\d{3}){2,}", ".", ","),
        (r"[1-9]\d{0,2}(?: \d{3})+", " ", "."),
        (r"[1-9]\d{0,2}(?: \d{3})+", " ", ","),
        (r"[1-9]\d{0,2}(?:'\d{3})+", "'", "."),
        (r"[1-9]\d{0,2}(?:'\d{3})+", "'", ","),
        (r"[1-9]\d{0,2}(?:_\d{3})+", "_", "."),
    )
]
_GERMAN = re.compile(r"\A[1-9]\d{0,2}(?:\.\d{3})+,\d+")
_COMMA = re.compile(r"\A(?:0,\d+|\d++,(?:\d{1,2}|\d{4,}))")
_REPEATED = re.compile(r"\A(\d*+\.\d*+)(?:\\(?:overline|bar|dot)\{?(\d++)\}?|\((\d++)\))")
_DOTTED = re.compile(r"\A(\d*+\.(?=\d{1,200}\.{3})\d*?)(\d{1,9}?)(?=(\2+)\.\.\.)\3\.\.\.")
_POWER = re.compile(
    r"\A(?:(?P<mantissa>.*?\S)\s*+(?:\\cdot|[xX])\s*+)?10\s*+\^\s*+"
    r"(?:\{\s*+(?P<braced>[-+]?\d++)\s*+\}|(?P<bare>[-+]?\d++)|\((?P<round>[-+]?\d++)\))"
)
_EXPONENT = re.compile(rf"(?P<mantissa>{_POINT})[eE](?P<power>[-+]?\d++)")
_FRACTION = re.compile(r"\A\\frac\{([^{}]++)\}\{([^{}]++)\}")
_SLASH = re.compile(r"\A([^/]++)/([^/]++)")
_MIXED = re.compile(
    r"\A(\d++)\s*+(\\frac\{\s*+\d++\s*+\}\{\s*+\d++\s*+\}|(?<=\s)\d++\s*+/\s*+\d++)"
)
_ORDINAL = re.compile(r"\A(\d++)\s*+(?:\^\s*+\{?\s*+)?(?:st|nd|rd|th)\s*+\}?")
_SCALES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
_SCALED = re.compile(rf"\A(.*?\S)\s++({'|'.join(_SCALES)})s?")
_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_PARTS = {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6}
_PARTS |= {"seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10, "hundredth": 100}
_PART = re.compile(rf"\A(?:([a-z]++|\d++)[\s-]++)?({'|'.join(_PARTS)})s?")
_WORDS = {word: value for value, word in enumerate(_SMALL.split())}
_WORDS |= {word: 10 * value for value, word in enumerate(_TENS.split(), 2)}


def number(text: str) -> Exact | None:
    r"""The number that a spelled answer is, or None.

    Example:
        >>> number("1.234,5").value, number(r"2 \frac{2}{3}").value, number("two hundred").value
        (Fraction(2469, 2), Fraction(8, 3), Fraction(200, 1))
    """
    text = text.strip()
    if not text or len(text) > LONGEST:
        return None
    if text[0] in "+-":
        unsigned = _unsigned(text[1:].strip())
        if unsigned is None or text[0] == "+":
            return unsigned
        return Exact(-unsigned.value, unsigned.places, unsigned.digits)
    return _unsigned(text)


def _unsigned(text: str) -> Exact | None:
    if text.startswith("(") and text.endswith(")") and not set("(,;") & set(text[1:]):
        return number(text[1:-1])
    return (
        _decimal(text)
        or _repeated(text)
        or _power(text)
        or _ratio(text)
        or _mixed(text)
        or _in_words(text)
    )


def _decimal(text: str) -> Exact | None:
    if re.fullmatch(_POINT, text) and text.isascii():
        return _exact(text)
    if _GERMAN.fullmatch(text):
        return _exact(text.replace(".", "").replace(",", "."))
    for pattern, between, point in _GROUPED:
        if pattern.fullmatch(text):
            whole, _, decimals = text.partition(point) if point != between else (text, "", "")
            return _exact(f"{whole.replace(between, '')}.{decimals}".rstrip("."))
    if _COMMA.fullmatch(text):
        return _exact(text.replace(",", "."))
    if found := _ORDINAL.fullmatch(text):
        return _exact(found[1])
    return None


def _exact(text: str) -> Exact:
    _, point, decimals = text.partition(".")
    if not point:
        return Exact(Fraction(text))
    digits = len(text.replace(".", "").lstrip("0"))
    return Exact(Fraction(text.rstrip(".") if decimals else text[:-1]), len(decimals), digits)


def _repeated(text: str) -> Exact | None:
    if found := _REPEATED.fullmatch(text):
        start, period = found[1], found[2] or found[3]
    elif (found := _DOTTED.fullmatch(text)) and len(found[2] + found[3]) > 2:
        start, period = found[1], found[2]
    else:
        return None
    begun = Fraction(f"0{start}0") if start != "." else Fraction(0)
    places = len(start.partition(".")[2])
    return Exact(begun + Fraction(int(period), (10 ** len(period) - 1) * 10**places))


def _power(text: str) -> Exact | None:
    found = _EXPONENT.fullmatch(text) or _POWER.fullmatch(text)
    if not found:
        return None
    named = found.groupdict()
    power = int(next(named[k] for k in ("power", "braced", "bare", "round") if named.get(k)))
    mantissa = Exact(Fraction(1)) if not named["mantissa"] else number(named["mantissa"])
    if mantissa is None or abs(power) > LONGEST:
        return None
    places = None if mantissa.places is None else max(mantissa.places - power, 0)
    return Exact(mantissa.value * Fraction(10) ** power, places, mantissa.digits)


def _ratio(text: str) -> Exact | None:
    found = _FRACTION.fullmatch(text) or _SLASH.fullmatch(text)
    above, below = (number(found[1]), number(found[2])) if found else (None, None)
    if above is None or below is None or not below.value:
        return None
    return Exact(above.value / below.value)


def _mixed(text: str) -> Exact | None:
    found = _MIXED.fullmatch(text)
    part = _ratio(found[2].strip()) if found else None
    return Exact(Fraction(found[1]) + part.value) if found and part else None


def _in_words(text: str) -> Exact | None:
    if found := _SCALED.fullmatch(text.lower()):
        count = number({"a": "1"}.get(found[1], found[1]))
        return Exact(count.value * _SCALES[found[2]]) if count else None
    if (part := _PART.fullmatch(text.lower())) and (part[1] or part[2] == "half"):
        above = {"a": 1, None: 1}.get(part[1]) or _WORDS.get(part[1] or "")
        above = int(part[1]) if part[1] and part[1].isdigit() else above
        return Exact(Fraction(above, _PARTS[part[2]])) if above else None
    total = group = 0
    words = re.findall(r"[a-z]+", text.lower())
    if not words or not re.fullmatch(r"[a-zA-Z]+(?:[\s-]+[a-zA-Z]+)*", text):
        return None
    if not (set(words) & set(_WORDS)) or words[0] == "and" or words[-1] == "and":
        return None
    before = 0
    for word in words:
        if word in _WORDS:
            value = _WORDS[word]
            if before % 100 and (before < 20 or value > 9 or before % 10):
                return None  # "one two" is no number
            group, before = group + value, value
        elif word == "hundred":
            group, before = group * 100, 0
        elif word in _SCALES and word != "dozen":
            total, group, before = total + group * _SCALES[word], 0, 0
        elif word != "and":
            return None
    return Exact(Fraction(total + group))
