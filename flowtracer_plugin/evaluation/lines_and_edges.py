"""Knock-outs of whole lines and of single edges: do the flow's steps and ways matter?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import spearmanr

from flowtracer_plugin.credit.token_scores import TOKEN_SCORES, TokenScore, read_text
from flowtracer_plugin.evaluation.faithfulness import checked_scores, set_size
from flowtracer_plugin.evaluation.knockout import cut_edges, knock_out
from flowtracer_plugin.trace.flow_trace import FlowTrace
from flowtracer_plugin.trace.tracer import FlowTracer

FEWEST_LINES = 3
"""Below which their order says nothing."""

Edges = Bool[np.ndarray, "query key"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LineKnockOuts:
    """What each line of a response was worth to its answer.

    Attributes:
        lines: First and last-plus-one token of each line or sentence before the answer.
        drop: Of the answer's mean log-probability without it, in nats per token.
        by_sum: For each score, the rank correlation of the lines' summed scores with `drop`;
            None where one of the two is the same in all lines.
        by_max: The same with the highest score in each line.
    """

    lines: tuple[tuple[int, int], ...]
    drop: tuple[float, ...]
    by_sum: Mapping[str, float | None]
    by_max: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeKnockOuts:
    """What the edges with the most flow were worth, beside others of as much attention.

    Attributes:
        percent: Share of the edges that was cut.
        backbone: Drop of the answer's mean log-probability without them, in nats per token.
        others: Mean drop over draws of other edges.
        edges: How many edges the backbone's share is.
        attention: Their attention, summed over the edges.
        other_edges: How many edges a draw has, on average.
        other_attention: The attention of a draw, on average: never less than `attention`, unless
            all other edges together have less.
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
    """Knock out each line before the answer, and compare with what the scores say of it.

    Raises:
        KnockOutError: The model's attention cannot be cut.
        ValueError: There are fewer than 3 lines, or as `measure_knock_outs`.
    """
    lines = _lines(trace)
    if len(lines) < FEWEST_LINES:
        raise ValueError(
            f"the response has {len(lines)} lines or sentences before the answer, wanted at least "
            f"{FEWEST_LINES} to compare"
        )
    text = read_text(tracer, trace)
    sets = torch.zeros(len(lines), len(trace.token_ids), dtype=torch.bool)
    for row, (start, stop) in zip(sets, lines, strict=True):
        row[start:stop] = True
    ids, answer = torch.from_numpy(trace.token_ids), torch.from_numpy(trace.spans.answer)
    found = knock_out(tracer.model, ids, answer, sets, rows=rows, batch_size=batch_size)
    drop = found.drop.double().numpy()
    values = {name: checked_scores(name, score(text)) for name, score in scores.items()}
    return LineKnockOuts(
        lines=lines,
        drop=tuple(drop.tolist()),
        by_sum={
            name: _agreement([float(score[a:b].sum()) for a, b in lines], drop)
            for name, score in values.items()
        },
        by_max={
            name: _agreement([float(score[a:b].max()) for a, b in lines], drop)
            for name, score in values.items()
        },
    )


def knock_out_backbone(
    tracer: FlowTracer,
    trace: FlowTrace,
    *,
    percents: tuple[int, ...] = (1, 2, 5, 10, 20),
    draws: int = 10,
    seed: int = 0,
    batch_size: int | None = None,
) -> tuple[EdgeKnockOuts, ...]:
    """Cut the edges with the most flow, and draws of other edges with as much attention.

    Edges between tokens of the response count, up to the row that chooses the last answer token.
    Those to the prompt do not: among them are those to the first token, an attention sink, which
    hold much attention and carry little.

    Raises:
        KnockOutError: The model's attention cannot be cut.
        ValueError: The trace was streamed, or `draws` is below 1.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws!r}")
    flow, attention = np.asarray(trace.flow.edge_flow()), trace.attention
    queries, keys = _inner_edges(trace)
    flows, paid = flow[queries, keys], np.asarray(attention)[queries, keys]
    order = np.argsort(-flows, kind="stable")
    rng = np.random.default_rng([seed, *trace.token_ids.tolist()])
    chosen: list[Int[np.ndarray, " edge"]] = []
    for percent in percents:
        count = set_size(len(order), percent)
        top, rest = order[:count], order[count:]
        chosen.append(top)
        chosen += [
            _as_heavy(rng.permutation(rest), paid, float(paid[top].sum())) for _ in range(draws)
        ]
    cut = torch.zeros(len(chosen), *flow.shape, dtype=torch.bool)
    for one, edges in zip(cut, chosen, strict=True):
        one[queries[edges], keys[edges]] = True
    ids, answer = torch.from_numpy(trace.token_ids), torch.from_numpy(trace.spans.answer)
    found = cut_edges(tracer.model, ids, answer, cut, batch_size=batch_size)
    drops = found.drop.double().numpy().reshape(len(percents), draws + 1)
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
        for percent, drop, size, mass in zip(percents, drops, sizes, masses, strict=True)
    )


def _lines(trace: FlowTrace) -> tuple[tuple[int, int], ...]:
    """The steps of the response up to the answer, which the last one may hold."""
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
    place = np.arange(len(trace.token_ids))
    last = int(np.flatnonzero(trace.spans.answer)[-1])
    inner = trace.spans.response & (place < last)
    queries, keys = np.nonzero(inner[:, None] & inner & (place[:, None] > place))
    return queries, keys


def _as_heavy(
    edges: Int[np.ndarray, " edge"], paid: Float[np.ndarray, " every"], wanted: float
) -> Int[np.ndarray, " few"]:
    """The first edges that together hold as much attention as is wanted."""
    enough = int(np.searchsorted(np.cumsum(paid[edges]), wanted))
    return edges[: enough + 1]
