"""What a task is: problems, a pupil's demonstrations, and what matters in a completion."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

Spans = list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A prompt, and what a right completion says at the end."""

    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """A source of problems, with a pupil who solves some of them.

    Attributes:
        name: Of its files.
        words: All that a text is made of, besides the first word of a prompt.
        first_word: That one, the only one without a space before it.
        draw: From a source of chance to a problem.
        demonstrate: From a problem to what the pupil says, right or wrong.
        is_solved: Whether a completion solves a problem.
        answer: A pattern for the answer, in a completion.
        what_matters: Where in a completion the tokens are that its reward depends on.
        taught: Steps of imitation after which the policy is right less than half of the time.
        answer_tokens: How many tokens a demonstration has from the announcement of its answer on.
        max_new_tokens: Of a completion.
    """

    name: str
    words: tuple[str, ...]
    first_word: str
    draw: Callable[[random.Random], Problem]
    demonstrate: Callable[[Problem, random.Random], str]
    is_solved: Callable[[str, Problem], bool]
    answer: re.Pattern[str]
    what_matters: Callable[[str], Spans]
    taught: int
    answer_tokens: int
    max_new_tokens: int
