"""The steps of a figure: the strongest flows as arcs above a line of numbered steps."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from flowtracer_plugin.flow.backbone import StepGraph, StrongFlows, strongest_flows
from flowtracer_plugin.report.display import ShownTrace, percent
from flowtracer_plugin.report.drawing import StepRow, step_row
from flowtracer_plugin.report.figures.panels import (
    FILLS,
    LETTERS,
    MUTED,
    RIGHT,
    STROKES,
    Panel,
    key,
    text_width,
    write,
)

_HEIGHT = 1.0
_NARROWEST_STEP, _APART = 0.15, 0.04
"""The least width of a step, and the space between the numbers of two steps, in inches."""

_NARROWEST, _WIDEST = 0.4, 3.2
_SMALLEST, _LARGEST = 3.0, 22.0
"""The widths of lines in points, and the areas of dots in square points."""


def steps_panels(shown: ShownTrace, width: float) -> list[Panel]:
    """The strongest flows between steps, and a key to the numbers of the steps."""
    graph = shown.steps
    step = max(text_width(str(len(graph.steps))) + _APART, _NARROWEST_STEP)
    strong = strongest_flows(graph, max_steps=int((width - 2 * RIGHT) / step))
    listed = strong.steps or tuple(range(len(graph.steps)))[:2]
    rows = [step_row(shown, index) for index in listed]

    def draw(axes: Axes) -> None:
        axes.set(xlim=(-0.5, len(rows) - 0.5), ylim=(-0.16, 1.05))
        axes.axis("off")
        _draw_arcs(axes, graph, strong)
        _draw_steps(axes, rows)
        if strong.flows:
            said = f"arcs: {percent(strong.share)} of the flow between steps"
            write(axes, -0.5, 1.0, said, va="top", color=MUTED)

    entries = [(str(row.number), LETTERS[row.region], row.text) for row in rows]
    return [
        Panel(height=_HEIGHT, draw=draw, left=RIGHT),
        key(entries, width, 1 if width < 5 else 2),
    ]


def _draw_steps(axes: Axes, rows: list[StepRow]) -> None:
    largest = max(row.step.inflow for row in rows) or 1.0
    for place, row in enumerate(rows):
        area = _SMALLEST + _LARGEST * row.step.inflow / largest
        axes.scatter(place, 0, s=area, color=FILLS[row.region], zorder=3, clip_on=False)
        colour = LETTERS[row.region]
        write(axes, place, -0.09, str(row.number), ha="center", va="top", color=colour)


def _draw_arcs(axes: Axes, graph: StepGraph, strong: StrongFlows) -> None:
    place = {step: number for number, step in enumerate(strong.steps)}
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
        axes.add_patch(
            PathPatch(
                curve,
                fill=False,
                edgecolor=STROKES[graph.steps[earlier].region],
                linewidth=max(_WIDEST * strength, _NARROWEST),
                alpha=0.35 + 0.55 * strength,
                capstyle="butt",
            )
        )
