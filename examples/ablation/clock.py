"""A task in sentences: hours follow from each other, and the question is which hour is somebody's.

    Hours : 3 hours after 11 is Eve's . 2 hours after Eve's is Ann's . … Which is Ann's ?
     3 hours after 11 is Eve's 2 . 2 hours after Eve's 2 is Ann's 4 . … answer Ann's 4

A story tells of six out of eight people. The hours of three follow from hours that are given, and
those of the other three from somebody else's, which may follow from a third. The pupil writes each
sentence down again, with everybody's hour. It has learned some sums on the clock wrong: for these
it mostly says a certain wrong hour. Only the sentence about the person asked for matters, and
those that its hour follows from, one to four in all, which may stand anywhere. The others are as
uncertain and use the same sums, so a right answer rewards their mistakes, and a wrong answer
punishes what they got right.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace

from examples.ablation.beliefs import SEED, Beliefs
from examples.ablation.task import Problem, Spans, Task

PEOPLE = ("Ann's", "Ben's", "Cal's", "Dan's", "Eve's", "Fay's", "Gus's", "Hal's")
DURATIONS = ("2", "3", "4")
HOURS = tuple(str(hour) for hour in range(1, 13))
LATER = 3
"""How many hours follow from another person's, and how many from one that is given."""

SENTENCE = re.compile(r" \d hours after (?P<before>\S+)(?: \d+)? is (?P<whose>\S+) \d+ \.")
"""A sentence of a completion."""

BELIEFS = Beliefs.learned(
    HOURS,
    {(hour, more): str((int(hour) + int(more) - 1) % 12 + 1)
     for hour in HOURS for more in DURATIONS},
    random.Random(SEED),
)  # fmt: skip
"""The sums on the clock, and what the pupil believes of some."""


def draw(rng: random.Random) -> Problem:
    people = rng.sample(PEOPLE, 2 * LATER)
    later = set(rng.sample(range(1, 2 * LATER), LATER))
    said, known = [], {}
    for place, whose in enumerate(people):
        before = rng.choice(people[:place] if place in later else HOURS)
        duration = rng.choice(DURATIONS)
        known[whose] = BELIEFS.true[known.get(before, before), duration]
        said.append(f" {duration} hours after {before} is {whose} .")
    asked = rng.choice(people)
    prompt = f"Hours :{''.join(said)} Which is {asked} ?"
    return Problem(prompt=prompt, answer=f"{asked} {known[asked]}")


def demonstrate(problem: Problem, rng: random.Random) -> str:
    """Every sentence with the hours that it is about, and the answer."""
    known: dict[str, str] = {}
    said = []
    for duration, before, whose in re.findall(
        r"(\d) hours after (\S+) is (\S+) \.", problem.prompt
    ):
        since = f"{before} {known[before]}" if before in known else before
        known[whose] = BELIEFS.said(known.get(before, before), duration, rng)
        said.append(f" {duration} hours after {since} is {whose} {known[whose]} .")
    asked = problem.answer.split()[0]
    return "".join(said) + f" answer {asked} {known[asked]}"


def is_solved(completion: str, problem: Problem) -> bool:
    return completion.endswith(f" answer {problem.answer}")


def what_matters(completion: str) -> Spans:
    """The spans of the sentences that the hour asked for follows from, and of the answer."""
    answer = re.search(r" answer (\S+)( .*)?$", completion)
    if answer is None:
        return []
    wanted, spans = answer[1], [answer.span()]
    for sentence in reversed(list(SENTENCE.finditer(completion[: answer.start()]))):
        if sentence["whose"] == wanted:
            wanted = sentence["before"]
            spans.append(sentence.span())
    return spans[::-1]


CLOCK = Task(
    name="clock",
    words=(*PEOPLE, *HOURS, *":.?", "hours", "after", "is", "Which", "answer"),
    first_word="Hours",
    draw=draw,
    demonstrate=demonstrate,
    is_solved=is_solved,
    answer=re.compile(r" answer \S+ (\d+)"),
    what_matters=what_matters,
    family="qwen3",
    taught=700,
    answer_tokens=4,
    max_new_tokens=8 * LATER + 9 * LATER + 5,
)

CLOCK_1100 = replace(CLOCK, name="clock_1100", taught=1100)
"""The same task, with a policy that was taught longer and copies hours more surely."""
