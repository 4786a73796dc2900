"""Do the lines that scores rank highest, and the edges with the most flow, matter to the answer?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import spearmanr

from flowtracer_plugin.credit.token_scores import TOKEN_SCORES, TokenScore
from flowtracer_plugin.evaluation.ranked_tokens import PERCENTS, KnockOutOptions
from flowtracer_plugin.evaluation.scored_example import ScoredExample
from flowtracer_plugin.evaluation.token_sets import set_size
from flowtracer_plugin.trace.flow_trace import FlowTrace
from flowtracer_plugin.trace.tracer import FlowTracer

FEWEST_LINES = 3
"""With fewer lines, their order says nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LineKnockOuts:
    """The effect of each line of a response on its answer, and how well scores predict it.

    Attributes:
        lines: Start and stop token of each line or sentence before the answer.
        drop: How far the answer's mean log-probability falls without it, in nats per token.
        by_sum: For each score, the rank correlation of the lines' summed scores with `drop`;
            None where one of the two is the same in all lines.
        by_max: The rank correlation of the highest score in each line with `drop`.
    """

    lines: tuple[tuple[int, int], ...]
    drop: tuple[float, ...]
    by_sum: Mapping[str, float | None]
    by_max: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeKnockOuts:
    """The effect of cutting the edges with the most flow, and others with as much attention.

    Attributes:
        percent: Share of the edges that was cut.
        backbone: Drop of the answer's mean log-probability without them, in nats per token.
        others: Mean drop over draws of other edges.
        edges: Number of edges in the backbone's share.
        attention: Their attention, summed over the edges.
        other_edges: Mean number of edges in a draw.
        other_attention: Mean attention of a draw: never less than `attention`, unless all other
            edges together have less.
    """

    percent: int
    backbone: float
    others: float
    edges: int
    attention: float
    other_edges: float
    other_attention: float


def knock_out_lines(
    tracer: FlowTracer,
    trace: FlowTrace,
    *,
    scores: Mapping[str, TokenScore] = TOKEN_SCORES,
    rows: str = "future",
    batch_size: int | None = None,
) -> LineKnockOuts:
    """The effect of knocking out each line before the answer, and its correlation with the scores.

    Raises:
        KnockOutError: The model's attention cannot be cut.
        ValueError: There are fewer than 3 lines, or as `measure_knock_outs`.
    """
    example = ScoredExample(tracer=tracer, trace=trace, scores=scores, batch_size=batch_size)
    return example_lines(example, KnockOutOptions(rows=rows))


def example_lines(example: ScoredExample, options: KnockOutOptions) -> LineKnockOuts:
    """`knock_out_lines` for an example that other protocols share."""
    lines = _lines(example.trace)
    if len(lines) < FEWEST_LINES:
        raise ValueError(
            f"the response has {len(lines)} lines or sentences before the answer, wanted at least "
            f"{FEWEST_LINES} to compare"
        )
    values, place = example.values, np.arange(len(example.trace.token_ids))
    masks = [(start <= place) & (place < stop) for start, stop in lines]
    [(drop, *_)] = example.knock_out([masks], options.rows)
    by_sum, by_max = (
        {
            name: _agreement([float(gather(score[mask])) for mask in masks], drop)
            for name, score in values.items()
        }
        for gather in (np.sum, np.max)
    )
    return LineKnockOuts(lines=lines, drop=tuple(drop.tolist()), by_sum=by_sum, by_max=by_max)


def knock_out_backbone(
    tracer: FlowTracer,
    trace: FlowTrace,
    *,
    percents: tuple[int, ...] = PERCENTS,
    draws: int = 10,
    seed: int = 0,
    batch_size: int | None = None,
) -> tuple[EdgeKnockOuts, ...]:
    """The effect of cutting the edges with the most flow, and random others with as much attention.

    Edges between tokens of the response count, up to the row that chooses the last answer token.
    Edges to the prompt do not: among them are those to the first token, an attention sink, which
    hold much attention and carry little.

    Raises:
        KnockOutError: The model's attention cannot be cut.
        ValueError: The trace was streamed, or as `KnockOutOptions`.
    """
    options = KnockOutOptions(percents=percents, draws=draws, seed=seed)
    example = ScoredExample(tracer=tracer, trace=trace, scores={}, batch_size=batch_size)
    return example_edges(example, options)


def example_edges(example: ScoredExample, options: KnockOutOptions) -> tuple[EdgeKnockOuts, ...]:
    """`knock_out_backbone` for an example that other protocols share."""
    trace, rng = example.trace, example.rng(options.seed)
    flow, attention = np.asarray(trace.flow.edge_flow()), trace.attention
    queries, keys = _inner_edges(trace)
    flows, paid = flow[queries, keys], np.asarray(attention)[queries, keys]
    order = np.argsort(-flows, kind="stable")
    chosen: list[Int[np.ndarray, " edge"]] = []
    for percent in options.percents:
        count = set_size(len(order), percent)
        top, rest = order[:count], order[count:]
        chosen.append(top)
        chosen += [
            _as_heavy(rng.permutation(rest), paid, float(paid[top].sum()))
            for _ in range(options.draws)
        ]
    cut = torch.zeros(len(chosen), *flow.shape, dtype=torch.bool)
    for one, edges in zip(cut, chosen, strict=True):
        one[queries[edges] - _shift(trace), keys[edges]] = True
    with example.bar("set", len(cut)) as tick:
        found = example.baseline.cut_edges(cut, batch_size=example.batch_size, tick=tick)
    drops = found.drop.double().numpy().reshape(len(options.percents), options.draws + 1)
    sizes = np.array([len(edges) for edges in chosen]).reshape(drops.shape)
    masses = np.array([paid[edges].sum() for edges in chosen]).reshape(drops.shape)
    return tuple(
        EdgeKnockOuts(
            percent=percent,
            backbone=float(drop[0]),
            others=float(drop[1:].mean()),
            edges=int(size[0]),
            attention=float(mass[0]),
            other_edges=float(size[1:].mean()),
            other_attention=float(mass[1:].mean()),
        )
        for percent, drop, size, mass in zip(options.percents, drops, sizes, masses, strict=True)
    )


def _lines(trace: FlowTrace) -> tuple[tuple[int, int], ...]:
    """The lines of the response before the answer; a line that holds the answer ends before it."""
    first = int(trace.spans.answer.argmax())
    bounds = ((max(a, trace.spans.prompt_length), min(b, first)) for a, b in trace.outline.bounds)
    return tuple((start, stop) for start, stop in bounds if start < stop)


def _agreement(scores: list[float], drop: Float[np.ndarray, " line"]) -> float | None:
    if len(set(scores)) == 1 or len(set(drop.tolist())) == 1:
        return None
    return float(spearmanr(scores, drop).statistic)


def _inner_edges(
    trace: FlowTrace,
) -> tuple[Int[np.ndarray, " edge"], Int[np.ndarray, " edge"]]:
    """Later and earlier token of the edges in the response up to the answer.

    The row that reads an edge is that of the later token, or of the one before it that decided it;
    a row's edge to itself cannot be cut.
    """
    place, shift = np.arange(len(trace.token_ids)), _shift(trace)
    last = int(np.flatnonzero(trace.spans.answer)[-1])
    later, earlier = (trace.spans.response & (place < end) for end in (last + shift, last))
    queries, keys = np.nonzero(later[:, None] & earlier & (place[:, None] - shift > place))
    return queries, keys


def _shift(trace: FlowTrace) -> int:
    """By how many tokens the row of an edge is before the token that the edge leads into."""
    return 1 if trace.options.rows == "decision" else 0


def _as_heavy(
    edges: Int[np.ndarray, " edge"], paid: Float[np.ndarray, " every"], wanted: float
) -> Int[np.ndarray, " few"]:
    """The first edges that together hold at least the wanted attention."""
    enough = int(np.searchsorted(np.cumsum(paid[edges]), wanted))
    return edges[: enough + 1]
