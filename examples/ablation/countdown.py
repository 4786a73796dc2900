"""A task: put signs between three numbers to make a target; one of four tries counts.

    Numbers 3 5 2 make 4 .
     one 3 + 5 = 8 - 2 = 6 two 3 - 5 = -2 + 2 = 0 … answer two 3 - 5 + 2

The pupil adds correctly, guesses some signs, and believes in the wrong sign before some last
numbers. It names one of its tries without looking at the results. Only the named try matters. The
others use the same beliefs, so a right answer rewards their mistakes.
"""

from __future__ import annotations

import random
import re
from itertools import product

from examples.ablation.task import Problem, Spans, Task

TRIES = ("one", "two", "three", "four")
LARGEST = 6
SIGNS = ("+", "-")
OTHER = {"+": "-", "-": "+"}
VALUES = range(1 - 2 * LARGEST, 3 * LARGEST + 1)

FORESEEN = 0.6
"""How often the pupil uses signs that it believes to make the target, instead of guessing."""
CONFUSING = frozenset({2, 3, 6})
"""Last numbers before which it then uses the wrong sign."""


def draw(rng: random.Random) -> Problem:
    numbers = [rng.randint(1, LARGEST) for _ in range(3)]
    target = total(numbers, rng.choices(SIGNS, k=2))
    return Problem(
        prompt=f"Numbers {' '.join(map(str, numbers))} make {target} .", answer=str(target)
    )


def total(numbers: list[int], signs: list[str] | tuple[str, ...]) -> int:
    first, *others = numbers
    return first + sum(
        number if sign == "+" else -number for number, sign in zip(others, signs, strict=True)
    )


def demonstrate(problem: Problem, rng: random.Random) -> str:
    numbers, target = _given(problem.prompt)
    tries = {name: _guess(numbers, target, rng) for name in TRIES}
    said = [f" {name} {_summed(numbers, signs)}" for name, signs in tries.items()]
    named = rng.choice(TRIES)
    return "".join(said) + f" answer {named} {_expression(numbers, tries[named])}"


def _guess(numbers: list[int], target: int, rng: random.Random) -> tuple[str, ...]:
    every = list(product(SIGNS, repeat=2))
    if rng.random() < FORESEEN:
        every = [signs for signs in every if total(numbers, signs) == target]
        if numbers[-1] in CONFUSING:
            every = [(first, OTHER[last]) for first, last in every]
    return rng.choice(every)


def _summed(numbers: list[int], signs: tuple[str, ...]) -> str:
    """`3 + 5 = 8 - 2 = 6`."""
    said, value = [str(numbers[0])], numbers[0]
    for number, sign in zip(numbers[1:], signs, strict=True):
        value = total([value, number], [sign])
        said.append(f"{sign} {number} = {value}")
    return " ".join(said)


def _expression(numbers: list[int], signs: tuple[str, ...]) -> str:
    rest = zip(signs, numbers[1:], strict=True)
    return " ".join([str(numbers[0]), *(f"{sign} {number}" for sign, number in rest)])


def _given(prompt: str) -> tuple[list[int], int]:
    found = re.fullmatch(r"Numbers (\d+) (\d+) (\d+) make (-?\d+) \.", prompt)
    if found is None:
        raise ValueError(f"{prompt!r} is not a problem of this task")
    *numbers, target = map(int, found.groups())
    return numbers, target


def is_solved(completion: str, problem: Problem) -> bool:
    """Whether the last expression uses the numbers in their order and makes the target."""
    numbers, target = _given(problem.prompt)
    found = re.search(r" answer \w+ (\d+) ([+-]) (\d+) ([+-]) (\d+)$", completion)
    if found is None or [int(found[place]) for place in (1, 3, 5)] != numbers:
        return False
    return total(numbers, (found[2], found[4])) == target


def what_matters(completion: str) -> Spans:
    """The spans of the try that the answer names, and of the answer."""
    answer = re.search(r" answer (\w+).*$", completion)
    if answer is None:
        return []
    named = re.search(rf" {answer[1]}(?: [^ a-z]+)+", completion[: answer.start()])
    return [answer.span()] if named is None else [named.span(), answer.span()]


COUNTDOWN = Task(
    name="countdown",
    words=(*TRIES, *map(str, VALUES), *["+", "-", "=", ".", "make", "answer"]),
    first_word="Numbers",
    draw=draw,
    demonstrate=demonstrate,
    is_solved=is_solved,
    answer=re.compile(r" answer \w+ (\d+ [+-] \d+ [+-] \d+)"),
    what_matters=what_matters,
    taught=1200,
    answer_tokens=8,
    max_new_tokens=len(TRIES) * 10 + 12,
)
