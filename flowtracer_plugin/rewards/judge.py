r"""Is what was said the right answer? Both are read, and compared in the readings of one kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import chain
from typing import Any, Protocol, runtime_checkable

from flowtracer_plugin.rewards import algebra, moments
from flowtracer_plugin.rewards.algebra import TooHugeError, refuse_deep
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
from flowtracer_plugin.rewards.readings import readings
from flowtracer_plugin.rewards.spelling import compact, spelled
from flowtracer_plugin.rewards.splitting import is_name
from flowtracer_plugin.rewards.units import DEGREE, PERCENT, RADIAN

MAX_ANSWER = 2000
"""Characters of the longest answer that is judged."""
MAX_ITEMS = 40
"""Items of the longest list of other things than numbers, and of the largest matrix."""
MAX_COMPARISONS = 5000
"""Comparisons of parts in one judgement, for sets of sets of sets."""


@runtime_checkable
class Algebra(Protocol):
    """What compares formulas: the module `algebra`, or something that asks another process."""

    def same_formula(self, one: str, other: str) -> bool:
        """Whether two formulas are equal."""

    def near(self, rounding: Exact, formula: str) -> bool:
        """Whether a number is a rounding of a formula."""

    def about(self, one: str, other: str) -> bool:
        """Whether two formulas have about one value."""

    def same_equation(self, one: tuple[str, str], other: tuple[str, str]) -> bool:
        """Whether two equations say the same."""

    def same_region(self, one: Sequence[Any], other: Sequence[Any]) -> bool:
        """Whether two unions of intervals and inequalities are equal."""


def equal_answers(gold: str, said: str) -> bool | None:
    r"""Whether an answer equals the right one, however it is written; None if that is unreadable.

    Each text is read as all that it can mean: a number, a quantity, a choice, a date, a set, an
    interval, a relation, words, a formula. Two answers are equal if they are in readings of one
    kind; `docs/rewards.md` lists what is equal in each kind. Formulas may take for ever: call it
    where it can be stopped, or let `math_answer` do so.

    Args:
        gold: The right answer.
        said: The answer to judge.

    Raises:
        TooHugeError: One of them is a number that nobody should compute.

    Example:
        >>> equal_answers("1/2", r"\frac{1}{2}"), equal_answers("(1, 2)", "(5, 2)")
        (True, False)
    """
    return judged_by(algebra, gold, said)


def judged_by(by: Algebra, gold: str, said: str) -> bool | None:
    """As `equal_answers`, with formulas compared by something else than `algebra`.

    Raises:
        TooHugeError: One of them is a number that nobody should compute.
    """
    if len(gold) > MAX_ANSWER or not (right := spelled(gold)):
        return None
    if len(said) > MAX_ANSWER:
        return False
    other = spelled(said)
    for text in (right, other):
        refuse_deep(text)
    return _Judge(by).equal(right, other)


class _Judge:
    def __init__(self, by: Algebra) -> None:
        self.by = by
        self.left = MAX_COMPARISONS

    def equal(self, right: str, said: str) -> bool:
        self.left -= 1
        if self.left < 0:
            raise TooHugeError(f"wanted at most {MAX_COMPARISONS} comparisons of parts")
        if not right or not said:
            return False
        if compact(right) == compact(said):
            return True
        pairs = [(one, other) for one in readings(right) for other in readings(said)]
        letters = [pair for pair in pairs if all(isinstance(part, Choice) for part in pair)]
        if any(part.marked for pair in letters for part in pair if isinstance(part, Choice)):
            pairs = letters  # the text behind a letter is no other letter
        return any(self.same(*pair) for pair in pairs)

    def same(self, one: Reading, other: Reading) -> bool:
        """Whether two readings mean the same, of one kind or of two that stand for each other."""
        for first, second in ((one, other), (other, one)):
            compare = _COMPARED.get((type(first), type(second)))
            if compare is not None:
                return compare(self, first, second)
        return False

    def all_same(self, some: Sequence[str], others: Sequence[str]) -> bool:
        return len(some) == len(others) <= MAX_ITEMS and all(map(self.equal, some, others))

    # one kind

    def scalars(self, one: Scalar, other: Scalar) -> bool:
        if one.unit is None and other.unit is None:
            return self.values(one, other)
        if one.unit is None or other.unit is None:
            return self.without_unit(*((one, other) if other.unit else (other, one)))
        if one.unit.same_kind(other.unit):
            if one.unit.factor == other.unit.factor:
                return self.values(one, other)
            return self.values(
                *(_times(part, part.unit.factor) for part in (one, other) if part.unit)
            )
        angles = {one.unit.powers, other.unit.powers}
        return angles == {DEGREE.powers, RADIAN.powers} and self.values(
            _turned(one), _turned(other)
        )

    def without_unit(self, bare: Scalar, other: Scalar) -> bool:
        """Whether a number equals a quantity, of which the unit was left out."""
        unit = other.unit
        if unit is None or not unit.sure or not other.text:
            return False
        if unit.powers == PERCENT.powers:
            above_one = other.exact is not None and abs(other.exact.value) > 1
            return self.values(bare, _times(other, unit.factor)) or (
                above_one and self.values(bare, other)
            )
        if unit.powers == DEGREE.powers and not bare.exact:
            return self.values(bare, _turned(other))
        return self.values(bare, other)

    def values(self, one: Scalar, other: Scalar) -> bool:
        if one.exact and other.exact:
            return one.exact.same(other.exact)
        if not one.text or not other.text:
            return False
        if self.by.same_formula(one.text, other.text):
            return True
        return any(
            first.exact is not None
            and first.exact.is_rounding
            and self.by.near(first.exact, second.text)
            for first, second in ((one, other), (other, one))
        )

    def words(self, one: Words, other: Words) -> bool:
        return one == other

    def choices(self, one: Choice, other: Choice) -> bool:
        if one.letter != other.letter or not (one.marked or other.marked):
            return False
        return not one.text or not other.text or self.equal(one.text, other.text)

    def moments(self, one: Moment, other: Moment) -> bool:
        if {one.kind, other.kind} == {"time", "ratio"}:
            ratios = [part.value[1] if part.kind == "time" else part.value for part in (one, other)]
            return ratios[0] == ratios[1]
        if one.kind == other.kind == "time":
            return moments.same_time(one.value[0], other.value[0])
        if {one.kind, other.kind} == {"ratio", "odds"}:
            return bool(one.value == other.value)
        return one == other

    def several(self, one: Several, other: Several) -> bool:
        right, said = _values_of_one_name(one.items), _values_of_one_name(other.items)
        numbers = [[number(item) for item in items] for items in (right, said)]
        if not any(exact is None or exact.is_rounding for exact in chain(*numbers)):
            values = [{exact.value for exact in some if exact} for some in numbers]
            return values[0] == values[1]
        if max(len(right), len(said)) > MAX_ITEMS:
            return False
        right, said = self.distinct(right), self.distinct(said)
        if len(right) != len(said):
            return False
        for item in right:
            place = next((at for at, own in enumerate(said) if self.equal(item, own)), None)
            if place is None:
                return False
            said = said[:place] + said[place + 1 :]
        return True

    def distinct(self, items: Sequence[str]) -> list[str]:
        kept: list[str] = []
        for item in items:
            if not any(self.equal(item, own) for own in kept):
                kept.append(item)
        return kept

    def rows(self, one: Row, other: Row) -> bool:
        alike = one.brackets == other.brackets or len(one.items) > 2
        return alike and self.all_same(one.items, other.items)

    def matrices(self, one: Matrix, other: Matrix) -> bool:
        cells = [[cell for row in matrix.rows for cell in row] for matrix in (one, other)]
        shapes = [[len(row) for row in matrix.rows] for matrix in (one, other)]
        return shapes[0] == shapes[1] and self.all_same(*cells)

    def regions(self, one: Region, other: Region) -> bool:
        if one.name and other.name and one.name != other.name:
            return False
        if self.same_pieces(one.parts, other.parts):
            return True
        if all(len(part) == 4 for part in (*one.parts, *other.parts)) and (
            len(one.parts) == len(other.parts) == 1
        ):
            return False
        return self.by.same_region(one.parts, other.parts)

    def same_pieces(self, some: Sequence[Any], others: Sequence[Any]) -> bool:
        left = [*others]
        for part in some:
            found = next((own for own in left if self.same_piece(part, own)), None)
            if found is None:
                return False
            left.remove(found)
        return not left

    def same_piece(self, one: Any, other: Any) -> bool:
        if len(one) != 4 or len(other) != 4:
            return bool(one == other)
        return (
            one[2:] == other[2:] and self.equal(one[0], other[0]) and self.equal(one[1], other[1])
        )

    def is_true(self, one: Named) -> bool:
        """Whether the sides of a chain such as 3 + 4 = 7 are equal."""
        if one.about:
            return self.by.about(one.source, one.value)
        return not one.source or self.equal(one.source, one.value)

    def named(self, one: Named, other: Named) -> bool:
        if not (self.is_true(one) and self.is_true(other)):
            return False
        if one.name == other.name or not (one.name and other.name):
            return self.equal(one.value, other.value)
        if one.name.startswith("(") != other.name.startswith("("):
            return False
        return self.by.same_equation((one.name, one.value), (other.name, other.value))

    def equations(self, one: Equation, other: Equation) -> bool:
        return self.by.same_equation(one.sides, other.sides)

    # kinds that can stand for each other

    def named_value(self, one: Named, other: Reading) -> bool:
        found = any(self.same(reading, other) for reading in readings(one.value))
        return found and self.is_true(one)

    def named_equation(self, one: Named, other: Equation) -> bool:
        return bool(one.name) and self.by.same_equation((one.name, one.value), other.sides)

    def choice_text(self, one: Choice, other: Reading) -> bool:
        return bool(one.text) and any(self.same(own, other) for own in readings(one.text))

    def one_item(self, one: Several, other: Reading) -> bool:
        items = self.distinct(_values_of_one_name(one.items)[:MAX_ITEMS])
        return len(items) == 1 and any(self.same(own, other) for own in readings(items[0]))

    def row_of_names(self, one: Several, other: Row) -> bool:
        pairs = [readings(item) for item in one.items]
        named = [pair[0] for pair in pairs if isinstance(pair[0], Named)]
        if len(named) == len(pairs) and len({pair.name for pair in named}) == len(named):
            ordered = sorted(named, key=lambda pair: pair.name)
            return other.brackets == "()" and self.all_same(
                [pair.value for pair in ordered], other.items
            )
        return not one.braced and len(other.items) > 2 and self.all_same(one.items, other.items)

    def vector(self, one: Matrix, other: Row) -> bool:
        single = len(one.rows) == 1 or all(len(row) == 1 for row in one.rows)
        cells = [cell for row in one.rows for cell in row]
        return single and other.brackets == "()" and self.all_same(cells, other.items)

    def ratio_value(self, one: Moment, other: Scalar) -> bool:
        parts = one.value if one.kind == "ratio" else None  # from 5 to 10 is no half
        if not parts or len(parts) != 2 or other.unit or not other.exact or not parts[1]:
            return False
        return bool("frac" in other.text or "/" in other.text) and other.exact.value == 1 / parts[1]


def _times(scalar: Scalar, factor: Fraction) -> Scalar:
    exact = scalar.exact and scalar.exact.times(factor)
    text = rf"({scalar.text}) \cdot \frac{{{factor.numerator}}}{{{factor.denominator}}}"
    return Scalar(text if scalar.text else "", exact)


def _turned(scalar: Scalar) -> Scalar:
    """An angle in radians."""
    if scalar.unit and scalar.unit.powers == DEGREE.powers:
        return Scalar(rf"({scalar.text}) \cdot \frac{{\pi}}{{180}}", None)
    return scalar


def _values_of_one_name(items: Sequence[str]) -> Sequence[str]:
    """The values of x = 1, x = 2 or x_1 = 1, x_2 = 2; other items as they are."""
    named = [item.partition("=") for item in items]
    names = {name.strip().partition("_")[0] for name, _, _ in named}
    if len(names) == 1 and all(sign and is_name(name) for name, sign, _ in named):
        return [value.strip() for _, _, value in named]
    return items


_ANY: tuple[type, ...] = (Scalar, Words, Moment, Several, Row, Matrix, Region)
_COMPARED: dict[tuple[type, type], Callable[..., bool]] = {
    (Scalar, Scalar): _Judge.scalars,
    (Words, Words): _Judge.words,
    (Choice, Choice): _Judge.choices,
    (Moment, Moment): _Judge.moments,
    (Several, Several): _Judge.several,
    (Row, Row): _Judge.rows,
    (Matrix, Matrix): _Judge.matrices,
    (Region, Region): _Judge.regions,
    (Named, Named): _Judge.named,
    (Equation, Equation): _Judge.equations,
    (Named, Equation): _Judge.named_equation,
    (Several, Row): _Judge.row_of_names,
    (Matrix, Row): _Judge.vector,
    (Moment, Scalar): _Judge.ratio_value,
    **{(Named, kind): _Judge.named_value for kind in _ANY},
    **{(Choice, kind): _Judge.choice_text for kind in (*_ANY, Named, Equation)},
    **{(Several, kind): _Judge.one_item for kind in (Scalar, Words, Moment, Region)},
}
