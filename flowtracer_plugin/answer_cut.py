"""Responses cut where their answer has to be computed: at the result of an equation.

A solution usually ends by repeating its answer, and then the model only copies it from the line
before. Cut before the result, "9 · 2 = " leaves the model to compute what has not been written.
"""

from __future__ import annotations

import re

from flowtracer_plugin.answers import same_answer

_RESULT = re.compile(r"=\s*[$€£]?\s*(-?\d+(?:,\d{3})*(?:\.\d+)?)")


class NotComputedError(ValueError):
    """A response has no place at which its answer is computed, and not before."""


def cut_at_result(response: str, answer: str) -> str:
    r"""The response up to the first result of an equation that is the answer, and including it.

    Only if the answer stands nowhere before: else it could be copied.

    Raises:
        NotComputedError: There is no such equation.

    Examples:
        >>> cut_at_result("He has 9 * 2 = $18 left.\nThe answer is 18", "18")
        'He has 9 * 2 = $18'
    """
    results = (match for match in _RESULT.finditer(response) if same_answer(match[1], answer))
    found = next(results, None)
    if found is None:
        raise NotComputedError(f"no equation in the response has the result {answer!r}")
    start, end = found.span(1)
    if re.search(rf"(?<![\d.,]){re.escape(response[start:end])}(?![\d]|[.,]\d)", response[:start]):
        raise NotComputedError(f"{answer!r} stands in the response before it is computed")
    return response[:end]
