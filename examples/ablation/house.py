"""A task: several people walk through a house, and the question is where one of them ends up.

    People : Ann hall red blue , Bob attic blue green , … Where is Bob ?
    Ann red = attic Bob blue = cellar … answer Bob cellar

Every room has a door of each colour to another room. The pupil writes down everybody's steps. It
has learned some doors wrong: for these it mostly says a certain wrong room. Only the steps of the
person asked for matter. The others' steps are as uncertain and use the same doors, so a right
answer rewards their mistakes, and a wrong answer punishes what they got right.
"""

from __future__ import annotations

import random
import re

from examples.ablation.beliefs import Beliefs
from examples.ablation.task import Problem, Spans, Task

PEOPLE = ("Ann", "Bob", "Cal", "Dan")
ROOMS = ("attic", "bath", "cellar", "den", "garage", "hall", "kitchen", "porch")
DOORS = ("blue", "green", "red", "white")
STEPS = 2

BELIEFS = Beliefs.draw(ROOMS, DOORS, ROOMS)
"""Where every door of every room leads, and where the pupil believes that some lead."""


def draw(rng: random.Random) -> Problem:
    ways, ends = [], {}
    for person in PEOPLE:
        room, doors = rng.choice(ROOMS), rng.choices(DOORS, k=STEPS)
        ways.append(" ".join((person, room, *doors)))
        for door in doors:
            room = BELIEFS.true[room, door]
        ends[person] = room
    asked = rng.choice(PEOPLE)
    return Problem(
        prompt=f"People : {' , '.join(ways)} . Where is {asked} ?", answer=f"{asked} {ends[asked]}"
    )


def demonstrate(problem: Problem, rng: random.Random) -> str:
    """Everybody's first step, everybody's second step, and the answer."""
    rooms, doors = _ways(problem.prompt)
    said = []
    for step in range(STEPS):
        for person in PEOPLE:
            door = doors[person][step]
            rooms[person] = BELIEFS.said(rooms[person], door, rng)
            said.append(f" {person} {door} = {rooms[person]}")
    asked = problem.answer.split()[0]
    return "".join(said) + f" answer {asked} {rooms[asked]}"


def _ways(prompt: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    parts = [part.split() for part in prompt.removeprefix("People : ").split(" . ")[0].split(" , ")]
    return {part[0]: part[1] for part in parts}, {part[0]: part[2:] for part in parts}


def is_solved(completion: str, problem: Problem) -> bool:
    return completion.endswith(f" answer {problem.answer}")


def what_matters(completion: str) -> Spans:
    """The spans of the steps of the person asked for, and of the answer."""
    answer = re.search(r" answer (\w+).*$", completion)
    if answer is None:
        return []
    steps = re.finditer(rf" {answer[1]} \w+ = \w+", completion[: answer.start()])
    return [*(step.span() for step in steps), answer.span()]


HOUSE = Task(
    name="house",
    words=(*PEOPLE, *ROOMS, *DOORS, *[":", ",", ".", "?", "=", "Where", "is", "answer"]),
    first_word="People",
    draw=draw,
    demonstrate=demonstrate,
    is_solved=is_solved,
    answer=re.compile(r" answer \w+ (\w+)"),
    what_matters=what_matters,
    taught=900,
    answer_tokens=4,
    max_new_tokens=len(PEOPLE) * STEPS * 4 + 8,
)
