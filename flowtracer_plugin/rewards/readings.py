r"""What an answer can mean: a number, a quantity, a set, a date, words; each a kind of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from typing import Any

from flowtracer_plugin.rewards import moments
from flowtracer_plugin.rewards.algebra import FLIPPED, Piece
from flowtracer_plugin.rewards.kinds import (
    Choice,
    Equation,
    Matrix,
    Moment,
    Named,
    Reading,
    Region,
    Row,
    Scalar,
    Several,
    Words,
)
from flowtracer_plugin.rewards.numerals import Exact, number
from flowtracer_plugin.rewards.splitting import (
    is_name,
    is_words,
    items_of,
    relation_of,
    split_top,
    tokens,
    wrapped,
)
from flowtracer_plugin.rewards.units import Unit, units

NOTHING = Moment("set", "no solution")
ALL = Region((("-\\infty", "\\infty", False, False),), None)
_NOTHING = {"no solution", "no real solution", "empty set", "no solution exist", r"\emptyset"}
_NOTHING |= {r"\{\}", r"\{ \}", "{}", "the empty set", "there is no solution"}
_ALL = {"all real number", r"\mathbb{R}", "all real", "real number", "any real number"}
_SENTENCE = re.compile(
    r"\A(yes|no|true|false|correct|incorrect)\s*+[,.;:!-]\s++(?!\w+$|(?:and|or|but)\b)"
    r"(?!.*\b(?:yes|no|true|false)\b)[^+].*",
    re.IGNORECASE,
)
_CHOICE = re.compile(  # what follows is neither a formula, nor initials, nor another letter
    r"\A(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)\s*+:?\s*+)?"
    r"(?:[(\[]\s*(?P<both>[A-Za-z])\s*[)\]]|"
    r"(?P<one>[A-Za-z])\s*+(?P<mark>[).:]|-(?=\s[A-Za-z]{3})))"
    r"(?:[.:]?\s++(?P<text>(?![A-Z]\.|(?:and|or|nor|but|not)\b|.*\([A-J]\)|.*\b[B-J][).]\s)"
    r"[^,;&+*/^=<>\s].*)|[.:]?)",
    re.IGNORECASE,
)
_OPTION = re.compile(r"\A(?:option|choice|answer)(?:\s*+:)?\s++(?P<letter>[A-Z])", re.IGNORECASE)
_CHEMICAL = re.compile(r"\A(?:\(?[A-Z][a-z]?\s?(?:_?\s?\{?\d+\}?)?\)?){2,10}")
_WITHOUT = re.compile(
    r"\A(?:(?>(?P<base>.*?\S)\s*+\\(?:setminus|backslash)\s*+\\\{)(?P<points>.+)\\\}|"
    r"(?:all\s++|the\s++)?(?:real numbers?|reals|\\mathbb\{R\})\s++"
    r"(?:except|other than|excluding|without)(?:\s++for)?\s++(?P<words>.+))",
    re.IGNORECASE,
)
_BASED = re.compile(
    r"\A\(?\s*+([0-9][0-9A-F]*+|[A-F][0-9A-F]++)\s*+\)?\s*+_\s*+\{?\s*+(\d{1,2})\s*+\}?"
)
_MATRIX = re.compile(
    r"\A(?:[\[(]\s*+)?\\begin\{([pbB]?matrix|array)\}(?:\s*\{[lcr|]*\})?(.*?)\\end\{\1\}(?:\s*[\])])?",
    re.DOTALL,
)
_LEADING = re.compile(
    r"\A(?P<sign>[-+]\s*+)?(?P<money>US\$|(?:USD|EUR|GBP|CHF|CNY|INR|JPY)(?=\s)|[$€£¥₹₩₽]|Rs\.?(?=\s))"
    r"\s*+(?P<inner>-\s*+)?(?P<number>[^$€£¥₹₩₽]*?[^$€£¥₹₩₽\s])(?P<per>\s*+(?:/|per\b).*)?\s*+"
)
_NUMBER_START = re.compile(r"\A[-+]?\s*+(?:\d++(?:[.,']\d++)*|\.\d++)")
_WORD_NUMBER = re.compile(r"\A[a-z]++(?:-[a-z]++)?(?=\s)", re.IGNORECASE)
_PART_JOINT = re.compile(r"\A\s*(?:,\s*(?:and\s+)?|\band\s+)?")


def readings(text: str) -> list[Reading]:
    """All that a spelled answer can mean. What is a date is no difference, and so on."""
    if whole := _whole(text):
        return [whole]
    found: list[Reading] = [*_choices(text)]
    if found and not isinstance(found[0], Scalar) and len(text) > 1:
        return found
    if (exact := number(text)) is not None:
        found.append(Scalar(text, exact))
        commas = text.count(",")
        ambiguous = commas and not re.search(r",\d{3}(?!\d)", text) and not text.startswith("0,")
        return [*found, *(_several(text) if ambiguous else [])]
    if quantities := _quantities(text):
        return [*found, *quantities]
    return [*found, *_structures(text)]


def _whole(text: str) -> Reading | None:
    """The reading of a text that can be nothing else."""
    plain = text.strip().rstrip(".").lower().removesuffix("s")
    if plain in _NOTHING:
        return NOTHING
    if plain in _ALL or text in _ALL:
        return ALL
    if day := moments.date(text):
        return Moment("date", day)
    if time := moments.clock(text):
        return Moment("time", (time, moments.ratio(text)))
    if parts := moments.ratio(text):
        return Moment("ratio" if ":" in text else "odds", parts)
    if said := _SENTENCE.fullmatch(text):
        return Words((said[1].lower(),))
    if (based := _BASED.fullmatch(text)) and 2 <= int(based[2]) <= 36:
        try:
            return Moment("base", int(based[1], int(based[2])))
        except ValueError:
            return Moment("base", text)
    return None


def _choices(text: str) -> Iterator[Reading]:
    if found := _CHOICE.fullmatch(text):
        letter = (found["both"] or found["one"]).upper()
        if letter <= "J" and not (found["one"] and found["one"].islower() and found["mark"] != ")"):
            yield Choice(letter, found["text"] or "", True)
    elif found := _OPTION.fullmatch(text):
        yield Choice(found["letter"].upper(), "", True)
    elif re.fullmatch("[A-Ja-df-hj]", text):
        yield Choice(text.upper(), "", text.isupper())
        yield Scalar(text, None)


def _quantities(text: str) -> list[Reading]:
    """A number or formula with its unit: one reading for each meaning of the unit."""
    if money := _LEADING.fullmatch(text):
        value = money["number"].strip()
        if number(value) is not None or _is_numeric(value):
            sign = "-" if (money["sign"] or "").strip() == "-" or money["inner"] else ""
            unit = money["money"].rstrip(".") + (money["per"] or "")
            return [_scalar(f"{sign}{value}", one) for one in units(unit)]
    for value, rest, attached in _cuts(text):
        if found := [_scalar(value, unit) for unit in units(rest, attached)]:
            return [*found, *([] if all(map(_is_sure, found)) else [Scalar(text, None)])]
    return [*_compound(text)]


def _cuts(text: str) -> Iterator[tuple[str, str, bool]]:
    """Where a number may end and its unit begin: the two parts, and whether they touch."""
    for space in islice(re.finditer(r"\s+|(?<=\})(?=[a-zA-Z°%])", text), 20):
        value, rest = text[: space.start()], text[space.end() :]
        if rest and (number(value) is not None or _is_numeric(value)):
            yield value, rest, False
    if found := _NUMBER_START.match(text):
        yield found[0], text[found.end() :], not text[found.end() :][:1].isspace()


def _is_numeric(text: str) -> bool:
    """Whether a formula has no variables and no commas."""
    plain = bool(re.search(r"\d|\\pi", text)) and not re.search("[,;=<>]", text)
    return plain and _constant(text) and text[-1:] not in "+-/^_"


def _is_sure(scalar: Scalar) -> bool:
    return scalar.unit is None or scalar.unit.sure


def _scalar(value: str, unit: Unit | None = None) -> Scalar:
    return Scalar(value, number(value), unit)


def _compound(text: str) -> Iterator[Reading]:
    """Several quantities of one kind as their sum: 1 hour 30 minutes."""
    total, unit, rest, parts = Fraction(0), None, text, 0
    while rest:
        begun = _NUMBER_START.match(rest) or _WORD_NUMBER.match(rest)
        exact = number(begun[0].strip()) if begun else None
        after = rest[begun.end() :].strip() if begun else ""
        named = re.match(r"°C|°|[a-zA-Z]+", after)
        if named and named[0] == "m" and unit and unit.powers == (("s", 1),):
            after = f"min{after[1:]}"  # 2h30m
            named = re.match("min", after)
        found = [one for one in units(named[0]) if one.powers] if named else []
        if exact is None or named is None or not found or (unit and not unit.same_kind(found[0])):
            return
        unit = unit or replace(found[0], factor=Fraction(1))
        total += exact.value * found[0].factor
        rest, parts = after[named.end() :], parts + 1
        joint = _PART_JOINT.match(rest)
        rest = rest[joint.end() :] if joint else rest
    if parts > 1 and unit:
        yield Scalar("", Exact(total), unit)


def _structures(text: str) -> list[Reading]:
    if (matrix := _matrix(text)) is not None:
        return [matrix]
    if builder := re.fullmatch(
        r"\\?\{\s*(\w+)(?:\s*\\in\s*\\mathbb\{R\})?\s*[|:]\s*(.+?)\\?\}", text
    ):
        return readings(builder[2])
    several = _several(text)
    if (region := _region(text)) is not None:
        return [region, *_row(text)]
    if several:
        return [*several]
    if rows := _row(text):
        return rows
    if wrapped(text, "()"):
        return readings(text[1:-1].strip())
    if (relation := _relation(text)) is not None:
        return relation
    if re.search(r"\d", text) and _CHEMICAL.fullmatch(text):
        return [Words((re.sub(r"[\s_{}]", "", text),))]
    if is_words(text):
        return [Words(tokens(text))]
    return [Scalar(text, None)]


def _matrix(text: str) -> Matrix | None:
    if found := _MATRIX.fullmatch(text):
        rows = [row for row in re.split(r"\\\\|\\cr", found[2]) if row.strip()]
        return Matrix(tuple(tuple(cell.strip() for cell in row.split("&")) for row in rows))
    if wrapped(text, "[]"):
        inner = [row.strip() for row in split_top(text[1:-1], ",")]
        if len(inner) > 1 and all(wrapped(row, "[]") for row in inner):
            return Matrix(tuple(tuple(items_of(row[1:-1], ",")) for row in inner))
    return None


def _several(text: str) -> list[Reading]:
    if r"\pm" in text or r"\mp" in text:
        upper = text.replace(r"\pm", "+").replace(r"\mp", "-")
        lower = text.replace(r"\pm", "-").replace(r"\mp", "+")
        name, sign, _ = text.partition("=")
        if sign and is_name(name) and not re.search(r",|;|\band\b|\bor\b", text):
            value = text[len(name) + 1 :]
            return [Named(name.strip(), value.strip())]
        items = [
            item
            for one, other in zip(items_of(upper), items_of(lower), strict=True)
            for item in dict.fromkeys((one, other))
        ]
        return [Several(tuple(items), False)]
    for opening, end in (("\\{", "\\}"), ("{", "}")):
        if text.startswith(opening) and text.endswith(end) and len(text) > 2 * len(end):
            inner = text[len(opening) : len(text) - len(end)]
            if wrapped(text, "{}"):
                return [Several(tuple(items_of(inner, ",;", True)), True)]
    items = items_of(text)
    return [Several(tuple(items), False)] if len(items) > 1 else []


def _row(text: str) -> list[Reading]:
    if len(text) < 3 or text[0] not in "([]" or text[-1] not in ")][":
        return []
    inner = text[1:-1]
    if not wrapped(f"({inner})", "()"):
        return []
    items = items_of(inner, ";" if len(split_top(inner, ";")) > 1 else ",", True)
    if len(items) < 2:
        return []
    brackets = ("[" if text[0] == "[" else "(") + ("]" if text[-1] == "]" else ")")
    return [Row(tuple(items), brackets)]


def _region(text: str) -> Region | None:
    """The union that intervals and inequalities of one variable describe."""
    if text == r"\mathbb{R}":
        return ALL
    if found := _WITHOUT.fullmatch(text):
        base = ALL if found["words"] else _region(found["base"].strip())
        points = items_of(found["words"] or found["points"], ",;", True)
        points = [point.partition("=")[2] or point for point in points]
        return base and Region((("without", base.parts, tuple(points)),), base.name)
    parts: list[Any] = []
    names: set[str] = set()
    for part in re.split(r"\\cup(?![a-zA-Z])|\bor\b", text):
        piece, name = _intersection(part)
        if piece is None:
            piece, name = _piece(part.strip())
        if piece is None:
            return None
        parts.append(piece)
        names |= {name} if name else set()
    return Region(tuple(parts), next(iter(names), None)) if len(names) < 2 else None


def _piece(text: str) -> tuple[Any, str | None]:
    for row in _row(text):
        if isinstance(row, Row) and len(row.items) == 2:
            low, high = row.items
            return (low, high, row.brackets[0] == "[", row.brackets[1] == "]"), None
    sides, signs = relation_of(text)
    if not signs or not set(signs) <= set(FLIPPED):
        return None, None
    return _interval(sides, signs) or ((tuple(sides), tuple(signs)), None)


def _intersection(text: str) -> tuple[Any, str | None]:
    """The interval of x > 1 and x < 5."""
    pieces = [_piece(part) for part in items_of(text)]
    ends = sorted((piece for piece, _ in pieces if piece and len(piece) == 4), key=_is_upper)
    if len(pieces) != 2 or len(ends) != 2 or pieces[0][1] != pieces[1][1] or not pieces[0][1]:
        return None, None
    (low, above, closed, _), (below, high, _, last) = ends
    if (above, below) != ("\\infty", "-\\infty"):
        return None, None
    return (low, high, closed, last), pieces[0][1]


def _is_upper(piece: Piece) -> bool:
    return piece[0] == "-\\infty"


def _interval(sides: list[str], signs: list[str]) -> tuple[Piece, str] | None:
    """The interval of x > 3 and of 1 < x < 2: a name, with numbers beside it."""
    if r"\ne" in signs or len(sides) > 3:
        return None
    if signs[0] in (">", r"\ge"):
        sides, signs = sides[::-1], [FLIPPED[sign] for sign in reversed(signs)]
    if not all(sign in ("<", r"\le") for sign in signs):
        return None
    closed = [sign == r"\le" for sign in signs]
    if len(sides) == 3 and is_name(sides[1]) and _constant(sides[0]) and _constant(sides[2]):
        return (sides[0], sides[2], closed[0], closed[1]), sides[1]
    if len(sides) == 2 and is_name(sides[0]) and _constant(sides[1]):
        return ("-\\infty", sides[1], False, closed[0]), sides[0]
    if len(sides) == 2 and is_name(sides[1]) and _constant(sides[0]):
        return (sides[0], "\\infty", closed[0], False), sides[1]
    return None


def _constant(text: str) -> bool:
    return not re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+|(?<![a-zA-Z])e(?![a-zA-Z])", "", text))


def _relation(text: str) -> list[Reading] | None:
    sides, signs = relation_of(text)
    if not signs:
        return None
    if r"\in" in signs and len(sides) == 2 and is_name(sides[0]):
        return [Named(sides[0], sides[1])]
    if not set(signs) <= {"=", r"\approx"}:
        return [Region(((tuple(sides), tuple(signs)),), None)]
    name = sides[0] if is_name(sides[0]) else ""
    if not name and not all(map(_constant, sides)):
        if len(sides) == 2 and is_name(sides[1]):
            return [Named(sides[1], sides[0])]
        return [Equation((sides[0], sides[1]))] if len(sides) == 2 else [Scalar(text, None)]
    *_, source, value = sides if not name or len(sides) > 2 else ["", sides[-1]]
    source = "" if is_name(source) else source
    about = signs[-1] == r"\approx" and bool(source)
    kept = [value, source] if about else [value]
    return [Named(name, side, source if side == value else value, about) for side in kept]
