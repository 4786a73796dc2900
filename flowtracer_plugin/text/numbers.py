"""The numbers of a text, as people and models write them."""

from __future__ import annotations

import re

_SIGN = r"[-+±\N{MINUS SIGN}]"
_SPACE = r"(?:[\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}'’ ]|\\[,;])"
_GROUPS = "|".join(
    (
        r"\d{1,3}(?:(?:,|\{,\})\d{3}){1,12}(?!\d)(?:\.\d+)?",  # 1,234.56
        r"\d{1,2}(?:,\d{2}){1,8},\d{3}(?!\d)(?:\.\d+)?",  # 12,34,567: Indian groups
        r"\d{1,3}(?:\.\d{3}){1,12},\d+",  # 1.234,56
        r"\d{1,3}(?:\.\d{3}){2,12}(?!\d)",  # 1.234.567
        rf"\d{{1,3}}(?:{_SPACE}\d{{3}}){{1,12}}(?!\d)(?:[.,]\d+)?",  # 1 234,5
        r"(?<![(\[{,])\d++,\d{1,2}(?![\d,]|[)\]}])",  # 3,14
    )
)
_PLAIN = r"\d++(?:\.\d++)?|\.\d++"
_SUPERSCRIPT = "[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+"
_POWER = (
    rf"(?:\^[ ]?(?:\{{\s?{_SIGN}?\d{{1,20}}\s?\}}|\({_SIGN}?\d{{1,20}}\)|{_SIGN}?\d{{1,20}})"
    rf"|\*\*{_SIGN}?\d{{1,20}}|{_SUPERSCRIPT})"
)
_TIMES_POWER = rf"(?:\s?(?:[×x*·]|\\times|\\cdot)\s?10{_POWER}|e{_SIGN}?\d{{1,20}}(?!\w))"
_VULGAR = "[¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]"
_IRRATIONAL = r"(?:\\sqrt(?:\[\d\])?\{[\d.]{1,20}\}|\\sqrt\s?\d|√\(?\d{1,20}\)?|\\pi(?![a-z])|π)"
_SIZE = rf"(?:(?:{_GROUPS}|{_PLAIN})(?:{_TIMES_POWER}|{_POWER})?)"
_PART = rf"(?:\{{\s?{_SIGN}?(?:{_SIZE})?\s?{_IRRATIONAL}?\s?\}}|\d)"
_FRACTION = rf"\\[dt]?frac{_PART}{_PART}"

UNSIGNED = "|".join(
    (
        r"0x[0-9a-f]{1,40}\b",
        r"\d{4}-\d{2}-\d{2}(?!\d)",  # dates and times
        r"\d{1,2}/\d{1,2}/\d{4}(?!\d)",
        r"\d{1,2}:\d{2}(?::\d{2})?(?![\d:])(?:\s?[ap]\.?m\b)?",
        r"\d{1,20}:\d{1,20}(?!\d)",  # a ratio
        r"\d{1,4}\s?(?:h|hrs?|hours?)\s(?:and\s)?\d{1,2}\s?(?:min(?:ute)?s?|m)\b",
        rf"{_SIZE}\s?[-+\N{{MINUS SIGN}}]\s?(?:{_SIZE})?i\b",  # a complex number
        rf"{_SIZE}?\s?{_FRACTION}",
        rf"{_SIZE}?\s?{_IRRATIONAL}(?:/(?:{_PLAIN}))?",
        rf"\d{{1,20}}\s?{_VULGAR}|{_VULGAR}",
        r"\d{1,20} \d{1,20}/\d{1,20}(?![\d/])",  # 2 1/2
        rf"{_SIZE}(?:/(?:{_PLAIN}))?",
    )
)
"""The pattern of a number without its sign."""

# A number is not the end of a word or of a longer number, as in x2 and v1.2.3, and its sign is no
# operator, as in 9-7. All repeats are bounded or possessive, which makes a search linear.
NUMBER = re.compile(
    rf"(?={_SIGN}?(?:\.?\d|\\[dt]?(?:frac|sqrt|pi)|√\(?\d|[π¼-¾⅐-⅞]))(?<![a-z0-9_])(?<!\d\.)"
    rf"((?:(?<![)\]}}\d]){_SIGN})?(?:{UNSIGNED}))",
    re.IGNORECASE,
)
"""A number with its sign, the only group: groups of digits as in several countries, exponents,
fractions, roots, multiples of pi, complex numbers, ratios, dates, times and durations; no units.
"""
