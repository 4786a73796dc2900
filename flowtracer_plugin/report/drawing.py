"""The coordinates of the drawings: the ribbon, the steps and the river."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Int

from flowtracer_plugin.flow.backbone import Step, strongest_flows
from flowtracer_plugin.flow.river import River
from flowtracer_plugin.report.display import ShownTrace, Unit
from flowtracer_plugin.result.standouts import is_mark
from flowtracer_plugin.text.visible import visible

MAX_BARS = 1200
_FEW_STEPS = 60
"""The number of steps that are listed if no flow moves between steps."""

RIBBON_HEIGHT = 100
RIVER_WIDTH, RIVER_HEIGHT = 1000, 100


@dataclass(frozen=True, kw_only=True)
class Ribbon:
    """The whole text as bars, each as high as the highest throughput in its bin.

    Heights are square roots. The answer's bars would dwarf all others, so they are cut to the
    height of the highest bar outside the answer.

    Attributes:
        width: The number of bars.
        bars: An SVG path for each region.
        marks: The position of each hub, from 0 to `width`.
        prompt_end: The position at which the response begins.
    """

    width: int
    bars: dict[str, str]
    marks: tuple[float, ...]
    prompt_end: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Bars:
    """The whole text in at most `MAX_BARS` bins.

    Attributes:
        first: The first unit of each bin.
        peak: The highest throughput in each bin.
        prompt: Which bins begin in the prompt and hold no part of the answer.
        answer: Which bins hold a part of the answer.
    """

    first: Int[np.ndarray, " bar"]
    peak: Float[np.ndarray, " bar"]
    prompt: Bool[np.ndarray, " bar"]
    answer: Bool[np.ndarray, " bar"]

    @property
    def highest(self) -> float:
        """The highest peak outside the answer, or 1 if there is no flow outside the answer."""
        return float(self.peak[~self.answer].max(initial=0.0)) or 1.0

    @property
    def regions(self) -> dict[str, Bool[np.ndarray, " bar"]]:
        """The bins of each region, by its name."""
        response = ~self.prompt & ~self.answer
        return {"prompt": self.prompt, "response": response, "answer": self.answer}


def cut_into_bars(shown: ShownTrace) -> Bars:
    """One bar per unit, or fewer for texts of more than `MAX_BARS` units."""
    count = len(shown.units)
    first = np.arange(min(count, MAX_BARS)) * count // min(count, MAX_BARS)
    answer = np.logical_or.reduceat([unit.region == "answer" for unit in shown.units], first)
    return Bars(
        first=first,
        peak=np.maximum.reduceat(shown.throughput, first),
        prompt=(first < shown.prompt_units) & ~answer,
        answer=answer,
    )


def draw_ribbon(shown: ShownTrace, hubs: tuple[Unit, ...]) -> Ribbon:
    """The bars of a text and the positions of its hubs."""
    bars = cut_into_bars(shown)
    width, count = len(bars.first), len(shown.units)
    relative = np.sqrt(np.minimum(bars.peak / bars.highest, 1))
    heights = np.rint(RIBBON_HEIGHT * relative).astype(int)
    return Ribbon(
        width=width,
        bars={name: bars_path(heights, part) for name, part in bars.regions.items()},
        marks=tuple(round((hub.index + 0.5) * width / count, 2) for hub in hubs),
        prompt_end=round(shown.prompt_units * width / count, 2),
    )


def bars_path(heights: Int[np.ndarray, " bar"], shown: Bool[np.ndarray, " bar"]) -> str:
    """An SVG path of the bars in `shown` whose height is above 0."""
    bars = np.flatnonzero(shown & (heights > 0)).tolist()
    return "".join(f"M{bar} {RIBBON_HEIGHT}v-{heights[bar]}h1V{RIBBON_HEIGHT}z" for bar in bars)


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """A step as a line of a list.

    Attributes:
        number: The step's number in the text, from 1.
        step: The step.
        text: Its text on one line, with invisible characters spelled out.
        region: prompt, question, response, or answer.
        first: The index of its first unit.
        last: The index of its last unit.
    """

    number: int
    step: Step
    text: str
    region: str
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class StepDrawing:
    """The strongest flows between steps, and the steps at their ends.

    Attributes:
        rows: The steps in reading order.
        flows: The row of the earlier step, the row of the later step, and the flow between them;
            the strongest first.
        step_count: The number of all steps.
        flow_count: The number of all flows between steps.
        total: The sum of all flow between steps.
    """

    rows: tuple[StepRow, ...]
    flows: tuple[tuple[int, int, float], ...]
    step_count: int
    flow_count: int
    total: float


def draw_steps(shown: ShownTrace) -> StepDrawing:
    """As many of the strongest flows as a list can show legibly, and the steps at their ends."""
    graph = shown.steps
    strong = strongest_flows(graph, share=1.0)
    listed = strong.steps or tuple(range(len(graph.steps)))[:_FEW_STEPS]
    row = {step: place for place, step in enumerate(listed)}
    return StepDrawing(
        rows=tuple(step_row(shown, index) for index in listed),
        flows=tuple((row[earlier], row[later], flow) for earlier, later, flow in strong.flows),
        step_count=len(graph.steps),
        flow_count=int((graph.edges > 0).sum()),
        total=float(graph.edges.sum()),
    )


def step_row(shown: ShownTrace, index: int) -> StepRow:
    """The step with this index, as a line of a list."""
    step, first = shown.steps.steps[index], shown.trace.tokens[0]
    said = step.text
    if step.start == 0 and step.stop > 1 and is_mark(first):  # such as <bos>
        said = said.removeprefix(first)
    answers = "answer" in shown.regions[step.start : step.stop]
    return StepRow(
        number=index + 1,
        step=step,
        text=visible(" ".join(said.split())) or "⏎",
        region="answer" if answers else step.region,
        first=shown.unit_of(step.start).index,
        last=shown.unit_of(step.stop - 1).index,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class RiverDrawing:
    """The river as areas in a drawing `RIVER_WIDTH` wide and `RIVER_HEIGHT` high.

    Attributes:
        layers: The heights of all areas at each cut, from top to bottom; see `river_layers`.
        bands: The name, the tokens and the area of each part of the text that flow comes from.
        waiting: The area of the flow that has not started.
        arrived: The area of the flow that has arrived.
        passing: The area of the flow that passes over the text beneath it, drawn from the middle.
        deviation: The largest difference between 1 and the sum of the layers at a cut.
    """

    layers: Float[np.ndarray, "cut layer"]
    bands: tuple[tuple[str, str, str], ...]
    waiting: str
    arrived: str
    passing: str
    deviation: float


def draw_river(river: River) -> RiverDrawing:
    """The areas of a river: waiting flow, then each part of the text, then arrived flow."""
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
    # `passing` has one value for each stretch between cuts, so both ends of a stretch get it.
    stretch = np.repeat(places, 2)[1:-1]
    half = RIVER_HEIGHT * np.repeat(river.passing, 2) / 2
    return RiverDrawing(
        layers=layers,
        bands=tuple(zip(river.bands, tokens, areas[1:-1], strict=True)),
        waiting=areas[0],
        arrived=areas[-1],
        passing=_area(stretch, RIVER_HEIGHT / 2 - half, RIVER_HEIGHT / 2 + half),
        deviation=float(np.abs(layers.sum(1) - 1).max()),
    )


def river_layers(river: River) -> Float[np.ndarray, "cut layer"]:
    """The parts of a river at each cut, from top to bottom; each row sums to 1."""
    return np.column_stack([river.waiting, river.flow, river.arrived])


def _area(
    places: Float[np.ndarray, " point"],
    top: Float[np.ndarray, " point"],
    bottom: Float[np.ndarray, " point"],
) -> str:
    """The area between two lines as an SVG path, or an empty path if they coincide."""
    if np.allclose(top, bottom, atol=0.05):
        return ""
    there = [f"{x:.1f} {y:.1f}" for x, y in zip(places, top, strict=True)]
    back = [f"{x:.1f} {y:.1f}" for x, y in zip(places[::-1], bottom[::-1], strict=True)]
    return f"M{'L'.join([*there, *back])}z"
