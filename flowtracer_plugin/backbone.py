"""What stands out in a flow: hubs, checkpoints, likely paths, and the graph of reasoning steps.

Everything here reads one numpy flow and costs O(T²) time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int
from scipy.special import entr

from flowtracer_plugin.flow import Flow

STEP_END = re.compile(
    r"\n\s*|(?<=[.!?])(?<!^\d\.)(?<!^\d\d\.)\s+|(?<=[。！？])\s*",  # noqa: RUF001
    re.MULTILINE,
)
"""A step is a line, or a sentence within one; the number of a list's item is no sentence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowPath:
    """One way from the question to the answer.

    Attributes:
        tokens: Indices of its tokens in order: the first is a question token, the last one of the
            target's.
        probability: Chance that one unit of flow takes exactly this way.
    """

    tokens: tuple[int, ...]
    probability: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A line or sentence: the tokens `start` up to `stop`.

    Attributes:
        inflow: Flow that enters it from other steps or from the source.
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
        steps: In reading order.
        edges: `edges[later, earlier]` is the flow from one step to another; the diagonal is 0.
        sink: Flow from each step into the answer's sink; sums to 1.
    """

    steps: tuple[Step, ...]
    edges: Float[np.ndarray, "step step"]
    sink: Float[np.ndarray, " step"]


def hub_scores(flow: Flow) -> Float[np.ndarray, " token"]:
    """Throughput × effective number of outgoing edges: high where many later tokens draw on one.

    The effective number is the exponential of the entropy of the edges' flow shares, in edges; the
    edge into the sink counts as one.
    """
    outgoing = np.vstack([flow.edge_flow(), flow.sink_flow()])
    return flow.throughput * _effective_number(outgoing, flow.throughput)


def checkpoint_scores(flow: Flow) -> Float[np.ndarray, " token"]:
    """Throughput × effective number of incoming edges: high where one token gathers from many.

    Counted as in `hub_scores`; what is injected at a question token counts as one edge.
    """
    incoming = np.vstack([flow.edge_flow().T, flow.source])
    return flow.throughput * _effective_number(incoming, flow.throughput)


def _effective_number(
    parts: Float[np.ndarray, "edge token"], whole: Float[np.ndarray, " token"]
) -> Float[np.ndarray, " token"]:
    shares = np.divide(parts, whole, out=np.zeros_like(parts), where=whole > 0)
    return np.exp(entr(shares).sum(0))


def likely_paths(flow: Flow, count: int) -> tuple[FlowPath, ...]:
    """The `count` most probable ways from the question to the answer, the likeliest first.

    Exact dynamic programming on the conditioned graph: from the last token to the first, keep the
    `count` best ways on to the sink. Fewer come back if there are fewer.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count!r}")
    with np.errstate(divide="ignore"):
        onward, to_sink = np.log(_shares(flow)), np.log(_sink_shares(flow))
        starts = np.log(flow.source)
    length = len(starts)
    best = np.full((length + 1, count), -np.inf)
    best[length, 0] = 0.0  # the sink
    following = np.zeros((length, count, 2), dtype=np.int64)
    for token in reversed(range(length)):
        ways = np.append(onward[token + 1 :, token], to_sink[token])[:, None] + best[token + 1 :]
        chosen = _largest(ways.ravel(), count)
        best[token, : len(chosen)] = ways.ravel()[chosen]
        rows, ranks = np.divmod(chosen, count)
        following[token, : len(chosen)] = np.column_stack([rows + token + 1, ranks])
    totals = (starts[:, None] + best[:length]).ravel()
    return tuple(
        FlowPath(
            tokens=_follow(following, *divmod(int(first), count)),
            probability=float(np.exp(totals[first])),
        )
        for first in _largest(totals, count)
        if np.isfinite(totals[first])
    )


def _largest(values: Float[np.ndarray, " candidate"], count: int) -> Int[np.ndarray, " chosen"]:
    """Indices of the `count` largest values, in descending order."""
    few = np.argpartition(-values, min(count, len(values)) - 1)[:count]
    return few[np.argsort(-values[few], kind="stable")]


def _follow(following: Int[np.ndarray, "token way 2"], token: int, way: int) -> tuple[int, ...]:
    tokens = []
    while token < len(following):
        tokens.append(token)
        token, way = (int(part) for part in following[token, way])
    return tuple(tokens)


def _shares(flow: Flow) -> Float[np.ndarray, "query key"]:
    """`P[key, query]`: which part of a token's flow goes on to each later one."""
    edges = flow.edge_flow()
    return np.divide(edges, flow.throughput, out=np.zeros_like(edges), where=flow.throughput > 0)


def _sink_shares(flow: Flow) -> Float[np.ndarray, " token"]:
    sink = flow.sink_flow()
    return np.divide(sink, flow.throughput, out=np.zeros_like(sink), where=flow.throughput > 0)


def step_bounds(pieces: Sequence[str], prompt_length: int) -> tuple[tuple[int, int], ...]:
    """First and last-plus-one token of every step; prompt and response never share one."""
    first, second = pieces[:prompt_length], pieces[prompt_length:]
    later = ((start + prompt_length, stop + prompt_length) for start, stop in _bounds(second))
    return (*_bounds(first), *later)


def _bounds(pieces: Sequence[str]) -> list[tuple[int, int]]:
    text = "".join(pieces)
    # Blank space around the text is no step of its own.
    found = STEP_END.finditer(text, len(text) - len(text.lstrip()))
    last = len(text.rstrip())
    ends = np.array([match.end() for match in found if match.end() < last], dtype=np.int64)
    # A token that begins with a space belongs to the word after it, not to the step before.
    indents = [len(piece) - len(piece.lstrip()) if piece.strip() else 0 for piece in pieces]
    starts = np.cumsum([0, *map(len, pieces)])[:-1] + indents
    step = np.searchsorted(ends, starts, side="right")
    cuts = np.flatnonzero(np.diff(step)) + 1
    edges = [0, *cuts.tolist(), len(pieces)]
    return [(a, b) for a, b in pairwise(edges) if b > a]


def step_graph(
    flow: Flow, pieces: Sequence[str], bounds: Sequence[tuple[int, int]], regions: Sequence[str]
) -> StepGraph:
    """The token flow, summed over steps; flow inside a step is left out.

    `regions` names the region of every token; a step has that of its last one.
    """
    member = np.zeros((len(bounds), len(pieces)))
    for row, (start, stop) in enumerate(bounds):
        member[row, start:stop] = 1.0
    edges = member @ flow.edge_flow() @ member.T
    np.fill_diagonal(edges, 0.0)
    inflow = edges.sum(1) + member @ flow.source
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
    return StepGraph(steps=steps, edges=edges, sink=member @ flow.sink_flow())
