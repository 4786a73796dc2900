r"""Formulas, as math-verify's parser reads them: are two equal, do two relations say the same?

Only a process that may be stopped should call this: no bound on the text bounds the time that
algebra takes. `refuse_huge` and `MAX_TEXT` keep out what is known to take for ever.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import lru_cache, wraps
from typing import Any, ParamSpec

from flowtracer_plugin.rewards.numerals import Exact

MAX_TEXT = 1000
"""Characters of the longest formula that is read."""

P = ParamSpec("P")
Piece = tuple[str, str, bool, bool]
"""An interval: its ends, and whether each belongs to it."""

_WORDS = (
    "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc log ln exp sqrt",
    "lg max min gcd lcm pi alpha beta gamma delta epsilon theta lambda mu sigma omega phi tau rho",
)
_FUNCTIONS, _NAMES = (words.split() for words in _WORDS)
_PLAIN = re.compile(rf"(?<![a-zA-Z\\{{])({'|'.join(_FUNCTIONS + _NAMES)})(?![a-zA-Z])")
_GLUED = re.compile(rf"(?<![a-zA-Z\\])({'|'.join(_FUNCTIONS)})(?=[a-z]\b|\d)")
_MIXED = re.compile(r"(?<![\w.^}\\])(\d+)\s*(\\frac\{\d+\}\{\d+\})(?!\s*[!^])")
_MIXED_SLASH = re.compile(r"(?<![\w.^}\\/])(\d+) +(\d+)/(\d+)(?![\w.])")
_SLASH = re.compile(r"(?<![\w.^}\\/)])(\d+)\s*/\s*(\d+)(?![\d.!^])")
_DECIMAL = re.compile(r"(?<![\w.])(\d*)\.(\d+)(?![\d.])")
_GROUPS = re.compile(r"(?<![\d,])\d{1,3}(?:,\d{3})+(?![\d,])")
_CAPITAL = re.compile(r"(?<![a-zA-Z\\])(\\[a-zA-Z]+\s*)|([A-Z])(?:_(\w|\{\w+\}))?(?!')")
_PRODUCTS = [  # the parser adds two numbers without a sign between them
    re.compile(rf"({first})\s*(?={second})")
    for first, second in (
        (r"(?<![_\d.])\d+", r"\(|\\frac|\\binom"),
        (r"\)", r"\(|\d|\\frac|\\binom"),
        (r"\\binom\{[^{}]*\}\{[^{}]*\}", r"\(|\d|\\"),
        (r"\\pi|(?<![a-zA-Z\\])[ixyzn]", r"\("),
    )
]
_TWO_NUMBERS = re.compile(r"\d\s+\d|\]\s*\d|\d\.\d*\.\d")
_DEGREES = re.compile(r"°")


class TooHugeError(ValueError):
    """A formula whose value nobody should compute."""


def _or_false(compare: Callable[P, bool]) -> Callable[P, bool]:
    """A comparison that is False where SymPy fails; it raises all kinds of errors."""

    @wraps(compare)
    def compared(*args: P.args, **kwargs: P.kwargs) -> bool:
        try:
            return compare(*args, **kwargs)
        except (TooHugeError, MemoryError, RecursionError):
            raise
        except Exception:  # noqa: BLE001
            return False

    return compared


@_or_false
def same_formula(one: str, other: str) -> bool:
    r"""Whether two spelled formulas have the same value wherever both have one.

    Raises:
        TooHugeError: A part of one of them is too large to compute.
    """
    first, second = _parsed(one), _parsed(other)
    if first is None or second is None:
        return False
    return _same(first, second)


@_or_false
def near(rounding: Exact, formula: str) -> bool:
    """Whether a number is a formula's value, rounded or cut to as many decimals.

    Raises:
        TooHugeError: A part of the formula is too large to compute.
    """
    value = _value(formula)
    return value is not None and rounding.rounds(value)


@_or_false
def about(one: str, other: str) -> bool:
    """Whether two formulas without variables differ by less than a hundredth.

    Raises:
        TooHugeError: A part of one of them is too large to compute.
    """
    first, second = _value(one), _value(other)
    if first is None or second is None:
        return False
    return abs(first - second) * 100 <= abs(first)


@_or_false
def same_equation(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether two equations, each a pair of sides, are multiples of each other.

    Raises:
        TooHugeError: A part of one of them is too large to compute.
    """
    return _factor(one, other) is not None


@_or_false
def same_region(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two unions of intervals and inequalities are the same set, or multiples.

    Args:
        one: Intervals as `Piece`, inequalities as pairs of their sides and signs, and regions
            without points, as "without", their parts and the points.
        other: The same.

    Raises:
        TooHugeError: A part of one of them is too large to compute.
    """
    relations = [part[0] for part in (one, other) if len(part) == 1 and len(part[0]) == 2]
    if len(relations) == 2 and _same_relation(*relations):
        return True
    first, second = _region(one), _region(other)
    if first is None or second is None:
        return False
    return bool(first == second or first.symmetric_difference(second).is_empty)


def _same_relation(one: Any, other: Any) -> bool:
    (sides, signs), (others, other_signs) = one, other
    if len(sides) != len(others) or len(sides) != 2:
        return False
    factor = _factor(sides, others)
    if factor is None or not factor.is_real:
        return False
    return bool(other_signs == (signs if factor > 0 or signs == (r"\ne",) else _flipped(signs)))


FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}


def _flipped(signs: Iterable[str]) -> tuple[str, ...]:
    return tuple(FLIPPED[sign] for sign in signs)


def _factor(one: Sequence[str], other: Sequence[str]) -> Any:
    """The number that one difference of sides is of the other, or None."""
    import sympy

    sides = [_parsed(side) for side in (*one, *other)]
    if any(side is None for side in sides):
        return None
    first, second = sides[0] - sides[1], sides[2] - sides[3]
    names = sorted(first.free_symbols | second.free_symbols, key=str)
    if first.free_symbols != second.free_symbols:
        return None
    ratios = []
    for point in _points(names):
        above, below = _at(first, point), _at(second, point)
        if above is not None and below is not None and below:
            ratios.append(above / below)
    if len(ratios) < 3 or any(not _close(ratio, ratios[0]) for ratio in ratios) or not ratios[0]:
        return None
    return sympy.re(ratios[0]) if not sympy.im(ratios[0]) else None


def _region(parts: Sequence[Any]) -> Any:
    import sympy

    found: Any = sympy.S.EmptySet
    variables: set[Any] = set()
    for part in parts:
        if len(part) == 3:  # a region without some points
            base, points = _region(part[1]), [_parsed(point) for point in part[2]]
            if base is None or any(point is None or point.free_symbols for point in points):
                return None
            piece: Any = base - sympy.FiniteSet(*(point.doit() for point in points))
        elif len(part) == 4:
            low, high = _parsed(part[0]), _parsed(part[1])
            if low is None or high is None or (low.free_symbols | high.free_symbols):
                return None
            piece = sympy.Interval(low.doit(), high.doit(), not part[2], not part[3])
        else:
            relations = _relations(*part)
            variables |= set().union(*(relation.free_symbols for relation in relations))
            if not relations or len(variables) != 1:
                return None
            piece = sympy.Intersection(*(relation.as_set() for relation in relations))
        found = found.union(piece)
    return found


def _relations(sides: Sequence[str], signs: Sequence[str]) -> list[Any]:
    import sympy

    kinds = {"<": sympy.Lt, ">": sympy.Gt, r"\le": sympy.Le, r"\ge": sympy.Ge, r"\ne": sympy.Ne}
    parsed = [_parsed(side) for side in sides]
    if any(side is None for side in parsed):
        return []
    pairs = zip(parsed[:-1], parsed[1:], signs, strict=True)
    return [kinds[sign](left.doit(), right.doit()) for left, right, sign in pairs]


def _same(first: Any, second: Any) -> bool:
    import sympy

    if first == second:
        return True
    for expression in (first, second):
        refuse_huge(expression)
    first, second = first.doit(), second.doit()
    if first == second or (first.is_Rational and second.is_Rational):
        return bool(first == second)
    if any(value.has(*_infinite()) for value in (first, second)):
        return False
    names = sorted(first.free_symbols | second.free_symbols, key=str)
    if (
        names
        and first.free_symbols.isdisjoint(second.free_symbols)
        and all(value.free_symbols for value in (first, second))
    ):
        return False
    compared = 0
    complex_ = any(value.has(sympy.I) for value in (first, second))
    for point in _points(names):
        values = _at(first, point), _at(second, point)
        if None in values:
            continue
        real = [abs(sympy.im(value)) < 1e-20 for value in values]
        if names and not complex_ and not all(real):
            continue  # outside the domain of one of them
        if not _close(*values):
            return False
        compared += 1
    return compared >= (3 if names else 1)


def _infinite() -> tuple[Any, ...]:
    import sympy

    return (sympy.oo, -sympy.oo, sympy.zoo, sympy.nan)


def _points(names: Sequence[Any]) -> list[dict[Any, Any]]:
    """Values of the variables at which formulas are compared: positive, negative, and mixed."""
    import sympy

    if not names:
        return [{}]
    seeds = (3, 7, 13, 19, 29, 37, 43, 59)
    signs = (1, 1, 1, -1, -1, 1, -1, 1)
    small = (1, 1, 8, 1, 3, 9, 20, 30)
    return [
        {
            name: sympy.Rational(sign ** (place % 2 + 1) if turn % 2 else sign, 1)
            * sympy.Rational((seed * (place + 2) * 31 + 17 * place) % 97 + 5, 11 * divisor)
            for place, name in enumerate(names)
        }
        for turn, (seed, sign, divisor) in enumerate(zip(seeds, signs, small, strict=True))
    ]


def _at(expression: Any, point: dict[Any, Any]) -> Any:
    """The value at a point with 40 digits, or None where there is none."""
    import sympy

    try:
        value = sympy.N(expression.subs(point), 40, maxn=200)
    except (ValueError, TypeError, ArithmeticError, AttributeError, NotImplementedError):
        return None
    if not value.is_number or value.has(*_infinite()):
        return None
    real, imaginary = value.as_real_imag()
    return value if real.is_Float or (real.is_Number and imaginary.is_number) else None


def _close(one: Any, other: Any) -> bool:
    size = max(abs(one), abs(other))
    return bool(abs(one - other) <= size * 10**-25 or size < 10**-30)


def _value(formula: str) -> Fraction | None:
    """The value of a formula without variables, to 40 digits."""
    import sympy

    parsed = _parsed(formula)
    if parsed is None or parsed.free_symbols:
        return None
    refuse_huge(parsed)
    value = _at(parsed.doit(), {})
    if value is None or abs(sympy.im(value)) > 1e-20:
        return None
    return Fraction(str(sympy.re(value)))


@lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    """The formula as SymPy's expression, or None if it cannot be read as one."""
    from latex2sympy2_extended import latex2sympy

    if len(text) > MAX_TEXT or not text.strip() or "'" in text:
        return None
    refuse_deep(text)
    latex = as_latex(text)
    if _TWO_NUMBERS.search(latex):
        return None
    try:
        found = latex2sympy(latex, is_real=True, convert_degrees=False, normalization_config=None)
        return _with_constants(found)
    except TooHugeError:
        raise
    except Exception:  # noqa: BLE001  # the parser raises bare exceptions for what it cannot read
        return None


def _with_constants(found: Any) -> Any:
    """The expression with the imaginary unit, and without what is no expression."""
    import sympy

    if not isinstance(found, sympy.Expr):
        return None
    for part in found.atoms(sympy.Derivative):  # dy/dx is no derivative of the number y
        if not part.expr.free_symbols & set(part.variables):
            return None
    names = {symbol.name: symbol for symbol in found.free_symbols}
    refuse_huge(found)
    return found.xreplace({names["i"]: sympy.I}) if "i" in names else found


def as_latex(text: str) -> str:
    r"""A spelled formula as the LaTeX that the parser reads in one way only.

    Example:
        >>> as_latex("2 1/2 sqrt(x) + x^10"), as_latex("0.25 A")
        ('(2+\\frac{1}{2}) \\sqrt{x} + x^{10}', '\\frac{25}{100} v_{bigA}')
    """
    text = _GROUPS.sub(lambda found: found[0].replace(",", ""), text)
    text = _PLAIN.sub(r"\\\1 ", _GLUED.sub(r"\1 ", text))
    text = _grouped(_grouped(text, "^"), r"\sqrt")
    text = re.sub(r"\^\s*([-+]?\d+(?:\.\d+)?)", r"^{\1}", text)
    text = re.sub(r"_(\d+)", r"_{\1}", text)
    text = _MIXED_SLASH.sub(r"(\1+\\frac{\2}{\3})", _MIXED.sub(r"(\1+\2)", text))
    text = _SLASH.sub(r"\\frac{\1}{\2}", text)
    text = _DECIMAL.sub(lambda m: rf"\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}", text)
    for pattern in _PRODUCTS:
        text = pattern.sub(r"\1 \\cdot ", text)
    text = _CAPITAL.sub(_small, text)
    text = _DEGREES.sub(r" \\cdot \\frac{\\pi}{180}", text)
    return " ".join(text.split())


def _small(found: re.Match[str]) -> str:
    """A capital with a name of its own, since the parser takes it for the small letter."""
    if found[1]:
        return found[1]
    below = (found[3] or "").strip("{}")
    return f"v_{{big{found[2]}{below}}}"


def _grouped(text: str, command: str) -> str:
    """The text with braces in place of the parentheses behind a command."""
    start = 0
    while (place := text.find(command, start)) >= 0:
        start = place + len(command)
        opening = start + len(text[start:]) - len(text[start:].lstrip())
        if text[opening : opening + 1] != "(":
            continue
        depth = 0
        for end in range(opening, len(text)):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            if not depth:
                text = f"{text[:start]}{{{text[opening + 1 : end]}}}{text[end + 1 :]}"
                break
    return text


def refuse_deep(text: str) -> None:
    """Raise if brackets are nested more deeply than any answer's.

    Raises:
        TooHugeError: They are.
    """
    depth = 0
    for sign in text:
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(sign, 0)
        if depth > 40:
            raise TooHugeError("brackets are nested more than 40 deep")


MAX_DIGITS = 20_000
"""Digits of the longest number that is computed."""


def refuse_huge(expression: Any) -> None:
    """Raise if a part of the expression has too many digits to compute it.

    Raises:
        TooHugeError: One has.
    """
    import sympy

    for part in sympy.preorder_traversal(expression):
        if isinstance(part, sympy.Pow | sympy.factorial | sympy.binomial | sympy.gamma) and (
            _digits(part) > MAX_DIGITS
        ):
            raise TooHugeError(f"wanted at most {MAX_DIGITS} digits in every part of a formula")


def _digits(expression: Any) -> float:
    """About how many digits the value of an expression has, never too few; variables have one."""
    import sympy

    if expression.is_Rational:
        longest = max(abs(expression.p), expression.q)
        return longest.bit_length() * 0.302
    arguments = [_digits(part) for part in expression.args]
    if isinstance(expression, sympy.Pow | sympy.exp):
        *base, power = arguments
        return max(base[0] if base else 0.5, 0.5) * _ten_to(power)
    if isinstance(expression, sympy.factorial | sympy.gamma | sympy.binomial):
        return (arguments[0] + 1) * _ten_to(arguments[0])
    if expression.is_Mul:
        return sum(arguments)
    return max(arguments, default=1) + len(arguments) / 10


def _ten_to(power: float) -> float:
    return 10 ** min(power, 300) if power < 300 else float("inf")
