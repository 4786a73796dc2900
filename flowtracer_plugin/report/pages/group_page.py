"""The page of one prompt's completions side by side: where does their credit lie?"""

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
from flowtracer_plugin.report.display import shorten, signed
from flowtracer_plugin.report.pages.assets import embed, render, write_html
from flowtracer_plugin.report.pages.completion import (
    LEVELS,
    CompletionView,
    CreditPiece,
    CreditRibbon,
    Excerpt,
    GroupCredit,
    cut_pieces,
    draw_credit,
    ends_of,
    level_class,
)
from flowtracer_plugin.report.pages.group_index import MOST_ASKED, GroupSummary, write_index
from flowtracer_plugin.report.pages.two_sides import Differences, Reference, show_differences
from flowtracer_plugin.text.visible import visible

__all__ = ["CompletionView", "GroupCredit", "group_page", "write_group_page", "write_index"]

_SIDES = ("above", "below")
"""The completions with an advantage above 0 and below 0: rewards may be graded."""

_MARKS = ("▲", "▼")

_MAX_PROMPT = 20_000


def write_group_page(
    path: str | Path,
    prompt: str,
    completions: Sequence[CompletionView],
    *,
    title: str,
    step: int,
    max_tokens: int = 4_000,
    question: str | None = None,
    credit: GroupCredit | None = None,
) -> Path:
    """Write the page of `group_page` to `path`, whole or not at all, and return `path`.

    Raises:
        ValueError: As `group_page`.
        IsADirectoryError: `path` is a directory.
    """
    page = group_page(
        prompt,
        completions,
        title=title,
        step=step,
        max_tokens=max_tokens,
        question=question,
        credit=credit,
    )
    return write_html(path, page)


def group_page(
    prompt: str,
    completions: Sequence[CompletionView],
    *,
    title: str,
    step: int,
    max_tokens: int = 4_000,
    question: str | None = None,
    credit: GroupCredit | None = None,
) -> str:
    """The page of a prompt's completions as HTML, the highest reward first.

    The background of a token is its advantage times its weight, in shades relative to the largest
    on the page. The text of a completion with more than `max_tokens` lacks its middle; its ribbon
    is whole. The list of a run's groups shows the `question`, by default the whole prompt, and the
    head of the page how the `credit` was given.

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
        _column(view, largest, longest, max_tokens) for view in sorted(completions, key=_best_first)
    ]
    summary = _summary(prompt if question is None else question, completions, title, step)
    return render(
        "group_page.html.j2",
        styles=("two_sides.css", "group_page.css"),
        script=("tips.js", "two_sides.js", "tables.js", "group_page.js"),
        title=shorten(visible(title), 200),
        prompt=_prompt(prompt),
        question=_question(question, prompt),
        summary=summary,
        summary_data=embed(asdict(summary)),
        columns=columns,
        scale=_scale(largest),
        facts=_facts(completions),
        credit=credit,
        scorer=None if credit is None else visible(credit.scorer),
        shown=_differences([column.view for column in columns], max_tokens),
        data=embed([_column_data(column) for column in columns]),
    )


def _best_first(view: CompletionView) -> tuple[float, float]:
    return -(-math.inf if view.reward is None else view.reward), -view.advantage


@dataclass(frozen=True, kw_only=True, eq=False)
class Column(Excerpt[CreditPiece]):
    """A completion on the page.

    Attributes:
        view: The completion.
        ribbon: The whole completion as bars.
    """

    view: CompletionView
    ribbon: CreditRibbon


def _column(view: CompletionView, largest: float, longest: int, max_tokens: int) -> Column:
    return Column(
        view=view,
        stop=len(view.tokens),
        parts=ends_of(cut_pieces(view, largest), max_tokens),
        ribbon=draw_credit(view, largest, longest),
    )


def _differences(columns: Sequence[CompletionView], most: int) -> Differences | None:
    """Completions with positive advantage against those with negative; None if a side is empty."""
    # Completions without traced flow cannot be compared.
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
        marks=_MARKS,
        references=[
            Reference(label=f"{at + 1}", link=f"completion-{at + 1}", right=truth)
            for at, truth in zip(places, truths, strict=True)
        ],
        most=most,
    )


def _column_data(column: Column) -> dict[str, Any]:
    """The data about a column's pieces for the page's script, in the order of the text."""
    pieces = column.pieces
    plain = all(piece.first == piece.last == place for place, piece in enumerate(pieces))
    return {
        "advantage": float(column.view.advantage),
        "first": None if plain else [piece.first for piece in pieces],
        "last": None if plain else [piece.last for piece in pieces],
        "texts": column.texts(column.view.tokens),
        "weights": [_rounded(piece.weight) for piece in pieces],
        "throughput": [_rounded(piece.throughput) for piece in pieces],
    }


def _rounded(value: float) -> float | int:
    short = float(f"{value:.3g}")
    return int(short) if short.is_integer() else short


def _summary(
    question: str, completions: Sequence[CompletionView], title: str, step: int
) -> GroupSummary:
    rewards = [view.reward for view in completions if view.reward is not None]
    advantages = [abs(float(view.advantage)) for view in completions]
    return GroupSummary(
        step=int(step),
        title=shorten(title, 200),
        prompt=shorten(" ".join(question.split()), MOST_ASKED),
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
        "flow": any(view.throughput.any() for view in completions),
        "tools": any(not view.competing.all() for view in completions),
    }


def _scale(largest: float) -> list[tuple[str, str]]:
    """The CSS class and the range of each shade, from the lowest to the highest."""
    if not largest:
        return []
    bounds = [signed(largest * level / LEVELS) for level in range(-LEVELS, LEVELS + 1)]
    steps = [f"{low} to {high}" for low, high in pairwise(bounds)]
    steps.insert(LEVELS, "0")
    levels = range(-LEVELS, LEVELS + 1)
    return [(level_class(level), text) for level, text in zip(levels, steps, strict=True)]


def _question(question: str | None, prompt: str) -> str | None:
    """The question, if it is another text than the prompt."""
    if question is None or question.strip() == prompt.strip():
        return None
    return visible(shorten(question.strip(), MOST_ASKED))


def _prompt(text: str) -> dict[str, Any]:
    half = _MAX_PROMPT // 2
    parts = [text] if len(text) <= _MAX_PROMPT else [text[:half], text[-half:]]
    return {
        "parts": [visible(part) for part in parts],
        "shown": sum(map(len, parts)),
        "length": len(text),
        "open": len(text) <= 1_500,
    }
