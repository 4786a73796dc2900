"""One self-contained page for one prompt's completions side by side: where their credit lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from flowtracer_plugin.comparison.permutation import first_identical, sides_by_truth
from flowtracer_plugin.comparison.texts import compare_beginnings, compare_words
from flowtracer_plugin.files import write_atomically
from flowtracer_plugin.report.display import shorten, signed
from flowtracer_plugin.report.pages.assets import render
from flowtracer_plugin.report.pages.completion import (
    LEVELS,
    CompletionView,
    CreditPiece,
    CreditRibbon,
    Excerpt,
    cut_pieces,
    draw_credit,
    ends_of,
    level_class,
)
from flowtracer_plugin.report.pages.group_index import GroupSummary, write_index
from flowtracer_plugin.report.pages.payload import embed
from flowtracer_plugin.report.pages.two_sides import Differences, Person, show_differences
from flowtracer_plugin.text.visible import visible

__all__ = ["CompletionView", "group_page", "write_group_page", "write_index"]

_SIDES = ("right", "wrong")

_MAX_PROMPT = 20_000


def write_group_page(
    path: str | Path,
    prompt: str,
    completions: Sequence[CompletionView],
    *,
    title: str,
    step: int,
    max_tokens: int = 4_000,
) -> Path:
    """Write `group_page` to `path`, whole or not at all, and return `path`.

    Raises:
        ValueError: As `group_page` does.
        IsADirectoryError: `path` is a directory.
    """
    page = group_page(prompt, completions, title=title, step=step, max_tokens=max_tokens)
    write_atomically(Path(path), page.encode())
    return Path(path)


def group_page(
    prompt: str,
    completions: Sequence[CompletionView],
    *,
    title: str,
    step: int,
    max_tokens: int = 4_000,
) -> str:
    """The page of a prompt's completions, the highest reward first, as HTML.

    Background is advantage times weight, in steps relative to the page's largest. Of a completion
    with more than `max_tokens` the middle is left out of the text, not of its ribbon.

    Raises:
        ValueError: There are no completions, or `max_tokens` is less than 1.
    """
    if not completions:
        raise ValueError("wanted at least one completion, found none")
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens!r}")
    largest = max(float(np.abs(one.credit).max(initial=0.0)) for one in completions)
    longest = max(len(one.tokens) for one in completions)
    columns = [
        _column(sample, view, largest, longest, max_tokens)
        for sample, view in sorted(enumerate(completions, start=1), key=_best_first)
    ]
    summary = _summary(prompt, completions, title, step)
    return render(
        "group.html.j2",
        styles=("contrast.css", "group.css"),
        script=("tips.js", "contrast.js", "page_table.js", "group.js"),
        title=shorten(visible(title), 200),
        prompt=_prompt(prompt),
        summary=summary,
        summary_data=embed(asdict(summary)),
        columns=columns,
        scale=_scale(largest),
        facts=_facts(completions),
        shown=_differences([column.view for column in columns], max_tokens),
        data=embed([_column_data(column) for column in columns]),
    )


def _best_first(numbered: tuple[int, CompletionView]) -> tuple[float, float, int]:
    sample, view = numbered
    return -(-math.inf if view.reward is None else view.reward), -view.advantage, sample


@dataclass(frozen=True, kw_only=True, eq=False)
class Column(Excerpt):
    """A completion as the page shows it.

    Attributes:
        sample: Its number in the order in which the completions came, from 1.
        view: The completion.
        ribbon: All of it as bars.
    """

    parts: tuple[tuple[CreditPiece, ...], ...]
    sample: int
    view: CompletionView
    ribbon: CreditRibbon


def _column(
    sample: int, view: CompletionView, largest: float, longest: int, max_tokens: int
) -> Column:
    return Column(
        sample=sample,
        view=view,
        stop=len(view.tokens),
        parts=ends_of(cut_pieces(view, largest), max_tokens),
        ribbon=draw_credit(view, largest, longest),
    )


def _differences(columns: Sequence[CompletionView], most: int) -> Differences | None:
    """Completions with a positive advantage against those with a negative one; None without."""
    # Where no flow was traced there is none to compare.
    places = [at for at, view in enumerate(columns) if view.advantage and view.throughput.any()]
    views = [columns[at] for at in places]
    truths = [bool(view.advantage > 0) for view in views]
    texts, flows = [tuple(view.tokens) for view in views], [view.throughput for view in views]
    sides = sides_by_truth(
        _SIDES, truths, first_identical(list(zip(texts, truths, strict=True)), flows)
    )
    if sides is None:
        return None
    beginning = compare_beginnings(texts, texts, flows, sides)
    return show_differences(
        texts[0],
        {"Completion": (0, beginning.length)},
        ["answer" if answer else "" for answer in views[0].answer],
        beginning,
        compare_words(texts, flows, [~view.answer for view in views], sides),
        sides,
        names=_SIDES,
        people=[
            Person(label=f"{at + 1}", link=f"completion-{at + 1}", right=truth)
            for at, truth in zip(places, truths, strict=True)
        ],
        most=most,
    )


def _column_data(column: Column) -> dict[str, Any]:
    """What the page's script knows of a column's pieces, in the order of the text."""
    pieces, tokens = [piece for part in column.parts for piece in part], column.view.tokens
    plain = all(piece.first == piece.last == place for place, piece in enumerate(pieces))
    return {
        "advantage": float(column.view.advantage),
        "first": None if plain else [piece.first for piece in pieces],
        "last": None if plain else [piece.last for piece in pieces],
        "texts": ["".join(tokens[piece.first : piece.last + 1]) for piece in pieces],
        "weights": [_rounded(piece.weight) for piece in pieces],
        "throughput": [_rounded(piece.throughput) for piece in pieces],
    }


def _rounded(value: float) -> float | int:
    short = float(f"{value:.3g}")
    return int(short) if short.is_integer() else short


def _summary(
    prompt: str, completions: Sequence[CompletionView], title: str, step: int
) -> GroupSummary:
    rewards = [view.reward for view in completions if view.reward is not None]
    advantages = [abs(float(view.advantage)) for view in completions]
    return GroupSummary(
        step=int(step),
        title=shorten(title, 200),
        prompt=_end_of(" ".join(prompt.split())),
        completions=len(completions),
        answers=sum(bool(view.answer.any()) for view in completions),
        best=max(rewards, default=None),
        mean=math.fsum(rewards) / len(rewards) if rewards else None,
        worst=min(rewards, default=None),
        spread=math.fsum(advantages) / len(advantages),
    )


def _facts(completions: Sequence[CompletionView]) -> dict[str, Any]:
    lengths = [len(view.tokens) for view in completions]
    return {
        "advantages": (
            min(float(view.advantage) for view in completions),
            max(float(view.advantage) for view in completions),
        ),
        "lengths": (min(lengths), max(lengths)),
        "total": sum(lengths),
        "weighted": sum(int(view.weighted.sum()) for view in completions),
        "tools": any(not view.competing.all() for view in completions),
    }


def _scale(largest: float) -> list[tuple[str, str]]:
    """Style and numbers of each step of colour, from the lowest to the highest."""
    if not largest:
        return []
    bounds = [signed(largest * level / LEVELS) for level in range(-LEVELS, LEVELS + 1)]
    steps = [f"{low} to {high}" for low, high in pairwise(bounds)]
    steps.insert(LEVELS, "0")
    levels = range(-LEVELS, LEVELS + 1)
    return [(level_class(level), text) for level, text in zip(levels, steps, strict=True)]


def _prompt(text: str) -> dict[str, Any]:
    half = _MAX_PROMPT // 2
    parts = [text] if len(text) <= _MAX_PROMPT else [text[:half], text[-half:]]
    return {
        "parts": [visible(part) for part in parts],
        "shown": sum(map(len, parts)),
        "length": len(text),
        "open": len(text) <= 1_500,
    }


def _end_of(prompt: str, limit: int = 64) -> str:
    """Prompts of a run begin alike, and end with what is asked."""
    return prompt if len(prompt) <= limit else f"…{prompt[1 - limit :]}"
