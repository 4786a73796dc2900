"""A task: a program is executed line by line, and the question is what one variable holds.

    Program : a 3 5 , b 1 1 , … g c f , h a d , i b e . What is h ?
     a 3 5 2 b 1 1 4 … g c 1 f 3 6 h a 2 d 6 1 i b 4 e 5 3 answer h 1

Every line combines two values by a made-up table. Six variables combine digits, and three combine
two of these variables each. The pupil copies each line, with the values of its variables, and
writes down what it gives. It has learned some entries of the table wrong: for these it mostly says
a certain wrong digit. Only the line of the variable asked for and its two sources matter. The
others are as uncertain and use the same entries, so a right answer rewards their mistakes, and a
wrong answer punishes what they got right.
"""

from __future__ import annotations

import random
import re

from examples.ablation.beliefs import Beliefs
from examples.ablation.task import Problem, Spans, Task

DIGITS = ("1", "2", "3", "4", "5", "6")
SOURCES = ("a", "b", "c", "d", "e", "f")
RESULTS = ("g", "h", "i")

LINE = re.compile(r" (?P<name>[a-i])(?: (?P<first>[a-f]))? \d(?: (?P<second>[a-f]))? \d \d(?!\S)")
"""A line of a completion, with its variable and its sources, if it has any."""

BELIEFS = Beliefs.draw(DIGITS, DIGITS, DIGITS)
"""What every pair of digits gives, and what the pupil believes that some give."""


def draw(rng: random.Random) -> Problem:
    lines = {name: (rng.choice(DIGITS), rng.choice(DIGITS)) for name in SOURCES}
    mixed = rng.sample(SOURCES, len(SOURCES))
    for name, first, second in zip(RESULTS, mixed[::2], mixed[1::2], strict=True):
        lines[name] = (first, second)
    held: dict[str, str] = {}
    for name, operands in lines.items():
        first, second = (held.get(one, one) for one in operands)
        held[name] = BELIEFS.true[first, second]
    asked = rng.choice(RESULTS)
    said = " , ".join(" ".join((name, *operands)) for name, operands in lines.items())
    return Problem(prompt=f"Program : {said} . What is {asked} ?", answer=f"{asked} {held[asked]}")


def demonstrate(problem: Problem, rng: random.Random) -> str:
    """Every line with what it gives, and the answer."""
    held: dict[str, str] = {}
    said = []
    for name, *operands in _lines(problem.prompt):
        first, second = (held.get(one, one) for one in operands)
        held[name] = BELIEFS.said(first, second, rng)
        copied = [f"{one} {held[one]}" if one in held else one for one in operands]
        said.append(f" {name} {' '.join(copied)} {held[name]}")
    asked = problem.answer.split()[0]
    return "".join(said) + f" answer {asked} {held[asked]}"


def _lines(prompt: str) -> list[list[str]]:
    given = prompt.removeprefix("Program : ").split(" . ")[0]
    return [line.split() for line in given.split(" , ")]


def is_solved(completion: str, problem: Problem) -> bool:
    return completion.endswith(f" answer {problem.answer}")


def what_matters(completion: str) -> Spans:
    """The spans of the lines that the variable asked for depends on, and of the answer."""
    answer = re.search(r" answer (\w)( .*)?$", completion)
    if answer is None:
        return []
    lines = list(LINE.finditer(completion[: answer.start()]))
    wanted, spans = {answer[1]}, [answer.span()]
    for line in reversed(lines):
        if line["name"] in wanted:
            wanted |= {line["first"], line["second"]}
            spans.append(line.span())
    return spans[::-1]


PROGRAM = Task(
    name="program",
    words=(*SOURCES, *RESULTS, *DIGITS, *[":", ",", ".", "?", "What", "is", "answer"]),
    first_word="Program",
    draw=draw,
    demonstrate=demonstrate,
    is_solved=is_solved,
    answer=re.compile(r" answer \w (\w)"),
    what_matters=what_matters,
    taught=1500,
    answer_tokens=4,
    max_new_tokens=4 * len(SOURCES) + 6 * len(RESULTS) + 5,
)
