"""The list of rollouts, with links to the pages of those that have one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowtracer_plugin.report.display import model_label, shorten
from flowtracer_plugin.report.pages.assets import render, write_html
from flowtracer_plugin.text.visible import visible

LISTED = 5_000
"""The most rollouts in a list: a browser sorts so many at once."""

_PROMPT, _SHORT = 200, 60

_HEADS = (
    *("row", "id", "prompt", "answer", "verdict", "tokens", "reasoning share", "concentration"),
    "error",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutLine:
    """A rollout, as the list shows it.

    Attributes:
        row: Its number in the data.
        id: Its name in the data, or its number.
        prompt: The prompt, or what counts as the question in it.
        answer: The answer that was found.
        correct: Whether it is right, if that is known.
        response_tokens: The length of the response.
        reasoning_share: The share of the flow that passes through the response.
        concentration: How unevenly the flow is spread over the reasoning.
        error: Why it was not traced, or lacks scores.
        page: Its page, relative to the list.
    """

    row: int
    id: str
    prompt: str | None = None
    answer: str | None = None
    correct: bool | None = None
    response_tokens: int | None = None
    reasoning_share: float | None = None
    concentration: float | None = None
    error: str | None = None
    page: str | None = None


def write_rollout_index(
    path: Path,
    lines: Iterable[RolloutLine],
    *,
    title: str,
    settings: dict[str, Any],
    brand: str = "data set",
) -> Path:
    """Write the list of rollouts to `path`, whole or not at all, and return `path`.

    Totals count all lines. The list shows those with a page, and the first others, up to 5,000;
    no more are kept in memory.

    Args:
        path: The file to write.
        lines: All rollouts, in the order of the data.
        title: The title of the page.
        settings: The `model`, and the number of `rows` of the data, if the rollouts are of one.
        brand: What the list is of.
    """
    counts: Counter[str] = Counter()
    paged, others = list[RolloutLine](), list[RolloutLine]()
    for line in lines:
        counts.update(_kinds(line))
        kept = others if line.page is None else paged
        if len(kept) < LISTED:
            kept.append(line)
    shown = [*paged, *others][:LISTED]
    known = counts["right"] + counts["wrong"]
    empty = {"verdict": not known, "error": not counts["error"]}
    html = render(
        "rollout_index.html.j2",
        styles=("rollout_index.css",),
        script=("tables.js", "rollout_index.js"),
        title=shorten(visible(title), 200),
        heads=[head for head in _HEADS if not empty.get(head)],
        lines=[_shown(line) for line in sorted(shown, key=lambda line: line.row)],
        count=counts["rollout"],
        rows=settings.get("rows"),
        brand=brand,
        model=shorten(visible(model_label(str(settings["model"])))),
        errors=counts["error"],
        right=counts["right"],
        known=known,
        pages=counts["page"],
    )
    return write_html(path, html)


def _kinds(line: RolloutLine) -> list[str]:
    """What a rollout is, by the names of the list's choices."""
    found = ["rollout", _verdict(line), "error" if line.error else "", "page" if line.page else ""]
    return [name for name in found if name]


def _verdict(line: RolloutLine) -> str:
    return {True: "right", False: "wrong", None: ""}[line.correct]


def _shown(line: RolloutLine) -> dict[str, Any]:
    return {
        "row": line.row,
        "id": _short(line.id),
        "prompt": shorten(visible(" ".join((line.prompt or "").split())), _PROMPT),
        "answer": _short(line.answer),
        "is": " ".join(_kinds(line)),
        "verdict": _verdict(line),
        "numbers": [line.response_tokens, line.reasoning_share, line.concentration],
        "error": shorten(visible(line.error or ""), _PROMPT),
        "page": line.page,
    }


def _short(text: str | None) -> str:
    return shorten(visible((text or "").replace("\n", "⏎")), _SHORT)
