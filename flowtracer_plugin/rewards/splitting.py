r"""How a spelled answer is cut: at commas and words outside brackets, and at signs of relation."""

from __future__ import annotations

import re
import unicodedata

_NESTING = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}
_RELATION = re.compile(r"[<>=]|\\(?:le|ge|ne|in|approx)(?![a-z])")
_AND = re.compile(r"(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])")
_THOUSANDS = re.compile(r"(?<![\d,])\d{1,3}(?:,\d{3})+(?![\d,])")
_LETTER = r"(?:\\[a-zA-Z]++|[a-zA-Z])(?:_(?>\{[^{}]*+\}|\{?\w++\}?))?'*+"
_NAME = re.compile(
    rf"\A(?:{_LETTER}|{_LETTER}\s*\(\s*{_LETTER}(?:,\s*{_LETTER})*\s*\)|"  # x_1, f(x)
    rf"\(\s*{_LETTER}(?:,\s*{_LETTER})+\s*\)|"  # (x, y)
    r"\|?[a-zA-Z]{2,}(?:[ _]+[a-zA-Z]+){0,5}\|?|"  # area of it
    r"m?\s?\\[a-z]+\s*(?:[A-Z]+|\{\s*[A-Za-z]+\s*\}))"  # \angle ABC, \overline{AB}
)
_COMMANDS = (
    "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan log ln exp sqrt pi lg max min lim "
    "gcd lcm det mod inf alpha beta gamma delta epsilon theta lambda mu sigma omega phi tau rho"
)
_FUNCTIONS = frozenset(_COMMANDS.split())
_ENGLISH = "no on yes up in is or so it he we us an at to of by do go if me my ok as be"
_SHORT = frozenset(_ENGLISH.split())
_NEGATED = re.compile(r"\b(?:not|no|never|except|without|unless|if)\b", re.IGNORECASE)
_PRODUCT = re.compile(r"[abc]{3}|[xyz]{3}|[pqr]{3}|[uvw]{3}|[mnk]{3}|[rst]{3}|[xyzab]{3,4}")
_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+|[^\s.,;:!?'\"()\[\]{}\\_`]")
_ARTICLES = frozenset(("the", "a", "an"))


def split_top(text: str, signs: str) -> list[str]:
    """The parts between these signs outside all brackets."""
    depth, start, parts = 0, 0, []
    for place, sign in enumerate(text):
        depth = max(depth + _NESTING.get(sign, 0), 0)
        if not depth and sign in signs:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]


def items_of(text: str, signs: str = ",;", bracketed: bool = False) -> list[str]:
    """The items of a list. Between semicolons a comma is a decimal sign.

    Args:
        text: A spelled answer, or what its brackets hold.
        signs: The signs between items.
        bracketed: Whether it stood in brackets, where `1,234` is two numbers.
    """
    if ";" in signs and len(parts := split_top(text, ";")) > 1:
        return [part.strip() for part in parts if part.strip()]
    if not bracketed or ", " in text:
        text = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)
    outer = "".join(_outside(text))
    spread, start = [], 0
    for found in _AND.finditer(outer):
        spread.append(text[start : found.start()])
        start = found.end()
    spread.append(text[start:])
    parts = [item for part in spread for item in split_top(part, ",")]
    return [part.strip() for part in parts if part.strip()]


def _outside(text: str) -> list[str]:
    """The text with spaces in place of what stands in brackets."""
    depth, kept = 0, []
    for sign in text:
        depth = max(depth + _NESTING.get(sign, 0), 0)
        kept.append("#" if depth else sign)
    return kept


def wrapped(text: str, brackets: str) -> bool:
    """Whether one pair of brackets encloses the whole text."""
    if len(text) < 2 or text[-1] != brackets[1] or text.lstrip("\\")[0] != brackets[0]:
        return False
    depth = 0
    for place, sign in enumerate(text):
        depth += _NESTING.get(sign, 0)
        if not depth and place < len(text) - 1 and sign in ")]}":
            return False
    return depth == 0


def relation_of(text: str) -> tuple[list[str], list[str]]:
    """The sides of a relation and the signs between them, outside all brackets."""
    outer = "".join(_outside(text))
    found = [*_RELATION.finditer(outer)]
    cuts = [0, *(edge for sign in found for edge in sign.span()), len(text)]
    sides = [text[a:b].strip() for a, b in zip(cuts[::2], cuts[1::2], strict=True)]
    if not all(sides):
        return [text], []
    return sides, [sign[0] for sign in found]


def is_name(text: str) -> bool:
    r"""Whether a text names something: x, x_1, f(x), \angle ABC, area, (x, y)."""
    text = text.strip()
    if _NEGATED.search(text):
        return False
    return text not in ("e", "i", r"\pi", r"\infty") and bool(_NAME.fullmatch(text))


def is_words(text: str) -> bool:
    """Whether a spelled answer is words, and no formula of letters."""
    plain = re.sub(r"\\[a-zA-Z]+", " ", text)
    if any(ord(sign) > 0x250 and sign.isalpha() for sign in plain):
        return True
    runs = re.findall(r"[^\W\d_]+", plain)
    if any(run.lower() in _SHORT for run in runs):
        return True
    if any(len(run) > 1 and run.isupper() for run in runs):
        return True
    return any(
        len(run) > 2 and run not in _FUNCTIONS and not _PRODUCT.fullmatch(run) for run in runs
    )


def tokens(text: str) -> tuple[str, ...]:
    """The words, numbers and signs of a text, without case, accents, articles and marks."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(sign for sign in plain if not unicodedata.combining(sign))
    plain = re.sub(r"(?<=[^\W\d_])-(?=[^\W\d_])", " ", plain)
    plain = re.sub(r"\b([^\W\d_])\.\s*(?=[^\W\d_]\.)", r"\1", plain)  # J. K. is JK
    found = _TOKEN.findall(plain)
    kept = [token for token in found if token not in _ARTICLES]
    return tuple(kept or found)
