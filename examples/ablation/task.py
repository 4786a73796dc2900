"""What a task consists of: problems, a pupil's demonstrations, and what matters in a completion."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Spans = list[tuple[int, int]]
Family = Literal["llama", "qwen3"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A prompt, and the text with which a right completion ends."""

    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """A source of problems, with a pupil who solves some of them.

    Attributes:
        name: The name, also in file names.
        words: All words of the texts, except the first word of a prompt.
        first_word: The first word of a prompt, the only one without a space before it.
        draw: Function from a random generator to a problem.
        demonstrate: Function from a problem to the pupil's solution, right or wrong.
        is_solved: Function that says whether a completion solves a problem.
        answer: Pattern for the answer in a completion.
        what_matters: Function from a completion to the spans that its reward depends on.
        taught: Steps of imitation after which the policy is right less than half of the time.
        answer_tokens: Tokens of a demonstration from the word `answer` to the end token.
        max_new_tokens: Longest completion, in tokens.
        family: Architecture of the policy, see `pupil.FAMILIES`.
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
    family: Family = "llama"
