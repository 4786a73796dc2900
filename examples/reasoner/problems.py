"""Short stories about what somebody owns, with right solutions and those of a sloppy pupil."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

NAMES = ("Ann", "Bob", "Cal", "Dan", "Eva", "Fay")
THINGS = ("apples", "books", "cards", "coins", "pens", "shells")
SIGNS: Mapping[str, int] = {
    **dict.fromkeys(("buys", "finds", "gets"), 1),
    **dict.fromkeys(("lends", "loses", "sells"), -1),
    **dict.fromkeys(("draws", "sees", "wants"), 0),
}
ACTIVE_VERBS = tuple(verb for verb, sign in SIGNS.items() if sign)
IDLE_VERBS = tuple(verb for verb, sign in SIGNS.items() if not sign)
LARGEST_VALUE = 20
LARGEST_AMOUNT = 9

MISREAD_VERB = "lends"
HELD_OUT_SHARE = 10

Split = Literal["train", "held_out"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """A sentence of a story, `Ann sells 2.`, or an idle one without effect, `Ann sees 2.`"""

    verb: str
    amount: int

    @property
    def change(self) -> int:
        return SIGNS[self.verb] * self.amount


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A story with a question about it; idle events distract."""

    name: str
    thing: str
    start: int
    events: tuple[Event, ...]

    @property
    def prompt(self) -> str:
        opening = f"{self.name} has {self.start} {self.thing}."
        story = [f"{self.name} {event.verb} {event.amount}." for event in self.events]
        return " ".join([opening, *story, f"How many {self.thing}?"]) + "\n"

    @property
    def changes(self) -> tuple[int, ...]:
        return tuple(event.change for event in self.events if event.change)

    @property
    def answer(self) -> int:
        return self.start + sum(self.changes)

    @property
    def response(self) -> str:
        value, steps = self.start, []
        for change in self.changes:
            steps.append((value, change, value + change))
            value += change
        return _render(steps)


@dataclass(frozen=True, kw_only=True)
class Sloppiness:
    """Probabilities of the pupil's mistakes, each time one can happen."""

    misread: float = 0.6
    distracted: float = 0.12
    slip: float = 0.04


def make_problem(rng: random.Random) -> Problem:
    """A story of three to five events that matter and one or two that do not."""
    matters = [True] * rng.randint(3, 5) + [False] * rng.randint(1, 2)
    rng.shuffle(matters)
    start = rng.randint(2, 12)
    return Problem(
        name=rng.choice(NAMES),
        thing=rng.choice(THINGS),
        start=start,
        events=tuple(_live(start, matters, rng)),
    )


def make_problems(count: int, seed: int, split: Split = "train") -> list[Problem]:
    """`count` stories of one split; a prompt belongs to the same split for every seed."""
    stream = stream_problems(random.Random(seed), split)
    return [next(stream) for _ in range(count)]


def stream_problems(rng: random.Random, split: Split) -> Iterator[Problem]:
    while True:
        problem = make_problem(rng)
        if split_of(problem.prompt) == split:
            yield problem


def split_of(prompt: str) -> Split:
    """The split of a prompt, by its checksum, so that splits cannot overlap."""
    return "train" if zlib.crc32(prompt.encode()) % HELD_OUT_SHARE else "held_out"


def sloppy_response(problem: Problem, rng: random.Random, sloppiness: Sloppiness) -> str:
    """The solution of a pupil who takes lending for getting, counts idle events, and miscounts."""
    value, steps = problem.start, []
    for event in problem.events:
        change = _sloppy_change(event, rng, sloppiness)
        if change:
            result = _sloppy_sum(value + change, rng, sloppiness)
            steps.append((value, change, result))
            value = result
    return _render(steps)


def find_answer(text: str) -> int | None:
    """The number in the last `\\boxed{}` of a text, or None."""
    found = re.findall(r"\\boxed\{(\d+)\}", text)
    return int(found[-1]) if found else None


def is_correct(completion: str, answer: int) -> bool:
    return find_answer(completion) == answer


def _live(value: int, matters: list[bool], rng: random.Random) -> Iterator[Event]:
    for matter in matters:
        verbs = ACTIVE_VERBS if matter else IDLE_VERBS
        verb = rng.choice([verb for verb in verbs if _most(verb, value) > 0])
        event = Event(verb=verb, amount=rng.randint(1, _most(verb, value)))
        value += event.change
        yield event


def _most(verb: str, value: int) -> int:
    room = {1: LARGEST_VALUE - value, -1: value, 0: LARGEST_AMOUNT}[SIGNS[verb]]
    return min(LARGEST_AMOUNT, room)


def _sloppy_change(event: Event, rng: random.Random, sloppiness: Sloppiness) -> int:
    if event.verb == MISREAD_VERB and rng.random() < sloppiness.misread:
        return event.amount
    if not event.change and rng.random() < sloppiness.distracted:
        return event.amount
    return event.change


def _sloppy_sum(result: int, rng: random.Random, sloppiness: Sloppiness) -> int:
    miscount = rng.choice((-1, 1)) if rng.random() < sloppiness.slip else 0
    return max(0, min(LARGEST_VALUE, result + miscount))


def _render(steps: list[tuple[int, int, int]]) -> str:
    lines = [
        f"{value} {'+' if change > 0 else '-'} {abs(change)} = {result}\n"
        for value, change, result in steps
    ]
    return "".join(lines) + rf"The answer is \boxed{{{steps[-1][2]}}}"
