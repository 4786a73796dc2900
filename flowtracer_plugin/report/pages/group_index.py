"""The list of a run's group pages, made from the summary that each page holds."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from flowtracer_plugin.files import parsed, typed
from flowtracer_plugin.report.display import shorten
from flowtracer_plugin.report.pages.assets import render, write_html
from flowtracer_plugin.report.pages.charts import round_bounds
from flowtracer_plugin.text.visible import visible

logger = logging.getLogger(__name__)

_SUMMARY = re.compile(rb'<script type="application/json" id="summary">(.*?)</script>')
_HEAD = 65_536
"""The bytes of a page that are searched for its summary, which comes before the styles."""

_LARGEST = 1e100
"""Numbers of a page stay below it, so that their sums and differences are finite."""

MOST_ASKED = 4_000
"""The most characters of a question that are kept; in a page's JSON each takes up to 12 bytes."""

LONG_QUESTION = 400
"""A question with more characters is folded in the list."""

TREND_WIDTH, TREND_HEIGHT = 1000, 100


@dataclass(frozen=True, kw_only=True)
class GroupSummary:
    """A page in numbers, as the list shows it.

    Attributes:
        step: The step of the training.
        title: The title of the page.
        prompt: The question, on one line.
        completions: The number of completions.
        answers: The number of completions with an answer.
        best: The highest reward; None if no completion has a reward.
        mean: The mean reward.
        worst: The lowest reward.
        spread: The mean of the absolute advantages; at 0, training learns nothing from the group.
    """

    step: int
    title: str
    prompt: str
    completions: int
    answers: int
    best: float | None
    mean: float | None
    worst: float | None
    spread: float


def write_index(folder: str | Path, *, title: str = "Groups of this run") -> Path:
    """Write `index.html`, the list of the group pages in `folder`, and return its path.

    The newest step comes first. Files that `write_group_page` did not write are left out, and so
    are damaged ones, which the log names. The list is written whole or not at all.

    Raises:
        IsADirectoryError: `index.html` is a directory.
    """
    path = Path(folder) / "index.html"
    files = sorted(file for file in path.parent.glob("*.html") if file.is_file())
    # A name is bytes, which need not be text, and so is a link to it.
    pages = [(quote(os.fsencode(file.name)), found) for file in files if (found := _read(file))]
    pages.sort(key=lambda page: (-page[1].step, page[0]))
    summaries = [summary for _, summary in pages]
    html = render(
        "group_index.html.j2",
        styles=("group_index.css",),
        title=shorten(visible(title), 200),
        pages=pages,
        long_question=LONG_QUESTION,
        trend=_trend(summaries),
        trend_width=TREND_WIDTH,
        trend_height=TREND_HEIGHT,
        spread=math.fsum(one.spread for one in summaries) / max(len(summaries), 1),
        silent=sum(one.spread == 0 for one in summaries),
    )
    return write_html(path, html)


def _read(path: Path) -> GroupSummary | None:
    try:
        with path.open("rb") as file:
            found = _SUMMARY.search(file.read(_HEAD))
        if found is None:
            return None
        summary: GroupSummary = typed(GroupSummary, parsed(found[1]), "its summary")
        numbers = (summary.best, summary.mean, summary.worst, summary.spread)
        if any(abs(number or 0) > _LARGEST for number in numbers):
            raise ValueError(f"its rewards must be numbers of at most {_LARGEST:g}")
    except (OSError, ValueError) as error:
        logger.warning("the list of pages leaves out %r: %s", str(path), error)
        return None
    return summary


@dataclass(frozen=True, kw_only=True)
class Trend:
    """Rewards along the training, as SVG paths.

    Attributes:
        steps: The first and the last step.
        low: The lowest reward.
        high: The highest reward.
        lines: Round numbers on the axis of rewards, from its bottom to its top.
        band: The area between the worst and the best reward of each step.
        line: The mean reward of each step.
    """

    steps: tuple[int, int]
    low: float
    high: float
    lines: tuple[float, ...]
    band: str = ""
    line: str = ""

    def x(self, step: int) -> float:
        """The position of a step, from 0 to `TREND_WIDTH`."""
        return round(TREND_WIDTH * (step - self.steps[0]) / (self.steps[1] - self.steps[0] or 1), 1)

    def y(self, reward: float) -> float:
        """The position of a reward, from 0 at the top of the axis to `TREND_HEIGHT`."""
        bottom, *_, top = self.lines
        return round(TREND_HEIGHT * (top - reward) / (top - bottom), 1)


def _trend(summaries: Sequence[GroupSummary]) -> Trend | None:
    """The rewards of all pages; None if no page has rewards."""
    steps: dict[int, list[tuple[float, float, float]]] = {}
    for one in summaries:
        if one.worst is not None and one.mean is not None and one.best is not None:
            steps.setdefault(one.step, []).append((one.worst, one.mean, one.best))
    if not steps:
        return None
    points = []
    for step in sorted(steps):
        worst, mean, best = zip(*steps[step], strict=True)
        points.append((step, min(worst), math.fsum(mean) / len(mean), max(best)))
    low, high = min(worst for _, worst, _, _ in points), max(best for _, _, _, best in points)
    trend = Trend(
        steps=(points[0][0], points[-1][0]), low=low, high=high, lines=round_bounds(low, high)
    )
    tops = [f"{trend.x(step)} {trend.y(best)}" for step, _, _, best in points]
    bottoms = [f"{trend.x(step)} {trend.y(worst)}" for step, worst, _, _ in points]
    means = [f"{trend.x(step)} {trend.y(mean)}" for step, _, mean, _ in points]
    return replace(
        trend, band=f"M{'L'.join([*tops, *reversed(bottoms)])}z", line=f"M{'L'.join(means)}"
    )
