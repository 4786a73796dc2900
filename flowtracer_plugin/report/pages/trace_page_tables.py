"""The rows of the tables on a trace's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from flowtracer_plugin.report.carried import drop_of
from flowtracer_plugin.report.display import ShownTrace, Unit, written_direction
from flowtracer_plugin.report.drawing import StepRow, step_row

MAX_TOKENS = 30
"""Tokens with the highest throughput that are listed; hubs and checkpoints are added to them."""

MAX_STEPS = 60


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """A row of the table of tokens.

    Attributes:
        unit: The token, or the tokens that spell one character.
        plain: Whether it is only a blank, a mark of the template, or formatting; the page hides
            these rows at first.
        before: The text before it, on one line.
        after: The text after it, on one line.
        from_prompt: The share of its inflow that comes directly from the prompt.
        sources: The effective number of its incoming edges.
        targets: The effective number of its outgoing edges.
        chosen: Its place among the tokens that were chosen and hidden one after another; None if it
            was not chosen.
        drop: The fall of the answer's log-probability when it is knocked out, in nats; None if
            that was not measured.
    """

    unit: Unit
    plain: bool
    before: str
    after: str
    from_prompt: float
    sources: float
    targets: float
    chosen: int | None
    drop: float | None

    @property
    def direction(self) -> str:
        """`rtl` or `ltr`: how the token's line is written."""
        line, rest = self.before.rpartition("⏎")[2], self.after.partition("⏎")[0]
        return written_direction(line + self.unit.inline + rest)


def token_rows(
    shown: ShownTrace, marked: Sequence[Unit], drops: Mapping[int, float] | None
) -> tuple[TokenRow, ...]:
    """The tokens of the reasoning with the highest throughput and `marked` ones, by throughput.

    As many are listed that are not plain as if the plain ones were not there.
    """
    reasoning = [unit for unit in shown.units if unit.region == "response" and unit.throughput]
    by_flow = sorted(reasoning, key=lambda unit: -unit.throughput)
    best = [unit for unit in by_flow if not shown.plain[unit.index]][:MAX_TOKENS]
    listed = {unit.index: unit for unit in (*by_flow[:MAX_TOKENS], *best, *marked)}.values()
    by_throughput = sorted(listed, key=lambda unit: (-unit.throughput, unit.index))
    return tuple(_token_row(shown, unit, drops or {}) for unit in by_throughput)


def _token_row(shown: ShownTrace, unit: Unit, drops: Mapping[int, float]) -> TokenRow:
    before, after = shown.context(unit)
    backbone, tokens = shown.trace.backbone, slice(unit.first, unit.last + 1)
    places = [
        place
        for place, token in enumerate(shown.trace.chosen, start=1)
        if unit.first <= token <= unit.last
    ]
    return TokenRow(
        unit=unit,
        plain=bool(shown.plain[unit.index]),
        before=before,
        after=after,
        from_prompt=float(backbone.prompt_inflow[tokens].sum()) / unit.throughput,
        sources=_edges(shown, backbone.checkpoints[tokens], tokens),
        targets=_edges(shown, backbone.hubs[tokens], tokens),
        chosen=min(places, default=None),
        drop=drop_of(unit, drops),
    )


def _edges(shown: ShownTrace, scores: Float[np.ndarray, " token"], tokens: slice) -> float:
    """The effective number of edges of the unit's token with the highest score."""
    best = int(scores.argmax())
    return float(scores[best] / shown.trace.throughput[tokens][best])


@dataclass(frozen=True, kw_only=True)
class StepTableRow:
    """A row of the table of steps.

    Attributes:
        row: The step.
        from_prompt: The flow that enters it from the prompt's steps.
        outflow: The flow from it to later steps.
        sink: The flow that ends in it.
    """

    row: StepRow
    from_prompt: float
    outflow: float
    sink: float


def step_rows(shown: ShownTrace) -> tuple[StepTableRow, ...]:
    """The steps with the most inflow, in reading order."""
    graph = shown.steps
    inflow = np.array([step.inflow for step in graph.steps])
    listed = np.sort(np.argsort(-inflow, kind="stable")[:MAX_STEPS]).tolist()
    prompt = np.array([step.start < shown.trace.spans.prompt_length for step in graph.steps])
    return tuple(
        StepTableRow(
            row=step_row(shown, index),
            from_prompt=float(graph.edges[index, prompt].sum()),
            outflow=float(graph.edges[:, index].sum()),
            sink=float(graph.sink[index]),
        )
        for index in listed
    )
