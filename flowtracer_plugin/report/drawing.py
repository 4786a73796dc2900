"""Where the lines of the drawings go: the ribbon, the steps and the river."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Int

from flowtracer_plugin.flow.backbone import Step, StepGraph, strongest_flows
from flowtracer_plugin.flow.river import River
from flowtracer_plugin.report.display import Reading, Unit
from flowtracer_plugin.text.visible import visible

MAX_BARS = 1200
_FEW_STEPS = 60
"""Steps that are listed where nothing flows between any."""

RIBBON_HEIGHT = 100
RIVER_WIDTH, RIVER_HEIGHT = 1000, 100


@dataclass(frozen=True, kw_only=True)
class Ribbon:
    """The whole text as bars, the highest throughput of each bin.

    Heights are square roots; the highest bar before the answer is as high as the answer's, which
    would dwarf the others.

    Attributes:
        width: Number of bars.
        bars: An SVG path for each region.
        marks: Position of each hub, from 0 to `width`.
        prompt_end: Where the response begins.
    """

    width: int
    bars: dict[str, str]
    marks: tuple[float, ...]
    prompt_end: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Bars:
    """The whole text in at most `MAX_BARS` bins.

    Attributes:
        first: First unit of each bin.
        peak: Highest throughput in each bin.
        prompt: Whether a bin begins in the prompt, and holds none of the answer.
        answer: Whether the answer, or a part of it, is in a bin.
    """

    first: Int[np.ndarray, " bar"]
    peak: Float[np.ndarray, " bar"]
    prompt: Bool[np.ndarray, " bar"]
    answer: Bool[np.ndarray, " bar"]

    @property
    def highest(self) -> float:
        """The highest peak outside the answer, which would dwarf all others; 1 if there is none."""
        return float(self.peak[~self.answer].max(initial=0.0)) or 1.0


def bars(reading: Reading) -> Bars:
    """One bar per unit, or fewer where there are more than `MAX_BARS`."""
    count = len(reading.units)
    first = np.arange(min(count, MAX_BARS)) * count // min(count, MAX_BARS)
    answer = np.logical_or.reduceat([unit.region == "answer" for unit in reading.units], first)
    return Bars(
        first=first,
        peak=np.maximum.reduceat(reading.throughput, first),
        prompt=(first < reading.prompt_units) & ~answer,
        answer=answer,
    )


def draw_ribbon(reading: Reading, hubs: tuple[Unit, ...]) -> Ribbon:
    """The bars of a text, and where its hubs are."""
    shown = bars(reading)
    width, count = len(shown.first), len(reading.units)
    relative = np.sqrt(np.minimum(shown.peak / shown.highest, 1))
    heights = np.rint(RIBBON_HEIGHT * relative).astype(int)
    return Ribbon(
        width=width,
        bars={
            "prompt": bars_path(heights, shown.prompt),
            "response": bars_path(heights, ~shown.prompt & ~shown.answer),
            "answer": bars_path(heights, shown.answer),
        },
        marks=tuple(round((hub.index + 0.5) * width / count, 2) for hub in hubs),
        prompt_end=round(reading.prompt_units * width / count, 2),
    )


def bars_path(heights: Int[np.ndarray, " bar"], shown: Bool[np.ndarray, " bar"]) -> str:
    """The bars of `shown` that have a height, as one SVG path."""
    bars = np.flatnonzero(shown & (heights > 0)).tolist()
    return "".join(f"M{bar} {RIBBON_HEIGHT}v-{heights[bar]}h1V{RIBBON_HEIGHT}z" for bar in bars)


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """A line of the list of steps.

    Attributes:
        number: Of the step in the text, from 1.
        step: The step.
        text: Its text, made visible, on one line.
        region: prompt, question, response, or answer.
        first: Its first unit.
        last: Its last unit.
    """

    number: int
    step: Step
    text: str
    region: str
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class StepDrawing:
    """The backbone: the strongest flows between steps, and the steps at their ends.

    Attributes:
        rows: The steps, in reading order.
        flows: Row of the earlier step, row of the later one, and flow; the strongest first.
        step_count: How many steps there are.
        flow_count: How many flows there are.
        total: All flow between steps.
    """

    rows: tuple[StepRow, ...]
    flows: tuple[tuple[int, int, float], ...]
    step_count: int
    flow_count: int
    total: float


def draw_steps(reading: Reading, graph: StepGraph) -> StepDrawing:
    """As many of the strongest flows as can be read, and the steps at their ends."""
    strong = strongest_flows(graph, share=1.0)
    shown = strong.steps or tuple(range(len(graph.steps)))[:_FEW_STEPS]
    row = {step: place for place, step in enumerate(shown)}
    return StepDrawing(
        rows=tuple(step_row(reading, graph.steps[index], index + 1) for index in shown),
        flows=tuple((row[earlier], row[later], flow) for earlier, later, flow in strong.flows),
        step_count=len(graph.steps),
        flow_count=int((graph.edges > 0).sum()),
        total=float(graph.edges.sum()),
    )


def step_row(reading: Reading, step: Step, number: int) -> StepRow:
    """A step as it is listed."""
    answers = "answer" in reading.trace.spans.regions[step.start : step.stop]
    return StepRow(
        number=number,
        step=step,
        text=visible(" ".join(step.text.split())) or "⏎",
        region="answer" if answers else step.region,
        first=reading.unit_of(step.start).index,
        last=reading.unit_of(step.stop - 1).index,
    )


@dataclass(frozen=True, kw_only=True)
class RiverDrawing:
    """The river as areas in a drawing `RIVER_WIDTH` wide and `RIVER_HEIGHT` high.

    Attributes:
        bands: Name, tokens and area of each part that flow comes from.
        waiting: Area of what has not started.
        arrived: Area of what has arrived.
        passing: Area of what passes over the text beneath it, drawn from the middle.
        flags: Position of each checkpoint.
        deviation: By how much the sum at a cut differs from 1 at most.
    """

    bands: tuple[tuple[str, str, str], ...]
    waiting: str
    arrived: str
    passing: str
    flags: tuple[float, ...]
    deviation: float


def draw_river(river: River, checkpoints: Sequence[Unit]) -> RiverDrawing:
    """What waits lies on top, then what comes from each part in reading order, then the arrived."""
    layers = river_layers(river)
    length = int(river.cuts[-1])
    places = RIVER_WIDTH * river.cuts / length
    edges = np.concatenate([np.zeros((len(layers), 1)), np.cumsum(layers, axis=1)], axis=1)
    areas = [
        _area(places, RIVER_HEIGHT * top, RIVER_HEIGHT * bottom)
        for top, bottom in pairwise(edges.T)
    ]
    stops = [*river.band_starts[1:], length]
    tokens = [
        f"tokens {start}–{stop - 1}" for start, stop in zip(river.band_starts, stops, strict=True)
    ]
    # One value for each stretch, so each is drawn as wide as its stretch.
    stretch = np.repeat(places, 2)[1:-1]
    half = RIVER_HEIGHT * np.repeat(river.passing, 2) / 2
    return RiverDrawing(
        bands=tuple(zip(river.bands, tokens, areas[1:-1], strict=True)),
        waiting=areas[0],
        arrived=areas[-1],
        passing=_area(stretch, RIVER_HEIGHT / 2 - half, RIVER_HEIGHT / 2 + half),
        flags=tuple(round(100 * (unit.last + 0.5) / length, 2) for unit in checkpoints),
        deviation=float(np.abs(layers.sum(1) - 1).max()),
    )


def river_layers(river: River) -> Float[np.ndarray, "cut layer"]:
    """What a river consists of at each cut, from top to bottom; each row sums to 1."""
    return np.column_stack([river.waiting, river.flow, river.arrived])


def _area(
    places: Float[np.ndarray, " point"],
    top: Float[np.ndarray, " point"],
    bottom: Float[np.ndarray, " point"],
) -> str:
    """The area between two lines as an SVG path; empty where they meet everywhere."""
    if np.allclose(top, bottom, atol=0.05):
        return ""
    there = [f"{x:.1f} {y:.1f}" for x, y in zip(places, top, strict=True)]
    back = [f"{x:.1f} {y:.1f}" for x, y in zip(places[::-1], bottom[::-1], strict=True)]
    return f"M{'L'.join([*there, *back])}z"
