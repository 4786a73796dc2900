"""Where the lines of the drawings go: the ribbon and the arcs between steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from flowtracer_plugin.backbone import Step
from flowtracer_plugin.report.display import Reading, Unit, visible

MAX_BARS = 1200
MAX_STEPS = 40
MAX_ARCS = 60

RIBBON_HEIGHT = 100
ROW_HEIGHT = 32
GUTTER_WIDTH = 100
_NARROWEST, _WIDEST = 0.75, 7.0


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


def draw_ribbon(reading: Reading, hubs: tuple[Unit, ...]) -> Ribbon:
    """One bar per unit, or fewer where there are more than `MAX_BARS`."""
    count = len(reading.units)
    width = min(count, MAX_BARS)
    first = np.arange(width) * count // width
    peaks = np.maximum.reduceat(reading.throughput, first)
    answer = np.logical_or.reduceat([unit.region == "answer" for unit in reading.units], first)
    prompt = first < reading.prompt_units
    highest = float(peaks[~answer].max(initial=0.0)) or 1.0
    heights = np.rint(RIBBON_HEIGHT * np.sqrt(np.minimum(peaks / highest, 1))).astype(int)
    return Ribbon(
        width=width,
        bars={
            "prompt": bars_path(heights, prompt & ~answer),
            "response": bars_path(heights, ~prompt & ~answer),
            "answer": bars_path(heights, answer),
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
        hidden_before: Steps that are left out above it.
        step: The step.
        text: Its text, made visible, on one line.
        region: prompt, question, response, or answer.
        first: Its first unit.
        last: Its last unit.
    """

    number: int
    hidden_before: int
    step: Step
    text: str
    region: str
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Arc:
    """A flow between two rows: an SVG path in a drawing `GUTTER_WIDTH` wide."""

    source: int
    target: int
    flow: float
    width: float
    opacity: float
    path: str


@dataclass(frozen=True, kw_only=True)
class StepDrawing:
    """The strongest flows between steps.

    Attributes:
        rows: The steps that are shown.
        arcs: The flows that are shown, the weakest first.
        height: Of the drawing.
        step_count: How many steps there are.
        arc_count: How many flows there are.
        share: Of all flow between steps, what is shown.
    """

    rows: tuple[StepRow, ...]
    arcs: tuple[Arc, ...]
    height: int
    step_count: int
    arc_count: int
    share: float


def draw_steps(reading: Reading) -> StepDrawing:
    """The `MAX_STEPS` steps with most inflow and, among them, the `MAX_ARCS` strongest flows."""
    graph = reading.trace.steps()
    inflow = np.array([step.inflow for step in graph.steps])
    kept = np.sort(np.argsort(-inflow, kind="stable")[:MAX_STEPS])
    edges = graph.edges[np.ix_(kept, kept)]
    arcs = _arcs(edges)
    total = float(graph.edges.sum())
    return StepDrawing(
        rows=_rows(reading, graph.steps, kept.tolist()),
        arcs=arcs,
        height=len(kept) * ROW_HEIGHT,
        step_count=len(graph.steps),
        arc_count=int((graph.edges > 0).sum()),
        share=sum(arc.flow for arc in arcs) / total if total else 0.0,
    )


def _rows(reading: Reading, steps: tuple[Step, ...], kept: list[int]) -> tuple[StepRow, ...]:
    regions = reading.trace.spans.regions
    return tuple(
        StepRow(
            number=index + 1,
            hidden_before=index - before - 1,
            step=steps[index],
            text=visible(" ".join(steps[index].text.split())) or "⏎",
            region="answer"
            if "answer" in regions[steps[index].start : steps[index].stop]
            else steps[index].region,
            first=reading.unit_of(steps[index].start).index,
            last=reading.unit_of(steps[index].stop - 1).index,
        )
        for before, index in zip([-1, *kept[:-1]], kept, strict=True)
    )


def _arcs(edges: Float[np.ndarray, "row row"]) -> tuple[Arc, ...]:
    flows = edges.ravel()
    strongest = np.argsort(-flows, kind="stable")[:MAX_ARCS]
    strongest = strongest[flows[strongest] > 0][::-1]
    ends = [divmod(int(index), len(edges)) for index in strongest]
    longest = max((target - source for target, source in ends), default=1)
    largest = float(flows.max(initial=0.0))
    return tuple(
        _arc(source, target, float(edges[target, source]), largest, longest)
        for target, source in ends
    )


def _arc(source: int, target: int, flow: float, largest: float, longest: int) -> Arc:
    strength = (flow / largest) ** 0.5
    start, stop = ((row + 0.5) * ROW_HEIGHT for row in (source, target))
    # A curve swings out by three quarters of its handles.
    edge = GUTTER_WIDTH
    x = edge * (1 - 1.28 * ((target - source) / longest) ** 0.6)
    return Arc(
        source=source,
        target=target,
        flow=flow,
        width=round(max(_WIDEST * strength, _NARROWEST), 2),
        opacity=round(0.25 + 0.6 * strength, 2),
        path=f"M{edge} {start:g}C{x:.1f} {start:g} {x:.1f} {stop:g} {edge} {stop:g}",
    )
