r"""The kinds of things that an answer can be. Answers are compared within a kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowtracer_plugin.rewards.numerals import Exact
from flowtracer_plugin.rewards.units import Unit


@dataclass(frozen=True, slots=True)
class Scalar:
    """A number or formula, with its value where it was written out, and its unit."""

    text: str
    exact: Exact | None
    unit: Unit | None = None


@dataclass(frozen=True, slots=True)
class Words:
    """Words: what remains of them without case, accents, articles and marks."""

    tokens: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """A letter of a multiple choice, and the text behind it."""

    letter: str
    text: str
    marked: bool


@dataclass(frozen=True, slots=True)
class Moment:
    """A date, a time of day, a ratio, or a numeral in a base."""

    kind: str
    value: Any


@dataclass(frozen=True, slots=True)
class Several:
    """Answers in no order: a set in braces, or a list without brackets."""

    items: tuple[str, ...]
    braced: bool


@dataclass(frozen=True, slots=True)
class Row:
    """Answers in an order, with the brackets around them."""

    items: tuple[str, ...]
    brackets: str


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of entries."""

    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Region:
    """A union of intervals (`Piece`) and of inequalities (sides and signs), of one variable."""

    parts: tuple[Any, ...]
    name: str | None


@dataclass(frozen=True, slots=True)
class Named:
    """A name and the text of its value, as in x = 5; without a name, what was computed.

    `source` is the side that must have this value, or about this one, for the text to be true.
    """

    name: str
    value: str
    source: str = ""
    about: bool = False


@dataclass(frozen=True, slots=True)
class Equation:
    """Two sides, neither of which is a name."""

    sides: tuple[str, str]


Reading = Scalar | Words | Choice | Moment | Several | Row | Matrix | Region | Named | Equation
