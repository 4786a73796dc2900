"""The steps of a figure: the backbone as arcs above a line of numbered steps."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from flowtracer_plugin.backbone import StepGraph, StrongFlows, strongest_flows
from flowtracer_plugin.report.display import Reading, percent, visible
from flowtracer_plugin.report.figure_panels import (
    FILLS,
    LETTERS,
    MUTED,
    RIGHT,
    STROKES,
    Panel,
    key,
    write,
)

_HEIGHT = 1.0
_STEP = 0.15
"""Inches that a step takes at least: three digits."""

_NARROWEST, _WIDEST = 0.4, 3.2


def steps_panels(reading: Reading, width: float) -> list[Panel]:
    """The strongest flows between steps, and a key to the numbers of the steps."""
    graph = reading.trace.steps()
    strong = strongest_flows(graph, max_steps=max(2, int((width - 2 * RIGHT) / _STEP)))
    shown = strong.steps or tuple(range(min(len(graph.steps), 2)))
    regions = [_region(reading, graph, step) for step in shown]

    def draw(axes: Axes) -> None:
        axes.set(xlim=(-0.5, len(shown) - 0.5), ylim=(-0.16, 1.05))
        axes.axis("off")
        _draw_arcs(axes, graph, strong, shown)
        largest = max(graph.steps[step].inflow for step in shown) or 1.0
        for place, (step, region) in enumerate(zip(shown, regions, strict=True)):
            area = 3 + 22 * graph.steps[step].inflow / largest
            axes.scatter(place, 0, s=area, color=FILLS[region], zorder=3, clip_on=False)
            write(axes, place, -0.09, str(step + 1), ha="center", va="top", color=LETTERS[region])
        if strong.flows:
            said = f"arcs: {percent(strong.share)} of the flow between steps"
            write(axes, -0.5, 1.0, said, va="top", color=MUTED)

    entries = [
        (str(step + 1), LETTERS[region], _label(graph, step))
        for step, region in zip(shown, regions, strict=True)
    ]
    return [
        Panel(height=_HEIGHT, draw=draw, left=RIGHT),
        key(entries, width, 1 if width < 5 else 2),
    ]


def _region(reading: Reading, graph: StepGraph, step: int) -> str:
    part = slice(graph.steps[step].start, graph.steps[step].stop)
    return "answer" if reading.trace.spans.answer[part].any() else graph.steps[step].region


def _label(graph: StepGraph, step: int) -> str:
    return visible(" ".join(graph.steps[step].text.split())) or "⏎"


def _draw_arcs(axes: Axes, graph: StepGraph, strong: StrongFlows, shown: tuple[int, ...]) -> None:
    place = {step: number for number, step in enumerate(shown)}
    longest = max((place[later] - place[earlier] for earlier, later, _ in strong.flows), default=1)
    largest = max((flow for *_, flow in strong.flows), default=1.0)
    for earlier, later, flow in reversed(strong.flows):
        strength = (flow / largest) ** 0.5
        start, stop = place[earlier], place[later]
        # The curve rises to three quarters of its handles.
        top = 1.15 * ((stop - start) / longest) ** 0.65
        curve = Path(
            [(start, 0), (start, top), (stop, top), (stop, 0)],
            [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4],
        )
        region = "response" if graph.steps[earlier].region in ("response", "answer") else "prompt"
        axes.add_patch(
            PathPatch(
                curve,
                fill=False,
                edgecolor=STROKES[region],
                linewidth=max(_WIDEST * strength, _NARROWEST),
                alpha=0.35 + 0.55 * strength,
                capstyle="butt",
            )
        )
