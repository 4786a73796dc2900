"""The rows of the page's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from flowtracer_plugin.flow.backbone import StepGraph
from flowtracer_plugin.report.display import Reading, Unit
from flowtracer_plugin.report.drawing import StepRow, step_row

MAX_TOKENS = 30
"""By throughput; hubs and checkpoints come on top."""

MAX_STEPS = 60


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """A token of the reasoning that stands out.

    Attributes:
        unit: The token, or the tokens that spell one character.
        before: What is written before it, on one line.
        after: What is written after it.
        from_prompt: Share of its inflow that comes straight from the prompt.
        sources: Effective number of edges that lead to it.
        targets: Effective number of edges that lead on.
        drop: By how many nats the answer's log-probability falls without it; None if not measured.
    """

    unit: Unit
    before: str
    after: str
    from_prompt: float
    sources: float
    targets: float
    drop: float | None


def token_rows(
    reading: Reading, marked: Sequence[Unit], drops: Mapping[int, float] | None
) -> tuple[TokenRow, ...]:
    """The tokens with most throughput and those that are marked, by throughput."""
    reasoning = [unit for unit in reading.units if unit.region == "response" and unit.throughput]
    best = sorted(reasoning, key=lambda unit: -unit.throughput)[:MAX_TOKENS]
    shown = sorted({unit.index: unit for unit in (*best, *marked)}.values(), key=_by_throughput)
    return tuple(_token_row(reading, unit, drops or {}) for unit in shown)


def _by_throughput(unit: Unit) -> tuple[float, int]:
    return -unit.throughput, unit.index


def _token_row(reading: Reading, unit: Unit, drops: Mapping[int, float]) -> TokenRow:
    before, after = reading.context(unit)
    backbone, tokens = reading.trace.backbone, slice(unit.first, unit.last + 1)
    known = [drops[token] for token in range(unit.first, unit.last + 1) if token in drops]
    return TokenRow(
        unit=unit,
        before=before,
        after=after,
        from_prompt=float(backbone.prompt_inflow[tokens].sum()) / unit.throughput,
        sources=_edges(reading, backbone.checkpoints[tokens], tokens),
        targets=_edges(reading, backbone.hubs[tokens], tokens),
        drop=max(known, default=None),
    )


def _edges(reading: Reading, scores: Float[np.ndarray, " token"], tokens: slice) -> float:
    """Effective number of edges of the unit's strongest token."""
    best = int(scores.argmax())
    return float(scores[best] / reading.trace.throughput[tokens][best])


@dataclass(frozen=True, kw_only=True)
class StepTableRow:
    """A step in numbers.

    Attributes:
        row: The step.
        from_prompt: Flow that enters it from the prompt's steps.
        outflow: Flow that leaves it for later steps.
        sink: Flow that ends in it.
    """

    row: StepRow
    from_prompt: float
    outflow: float
    sink: float


def step_rows(reading: Reading, graph: StepGraph) -> tuple[StepTableRow, ...]:
    """The steps that most flow enters, in reading order."""
    inflow = np.array([step.inflow for step in graph.steps])
    shown = np.sort(np.argsort(-inflow, kind="stable")[:MAX_STEPS]).tolist()
    prompt = np.array([step.start < reading.trace.spans.prompt_length for step in graph.steps])
    return tuple(
        StepTableRow(
            row=step_row(reading, graph.steps[index], index + 1),
            from_prompt=float(graph.edges[index, prompt].sum()),
            outflow=float(graph.edges[:, index].sum()),
            sink=float(graph.sink[index]),
        )
        for index in shown
    )
