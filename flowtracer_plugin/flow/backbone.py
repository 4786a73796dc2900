"""The backbone of a flow: hubs, checkpoints, likely paths, and the graph of reasoning steps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

STEP_END = re.compile(
    r"\n\s*|(?<=[.!?])(?<!^\d\.)(?<!^\d\d\.)\s+|(?<=[。！？])\s*",
    re.MULTILINE,
)
"""The end of a step: of a line or a sentence, but not of a list item's number."""

KEPT_EDGES = 8
"""How many edges into, and out of, each token a backbone keeps."""

KEPT_PATHS = 10
"""How many of the likeliest paths a backbone keeps."""

MAX_STEPS = 4096
"""The most steps of a text; in longer texts, neighbouring steps are merged."""

BINS = 100
"""The number of parts of equal length between which a backbone holds the flow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowPath:
    """One path to the answer.

    Attributes:
        tokens: Indices of its tokens in order: flow is injected at the first, and the last is a
            target token.
        probability: The share of the flow that takes exactly this path.
    """

    tokens: tuple[int, ...]
    probability: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A line or sentence: the tokens `start` up to `stop`.

    Attributes:
        inflow: Flow that enters it from other steps, or is injected in it.
    """

    start: int
    stop: int
    text: str
    region: str
    inflow: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepGraph:
    """The flow between steps.

    Attributes:
        steps: The steps in reading order.
        edges: `edges[later, earlier]` is the flow from one step to another; the diagonal is 0.
        sink: Flow from each step into the answer's sink; sums to 1.
    """

    steps: tuple[Step, ...]
    edges: Float[np.ndarray, "step step"]
    sink: Float[np.ndarray, " step"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Outline:
    """The parts of a text for which a backbone sums the flow.

    Attributes:
        prompt_length: Tokens before the response.
        bounds: Start and stop token of every step; the stop token is excluded.
    """

    prompt_length: int
    bounds: Sequence[tuple[int, int]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StrongEdges:
    """The strongest edges of each token, by flow.

    Attributes:
        token: The token at the other end; the token itself where it has fewer edges.
        flow: Flow on the edge; 0 where the token has fewer edges.
    """

    token: Int[np.ndarray, "token kept"]
    flow: Float[np.ndarray, "token kept"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Backbone:
    """The main features of a flow: a few numbers per token, however long the text.

    Attributes:
        question_reached: How many question tokens reach the answer.
        source: The share of the unit that is injected at each token.
        sink: Flow from each token into the sink.
        hubs: Throughput × effective number of outgoing edges: high for a token on which many later
            ones draw. The effective number is the exponential of the entropy of the edges' flow
            shares; the edge into the sink counts as one edge.
        checkpoints: Throughput × effective number of incoming edges: high for a token that gathers
            from many. What is injected at it counts as one edge.
        prompt_inflow: Flow that enters each token from the prompt.
        sources: The strongest edges into each token.
        targets: The strongest edges out of each token.
        paths: The likeliest paths to the answer, the likeliest first.
        steps: `steps[later, earlier]` is the flow from one step to another; the diagonal is 0.
        bins: The flow from one bin to another; the bins begin at `bin_starts`.
    """

    question_reached: int
    source: Float[np.ndarray, " token"]
    sink: Float[np.ndarray, " token"]
    hubs: Float[np.ndarray, " token"]
    checkpoints: Float[np.ndarray, " token"]
    prompt_inflow: Float[np.ndarray, " token"]
    sources: StrongEdges
    targets: StrongEdges
    paths: tuple[FlowPath, ...]
    steps: Float[np.ndarray, "step step"]
    bins: Float[np.ndarray, "bin bin"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StrongFlows:
    """The strongest flows between steps.

    Attributes:
        flows: Earlier step, later step, and the flow between them, the strongest flow first.
        share: Their share of all flow between steps.
    """

    flows: tuple[tuple[int, int, float], ...]
    share: float

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps at the ends of these flows, in reading order."""
        return tuple(sorted({end for earlier, later, _ in self.flows for end in (earlier, later)}))


def strongest_edges(backbone: Backbone, minimum: float = 0.0) -> list[tuple[int, int, float]]:
    """Earlier token, later token and flow of every kept edge above `minimum`, each edge once."""
    found: dict[tuple[int, int], float] = {}
    for edges, swapped in ((backbone.sources, False), (backbone.targets, True)):
        for token, place in np.argwhere(edges.flow > minimum).tolist():
            other = int(edges.token[token, place])
            ends = (token, other) if swapped else (other, token)
            found[ends] = float(edges.flow[token, place])
    return [(earlier, later, flow) for (earlier, later), flow in sorted(found.items())]


def strongest_flows(
    graph: StepGraph, *, share: float = 0.8, max_steps: int = 60, max_flows: int = 150
) -> StrongFlows:
    """The smallest set of flows between steps that holds `share` of their sum, within the limits.

    Flows are added from the strongest to the weakest, except those that would need more than
    `max_steps` steps.

    Raises:
        ValueError: `share` is not between 0 and 1, or a limit is below 2 steps or 1 flow.
    """
    if not 0 <= share <= 1 or max_steps < 2 or max_flows < 1:
        raise ValueError(
            "wanted a share from 0 to 1, at least 2 steps and 1 flow, got "
            f"share={share!r}, max_steps={max_steps!r}, max_flows={max_flows!r}"
        )
    total, held = float(graph.edges.sum()), 0.0
    flows: list[tuple[int, int, float]] = []
    for earlier, later, flow in _descending_flows(graph.edges, max_steps):
        if held >= share * total or len(flows) == max_flows:
            break
        flows.append((earlier, later, flow))
        held += flow
    return StrongFlows(flows=tuple(flows), share=held / total if total else 0.0)


def _descending_flows(
    edges: Float[np.ndarray, "step step"], max_steps: int
) -> Iterator[tuple[int, int, float]]:
    """The flows from the strongest to the weakest, except those that need too many steps."""
    order = np.argsort(-edges, axis=None, kind="stable")[: np.count_nonzero(edges > 0)]
    known: set[int] = set()
    while len(order) and len(known) < max_steps:
        later, earlier = divmod(int(order[0]), len(edges))
        order = order[1:]
        if len(known | {later, earlier}) <= max_steps:
            known |= {later, earlier}
            yield earlier, later, float(edges[later, earlier])
    # In a long text, millions of the other flows need one more step: filter them in one operation.
    inside = np.isin(np.unravel_index(order, edges.shape), list(known)).all(0)
    for place in order[inside].tolist():
        later, earlier = divmod(place, len(edges))
        yield earlier, later, float(edges[later, earlier])


def bin_starts(length: int, prompt_length: int) -> Int[np.ndarray, " bin"]:
    """The first token of each of about `BINS` equal parts of a text; the response starts a part."""
    equal = np.arange(BINS, dtype=np.int64) * length // BINS
    return np.union1d(equal, [min(prompt_length, length - 1)])


def outline(pieces: Sequence[str], prompt_length: int) -> Outline:
    """The outline of a text whose tokens decode to these pieces."""
    return Outline(prompt_length=prompt_length, bounds=step_bounds(pieces, prompt_length))


def step_bounds(pieces: Sequence[str], prompt_length: int) -> tuple[tuple[int, int], ...]:
    """Start and stop token of every step; prompt and response never share a step.

    In a text with more than `MAX_STEPS`, neighbours are merged, because the flow between all pairs
    of steps has to fit in memory.
    """
    first, second = _bounds(pieces[:prompt_length]), _bounds(pieces[prompt_length:])
    together = max(1, -(-(len(first) + len(second)) // MAX_STEPS))
    later = [(start + prompt_length, stop + prompt_length) for start, stop in second]
    return (*_joined(first, together), *_joined(later, together))


def _joined(bounds: list[tuple[int, int]], together: int) -> list[tuple[int, int]]:
    starts = range(0, len(bounds), together)
    return [(bounds[i][0], bounds[min(i + together, len(bounds)) - 1][1]) for i in starts]


def _bounds(pieces: Sequence[str]) -> list[tuple[int, int]]:
    text = "".join(pieces)
    # Whitespace around the text is not a step.
    found = STEP_END.finditer(text, len(text) - len(text.lstrip()))
    last = len(text.rstrip())
    ends = np.array([match.end() for match in found if match.end() < last], dtype=np.int64)
    # A token that begins with a space belongs to the word after the space.
    indents = [len(piece) - len(piece.lstrip()) if piece.strip() else 0 for piece in pieces]
    starts = np.cumsum([0, *map(len, pieces)])[:-1] + indents
    step = np.searchsorted(ends, starts, side="right")
    cuts = np.flatnonzero(np.diff(step)) + 1
    edges = [0, *cuts.tolist(), len(pieces)]
    return [(a, b) for a, b in pairwise(edges) if b > a]


def step_graph(
    backbone: Backbone,
    pieces: Sequence[str],
    bounds: Sequence[tuple[int, int]],
    regions: Sequence[str],
) -> StepGraph:
    """The flow between steps, with their texts.

    `regions` names the region of every token; a step has the region of its last token.
    """
    starts = [start for start, _ in bounds]
    inflow = backbone.steps.sum(1) + np.add.reduceat(backbone.source, starts)
    steps = tuple(
        Step(
            start=start,
            stop=stop,
            text="".join(pieces[start:stop]),
            region=regions[stop - 1],
            inflow=float(inflow[row]),
        )
        for row, (start, stop) in enumerate(bounds)
    )
    sink = np.add.reduceat(backbone.sink, starts)
    return StepGraph(steps=steps, edges=backbone.steps, sink=sink)
