"""Responses cut where their answer has to be computed: at the result of an equation.

A solution usually ends by repeating its answer, and then the model only copies it from the line
before. Cut before the result, "9 · 2 = " leaves the model to compute what has not been written.
"""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
# Not an operand, as 18 is in "x = 18 * 2", and no part of a longer number.
_RESULT = re.compile(
    rf"=\s*(?:\\boxed\{{|[*_$€£\\]+)?\s*(-?{_NUMBER})(?!\d|[.,]\d|[ \t]*[-+*/×÷^]+[ \t]*\d)"
)
_WRITTEN = re.compile(rf"(?<![\w.]){_NUMBER}")


class NotComputedError(ValueError):
    """A response has no place at which its answer is computed, and not before."""


def cut_at_result(response: str, answer: str) -> str:
    r"""The response up to the first result of an equation that is the answer, and including it.

    Only if that number stands nowhere before in the response, in whatever form: else it could be
    copied. The prompt is not looked at.

    Raises:
        NotComputedError: There is no such equation.

    Examples:
        >>> cut_at_result("He has 9 * 2 = $18 left.\nThe answer is 18", "18")
        'He has 9 * 2 = $18'
    """
    numbers = _WRITTEN.findall(answer)
    wanted = _size(numbers[-1]) if numbers else None
    results = (match for match in _RESULT.finditer(response) if _size(match[1]) == wanted)
    found = next(results, None)
    if found is None:
        raise NotComputedError(f"no equation in the response has the result {answer!r}")
    start, end = found.span(1)
    if any(_size(one) == wanted for one in _WRITTEN.findall(response[:start])):
        raise NotComputedError(f"{answer!r} stands in the response before it is computed")
    return response[:end]


def _size(number: str) -> Decimal:
    """Without its sign, which may also be a minus."""
    return abs(Decimal(number.replace(",", "")))
