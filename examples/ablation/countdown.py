"""A task: put signs between three numbers to make a target, for several sets; one of them counts.

    Make : one 3 5 2 is 4 , two 6 1 4 is 3 , … Show two .
     one 3 + 5 = 8 - 2 = 6 two 6 + 1 = 7 - 4 = 3 … answer two 6 + 1 - 4

The pupil adds correctly, guesses some signs, and believes in the wrong sign before some last
numbers. It works on every set, and then copies the one asked for. Only that one matters. The others
use the same beliefs, so a right answer rewards their mistakes, and a wrong one punishes what they
got right.
"""

from __future__ import annotations

import random
import re
from itertools import product

from examples.ablation.task import Problem, Spans, Task

SETS = ("one", "two", "three", "four")
LARGEST = 6
SIGNS = ("+", "-")
OTHER = {"+": "-", "-": "+"}
VALUES = range(1 - 2 * LARGEST, 3 * LARGEST + 1)

FORESEEN = 0.6
"""How often the pupil uses signs that it believes to make the target, instead of guessing."""
CONFUSING = frozenset({2, 3, 6})
"""Last numbers before which it then uses the wrong sign."""


def draw(rng: random.Random) -> Problem:
    sets, targets = [], []
    for _ in SETS:
        numbers = [rng.randint(1, LARGEST) for _ in range(3)]
        sets.append(numbers)
        targets.append(total(numbers, rng.choices(SIGNS, k=2)))
    said = [
        f"{name} {' '.join(map(str, numbers))} is {target}"
        for name, numbers, target in zip(SETS, sets, targets, strict=True)
    ]
    asked = rng.randrange(len(SETS))
    return Problem(
        prompt=f"Make : {' , '.join(said)} . Show {SETS[asked]} .", answer=str(targets[asked])
    )


def total(numbers: list[int], signs: list[str] | tuple[str, ...]) -> int:
    first, *others = numbers
    return first + sum(
        number if sign == "+" else -number for number, sign in zip(others, signs, strict=True)
    )


def demonstrate(problem: Problem, rng: random.Random) -> str:
    sets, asked = _given(problem.prompt)
    signs = {name: _guess(numbers, target, rng) for name, (numbers, target) in sets.items()}
    said = [f" {name} {_summed(sets[name][0], signs[name])}" for name in SETS]
    return "".join(said) + f" answer {asked} {_expression(sets[asked][0], signs[asked])}"


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


def _given(prompt: str) -> tuple[dict[str, tuple[list[int], int]], str]:
    """The numbers and target of each set, and the name of the one asked for."""
    sets = {
        name: ([int(number) for number in numbers.split()], int(target))
        for name, numbers, target in re.findall(r"(\w+) ((?:\d+ ){3})is (-?\d+)", prompt)
    }
    asked = re.search(r"Show (\w+) \.$", prompt)
    if tuple(sets) != SETS or asked is None:
        raise ValueError(f"{prompt!r} is not a problem of this task")
    return sets, asked[1]


def is_solved(completion: str, problem: Problem) -> bool:
    """Whether the answer uses the numbers asked for, in their order, and makes their target."""
    sets, asked = _given(problem.prompt)
    numbers, target = sets[asked]
    found = re.search(r" answer (\w+) (\d+) ([+-]) (\d+) ([+-]) (\d+)$", completion)
    if found is None or found[1] != asked:
        return False
    said = [int(found[place]) for place in (2, 4, 6)]
    return said == numbers and total(numbers, (found[3], found[5])) == target


def what_matters(completion: str) -> Spans:
    """The spans of the set that the answer names, and of the answer."""
    answer = re.search(r" answer (\w+).*$", completion)
    if answer is None:
        return []
    named = re.search(rf" {answer[1]}(?: [^ a-z]+)+", completion[: answer.start()])
    return [answer.span()] if named is None else [named.span(), answer.span()]


COUNTDOWN = Task(
    name="countdown",
    words=(*SETS, *map(str, VALUES), *["+", "-", "=", ".", ",", ":", "is", "Show", "answer"]),
    first_word="Make",
    draw=draw,
    demonstrate=demonstrate,
    is_solved=is_solved,
    answer=re.compile(r" answer \w+ (\d+ [+-] \d+ [+-] \d+)"),
    what_matters=what_matters,
    taught=1500,
    answer_tokens=8,
    max_new_tokens=len(SETS) * 10 + 12,
)
