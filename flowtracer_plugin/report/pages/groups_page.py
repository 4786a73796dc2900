"""The page of two groups of a traced data set: what do right and wrong rollouts do differently?"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from flowtracer_plugin.comparison.groups import (
    ANSWER_MEASURES,
    MEASURES,
    PARTS,
    TENTHS,
    GroupComparison,
    ShownRollout,
)
from flowtracer_plugin.comparison.permutation import Sides
from flowtracer_plugin.comparison.texts import Word, least_texts
from flowtracer_plugin.comparison.traces import RIGHT_AND_WRONG
from flowtracer_plugin.report.display import (
    QUESTION,
    number,
    percent,
    points,
    ranges,
    shorten,
    signed,
)
from flowtracer_plugin.report.pages.assets import render, write_html
from flowtracer_plugin.report.pages.charts import Histogram, histogram, paired_bars
from flowtracer_plugin.report.pages.two_sides import MOST_WORDS, with_flow
from flowtracer_plugin.text.visible import visible

_ORIGINS = ("from_prompt", "from_early", "from_middle", "from_late")
_DRAWN = ("reasoning_share", "concentration", "stops", *_ORIGINS[::3], "response_tokens")
"""The measures with a histogram."""

SAID: Mapping[str, tuple[str, str]] = {
    "reasoning_share": (
        "reasoning share",
        "flow that passes through the response instead of jumping from the prompt to the answer",
    ),
    "concentration": (
        "concentration",
        "how unevenly flow is spread over the reasoning, from 0 (all tokens alike) to nearly 1",
    ),
    "from_prompt": ("from the prompt", "last hop into the answer’s line"),
    "from_early": ("from the early third", "last hop into the answer’s line"),
    "from_middle": ("from the middle third", "last hop into the answer’s line"),
    "from_late": ("from the late third", "last hop into the answer’s line"),
    "stops": ("stops in the reasoning", "tokens that a unit of flow passes on average"),
    "question_reached": ("question tokens reached", "those that influence the answer"),
    "prompt_tokens": ("tokens of the prompt", ""),
    "response_tokens": ("tokens of the response", ""),
    "in_question": ("stops in the question", "tokens that a unit of flow passes on average"),
    "in_prompt": ("stops elsewhere in the prompt", "tokens that a unit of flow passes on average"),
    "in_answer": ("stops in the answer", "tokens that a unit of flow passes on average"),
    **{
        name: (f"tenth {at} of the reasoning", "share of the reasoning’s flow")
        for at, name in enumerate(TENTHS, start=1)
    },
}
"""The title of each measure, and what it says."""

RARE = 0.05
"""Differences with a lower corrected p-value are in colour."""

_SHARES = {"reasoning_share", *_ORIGINS, *TENTHS}


def write_group_comparison(comparison: GroupComparison, path: str | Path) -> Path:
    """Write the page of `render_group_comparison` to `path`, whole or not at all.

    Raises:
        IsADirectoryError: `path` is a directory.
    """
    return write_html(path, render_group_comparison(comparison, Path(path).parent))


def render_group_comparison(comparison: GroupComparison, folder: Path | None = None) -> str:
    """The page of two groups of a data set as HTML; the same comparison gives the same page.

    Args:
        comparison: From `flowtracer_plugin.compare_results`.
        folder: The folder of the page, from which it links the pages of rollouts; without it, none
            is linked.
    """
    means = dict(zip(MEASURES, comparison.measures.columns(), strict=True))
    tenths = [
        np.array([means[name][side] for name in TENTHS], float) for side in ("first", "second")
    ]
    sizes, names = comparison.sizes, tuple(shorten(visible(name)) for name in comparison.names)
    return render(
        "groups_page.html.j2",
        styles=("two_sides.css", "comparison_page.css", "groups_page.css"),
        script=("tables.js",),
        title=" against ".join(names).capitalize()
        if comparison.names == RIGHT_AND_WRONG
        else " against ".join(names),
        comparison=comparison,
        names=names,
        sizes=sizes,
        left_out={reason: count for reason, count in comparison.left_out.items() if count},
        lines=measure_lines(comparison),
        largest=_largest(comparison),
        means=means,
        charts=_charts(comparison),
        origins=_ORIGINS,
        tenths=paired_bars(*tenths),
        words=ShownWords.of(comparison),
        examples=_examples(comparison, folder),
        measure=SAID[comparison.different.measure][0],
        rare=RARE,
        made=_made(comparison.settings),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A measure in the table.

    Attributes:
        name: Its name in the tables.
        title: Its title.
        says: What it says.
        first: Its mean in the first group, and how it is shown.
        second: The same for the second group.
        difference: First minus second, in the same form.
        effect: The difference in standard deviations.
        p: Its p-value, and the corrected one; None for two rollouts.
    """

    name: str
    title: str
    says: str
    first: tuple[float, str]
    second: tuple[float, str]
    difference: tuple[float, str]
    effect: float
    p: tuple[float, float] | None

    @property
    def style(self) -> str:
        """The CSS class of a difference with a low corrected p-value."""
        if not self.effect or self.p is None or self.p[1] >= RARE:
            return ""
        return "plus" if self.effect > 0 else "minus"


def measure_lines(comparison: GroupComparison) -> list[Line]:
    """The measures, as tables show them, without those that are 0 in all rollouts."""
    numbers = zip(MEASURES, comparison.measures.columns(), comparison.effects.tolist(), strict=True)
    return [
        Line(
            name=name,
            title=SAID[name][0],
            says=SAID[name][1],
            first=(one["first"], _shown(name, one["first"])),
            second=(one["second"], _shown(name, one["second"])),
            difference=_difference(name, one["first"] - one["second"]),
            effect=effect,
            p=None if one["p"] is None else (one["p"], one["p_corrected"]),
        )
        for name, one, effect in numbers
        if one["first"] or one["second"]
    ]


def _shown(name: str, value: float) -> str:
    return percent(value) if name in _SHARES else number(value)


def _difference(name: str, value: float) -> tuple[float, str]:
    return value, points(value) if name in _SHARES else signed(value)


def _largest(comparison: GroupComparison) -> Line:
    """The measure that differs most in standard deviations."""
    return max(measure_lines(comparison), key=lambda line: abs(line.effect))


def _charts(comparison: GroupComparison) -> list[tuple[str, str, Histogram]]:
    """The title, the unit and the histogram of some measures."""
    sides = [list(side) for side in (comparison.sides.first, comparison.sides.second)]

    def values(name: str) -> list[Float[np.ndarray, " rollout"]]:
        column = comparison.values[:, MEASURES.index(name)]
        return [column[side] for side in sides]

    return [
        (
            SAID[name][0],
            "%" if name in _SHARES else "",
            histogram(*values(name), unit=0.01 if name in _SHARES else 1.0),
        )
        for name in _DRAWN
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownWords:
    """The words, as the table that all comparisons share takes them.

    Attributes:
        names: The names of the groups.
        sides: The groups.
        sizes: The number of rollouts in each.
        words: The words that are listed.
        word_count: The number of words that are compared and have flow.
        least: The least number of rollouts in which each word occurs.
    """

    names: tuple[str, ...]
    sides: Sides
    sizes: tuple[int, int]
    words: tuple[Word, ...]
    word_count: int
    least: int

    @classmethod
    def of(cls, comparison: GroupComparison) -> ShownWords:
        """The words of a comparison."""
        return cls(
            names=comparison.names,
            sides=comparison.sides,
            sizes=comparison.sizes,
            words=with_flow(comparison.words)[:MOST_WORDS],
            word_count=len(with_flow(comparison.words)),
            least=least_texts(sum(comparison.sizes)),
        )


def _examples(comparison: GroupComparison, folder: Path | None) -> list[dict[str, Any]]:
    """The most different pairs, with the measure by which they differ."""
    name = comparison.different.measure
    column = comparison.values[:, MEASURES.index(name)]
    pairs = enumerate(zip(comparison.examples, comparison.different.pairs, strict=True))
    return [
        {
            "same_prompt": at < comparison.different.same_prompt,
            "sides": [
                {
                    **_texts(rollout),
                    "value": float(column[place]),
                    "shown": _shown(name, float(column[place])),
                    "link": _link(rollout, folder),
                }
                for rollout, place in zip(rollouts, places, strict=True)
            ],
        }
        for at, (rollouts, places) in pairs
    ]


def _texts(rollout: ShownRollout) -> dict[str, Any]:
    return {
        "row": rollout.row,
        "prompt": shorten(visible(" ".join((rollout.prompt or "").split())), 200),
        "answer": _short(rollout.answer),
        "right_answer": _short(rollout.right_answer),
    }


def _short(text: str | None) -> str:
    return shorten(visible((text or "").replace("\n", "⏎")), 40)


def _link(rollout: ShownRollout, folder: Path | None) -> str | None:
    if rollout.page is None or folder is None:
        return None
    return Path(os.path.relpath(rollout.page, folder)).as_posix()


def _made(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The settings that the rollouts were traced with."""
    flow = settings["flow"]
    return [
        ("model", str(settings["model"])),
        ("layers", ranges(sorted(flow["layers"]))),
        ("rows", flow["rows"]),
        ("edges", f"{flow['edges']}, times {flow['damping']:g}"),
        ("question", f"{QUESTION[flow['question']]}; weights: {flow['question_weights']}"),
        ("answer", str(flow["answer"])),
        ("flow ends at", f"{flow['target']}, {flow['boundary']} boundary"),
        ("first token", flow["first_token"]),
    ]


assert set(SAID) == {*ANSWER_MEASURES, *PARTS, *TENTHS}
