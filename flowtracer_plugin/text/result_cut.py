"""Responses cut after the equation that computes their answer.

A solution usually ends by repeating its answer, which the model only copies from an earlier line.
At the result of the first equation, as in "9 · 2 = 18", the model has to compute the answer.
"""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = r"\d++(?:,\d{3})*+(?:\.\d++)?"
# Neither an operand, such as 18 in "x = 18 * 2", nor a part of a longer number. All repeats are
# possessive or bounded, so that a search takes linear time.
_RESULT = re.compile(
    rf"=\s{{0,20}}(?:(?:\\boxed\{{|[*_$€£\\]{{1,9}})\s{{0,9}})?(-?{_NUMBER})"
    r"(?!\d|[.,]\d|[ \t]{0,9}[-+*/×÷^]{1,9}[ \t]{0,9}\d)"
)
_WRITTEN = re.compile(rf"(?<![\w.]){_NUMBER}")


class NotComputedError(ValueError):
    """No equation of a response computes its answer, or the answer is written earlier."""


def cut_at_result(response: str, answer: str) -> str:
    r"""The response up to and including the first result of an equation that is the answer.

    Raises:
        NotComputedError: There is no such equation, or the response holds the number earlier, in
            any form, from where it could be copied. The prompt is not searched.

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
        raise NotComputedError(f"{answer!r} is in the response before it is computed")
    return response[:end]


def _size(number: str) -> Decimal:
    """The number without its sign, since a minus may also be an operator."""
    return abs(Decimal(number.replace(",", "")))
