"""The flow of one text and its backbone, from attention that comes in blocks of rows.

Two passes see each block once: the first runs from the end for reach and the likeliest paths, the
second from the beginning for throughput and the edges. No block is needed after that, so no matrix
of all pairs of tokens exists unless the blocks are cut from one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowtracer_plugin.flow.backbone import (
    KEPT_EDGES,
    KEPT_PATHS,
    Backbone,
    Outline,
    StrongEdges,
    bin_starts,
)
from flowtracer_plugin.flow.likely_paths import LikelyPaths
from flowtracer_plugin.flow.solve import Nodes, into_sink, passing_tokens, solve_nodes, unit_of
from flowtracer_plugin.flow.substitution import BLOCK, Rows, Visit, stored, substitute
from flowtracer_plugin.flow.torch_arrays import sent


def stream_flow(
    rows: Rows,
    question: Bool[Tensor, " token"],
    target: Bool[Tensor, " token"],
    outline: Outline,
    *,
    dtype: torch.dtype = torch.float32,
    question_weights: str = "uniform",
    boundary: str = "literal",
    block: int = BLOCK,
    paths: int = KEPT_PATHS,
    edges: int = KEPT_EDGES,
) -> tuple[Nodes, Backbone]:
    """Reach, throughput and backbone, as numpy arrays; nothing checks that `rows` are attention.

    Args:
        rows: Blocks of the attention, on the device of the masks; each is read twice.
        question: The tokens at which the unit is injected.
        target: The tokens at which the flow ends.
        outline: The parts of the text for which the backbone sums the flow.
        dtype: Dtype of the rows.
        question_weights: As for `solve_flow`.
        boundary: As for `solve_flow`.
        block: Rows that are in memory at a time.
        paths: How many of the likeliest paths are kept.
        edges: How many edges into, and out of, each token are kept.

    Raises:
        ValueError: No token at which flow would be injected reaches the target.
        FloatingPointError: As for `solve_flow`.
    """
    # No flow passes the last target, so these rows are never read.
    length = int(target.cumsum(0).argmax()) + 1
    total, question, target = len(target), question[:length], target[:length]
    passing = passing_tokens(target, boundary)
    likely = LikelyPaths(target, passing, paths, dtype)
    sums = _EdgeSums(torch.zeros_like(target, dtype=dtype), passing, outline, edges, total)

    def forwards(reach: Float[Tensor, " token"]) -> Visit:
        sums.reach = reach
        return sums.visit

    summed = question_weights == "origins"
    passes = _TwoPasses(rows, block, passing, likely.visit, forwards, summed=summed)
    nodes = solve_nodes(
        passes.solve,
        question,
        target,
        passing,
        passes.row_sums,
        dtype=dtype,
        question_weights=question_weights,
        zero=False,
    )
    sink = into_sink(target, nodes.reach, nodes.throughput)
    names = ("reach", "throughput", "source", "potential")
    by_token = {name: getattr(nodes, name) for name in names}
    host: dict[str, Any] = _on_host({**by_token, "sink": sink, **sums.by_token(nodes, sink)}, total)
    padded = {name: host.pop(name) for name in names}
    backbone = Backbone(
        question_reached=int(nodes.question_reached),
        source=padded["source"],
        paths=likely.likeliest(nodes.source, sums.reach, unit_of(torch.finfo(dtype))),
        **host,
        **sums.by_edge(),
    )
    return nodes._replace(**padded), backbone


def stream_stored(
    attention: Float[np.ndarray, "query key"] | Float[Tensor, "query key"],
    question: Bool[np.ndarray, " token"],
    target: Bool[np.ndarray, " token"],
    outline: Outline,
    **options: Any,
) -> Backbone:
    """The backbone of attention that is in memory; `options` are those of `stream_flow`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # only read
        matrix, *masks = map(torch.as_tensor, (attention, question, target))
    inject, end = (sent(mask, matrix.device) for mask in masks)
    return stream_flow(stored(matrix), inject, end, outline, dtype=matrix.dtype, **options)[1]


def stream_batch(
    rows: Rows,
    question: Bool[Tensor, "batch token"],
    target: Bool[Tensor, "batch token"],
    prompt: Bool[Tensor, "batch token"],
    *,
    question_weights: str = "uniform",
    boundary: str = "literal",
    block: int = BLOCK,
) -> tuple[Nodes, Float[Tensor, "batch token"]]:
    """Reach and throughput of several texts, and the flow that enters each token from the prompt.

    A text without a target, or whose question does not reach it, carries no flow.
    """
    entered = torch.zeros_like(target, dtype=torch.float32)
    passing = passing_tokens(target, boundary)
    sending = prompt if passing is None else prompt & passing

    def forwards(reach: Float[Tensor, "batch token"]) -> Visit:
        def visit(start: int, stop: int, part: Tensor, potential: Tensor) -> None:
            leaving = potential[:, :stop].where(sending[:, :stop], 0)
            arriving = reach[:, start:stop].where(potential[:, start:stop] > 0, 0)
            paid = (leaving[:, None] @ part.tril(start - 1).mT)[:, 0]
            entered[:, start:stop] = arriving * paid

        return visit

    summed = question_weights == "origins"
    passes = _TwoPasses(rows, block, passing, None, forwards, summed=summed)
    nodes = solve_nodes(
        passes.solve,
        question,
        target,
        passing,
        passes.row_sums,
        dtype=torch.float32,
        question_weights=question_weights,
        zero=True,
    )
    return nodes, entered


class _TwoPasses:
    """The `solve` of `solve_nodes`, which lets `backwards` and then `forwards` see the blocks.

    `forwards` is called with the reach that the first pass has found.
    """

    def __init__(
        self,
        rows: Rows,
        block: int,
        passing: Bool[Tensor, "*batch token"] | None,
        backwards: Visit | None,
        forwards: Callable[[Tensor], Visit],
        *,
        summed: bool,
    ) -> None:
        self._rows, self._block, self._passing, self._summed = rows, block, passing, summed
        self._backwards, self._forwards = backwards, forwards
        self._reach, self._sums = torch.zeros(0), torch.zeros(0)

    def solve(self, rhs: Tensor, *, transposed: bool, **masks: Any) -> Tensor:
        """The solution of the first (`transposed`) or of the second pass."""
        if transposed:
            self._sums = torch.zeros_like(rhs)
            visit: Visit = self._first
        else:
            visit = self._forwards(self._reach.where(masks["queries"], 0))
        solution: Tensor = substitute(
            self._rows, rhs, transposed=transposed, block=self._block, visit=visit, **masks
        )
        if transposed:
            self._reach = solution
        return solution

    def row_sums(self) -> Float[Tensor, "*batch token"]:
        """The sum of all edges into each token, which the first pass has found if `summed`."""
        return self._sums

    def _first(self, start: int, stop: int, part: Tensor, solution: Tensor) -> None:
        if self._summed:
            before = part.tril(start - 1)
            if self._passing is not None:
                before = before * self._passing[..., None, :stop]
            self._sums[..., start:stop] = before.sum(-1)
        if self._backwards is not None:
            self._backwards(start, stop, part, solution)


def _on_host(
    values: Mapping[str, Float[Tensor, " token"]], length: int
) -> dict[str, Float[np.ndarray, " longer"]]:
    """All values in one copy, with zeros for the tokens after the last target."""
    rows = torch.stack(list(values.values())).cpu().numpy()
    padded = np.pad(rows, ((0, 0), (0, length - rows.shape[1])))
    return dict(zip(values, padded, strict=True))


class _EdgeSums:
    """Sums over the edges, each of which is seen once, in the pass from the beginning."""

    def __init__(
        self,
        like: Float[Tensor, " token"],
        passing: Bool[Tensor, " token"] | None,
        outline: Outline,
        kept: int,
        total: int,
    ) -> None:
        length, kept = len(like), min(kept, len(like))
        self.reach, self._passing, self._total, self._kept = like, passing, total, kept
        self._prompt = outline.prompt_length
        self._entering = torch.zeros_like(like)  # entropy of the shares
        self._leaving = torch.zeros_like(like)
        self._from_prompt = torch.zeros_like(like)
        own = torch.arange(length, device=like.device)[:, None].repeat(1, kept)
        self._sources = like.new_zeros(length, kept), own
        self._targets = like.new_zeros(length, kept), own.clone()
        self._steps = _PartSums([start for start, _ in outline.bounds], total, like)
        self._bins = _PartSums(bin_starts(total, self._prompt).tolist(), total, like)
        # Summing over tokens takes long: sum once between all starts of steps and of bins.
        cuts = sorted({*self._steps.starts, *self._bins.starts})
        self._part = _numbers(cuts, total, like.device)
        self._parts = sent(cuts, like.device)

    def visit(
        self, start: int, stop: int, part: Float[Tensor, "row key"], potential: Tensor
    ) -> None:
        """Take a block of rows, whose potential has just become known."""
        potential = potential[:stop]
        through = self.reach[:stop] * potential
        arriving = self.reach[start:stop].where(potential[start:] > 0, 0)
        leaving = potential if self._passing is None else potential.where(self._passing[:stop], 0)
        flow = (part * arriving[:, None]).mul_(leaving).tril_(start - 1)
        self._from_prompt[start:stop] = flow[:, : self._prompt].sum(1)
        self._entering[start:stop] = _entropy(flow, through[start:, None], 1)
        self._leaving[:stop] += _entropy(flow, through, 0)
        self._keep_sources(start, stop, flow)
        self._keep_targets(start, stop, flow)
        columns = flow.new_zeros(len(flow), len(self._parts))
        columns.index_add_(1, self._part[:stop], flow)
        for sums in (self._steps, self._bins):
            sums.add(start, stop, columns, self._parts)

    def _keep_sources(self, start: int, stop: int, flow: Float[Tensor, "row key"]) -> None:
        kept, token = flow.topk(min(self._kept, stop))
        self._store(self._sources, slice(start, stop), kept, token)

    def _keep_targets(self, start: int, stop: int, flow: Float[Tensor, "row key"]) -> None:
        """Keep the strongest edges of the earlier blocks and this one."""
        new, row = flow.topk(min(self._kept, len(flow)), dim=0)
        flows, tokens = self._targets
        flows, tokens = (
            torch.cat([flows[:stop], new.T], 1),
            torch.cat([tokens[:stop], row.T + start], 1),
        )
        kept, place = flows.topk(self._kept)
        self._store(self._targets, slice(stop), kept, tokens.gather(1, place))

    def _store(
        self, edges: tuple[Tensor, Tensor], where: slice, flow: Tensor, token: Tensor
    ) -> None:
        own = torch.arange(len(edges[0]), device=token.device)[where, None]
        edges[0][where, : flow.shape[1]] = flow
        edges[1][where, : flow.shape[1]] = token.where(flow > 0, own)

    def by_token(
        self, nodes: Nodes, sink: Float[Tensor, " token"]
    ) -> dict[str, Float[Tensor, " token"]]:
        """The sums for each token, by the names of a backbone's fields."""
        through = nodes.throughput
        leaving = self._leaving + _entropy(sink[None], through, 0)
        entering = self._entering + _entropy(nodes.source[None], through, 0)
        return {
            "hubs": through * leaving.exp(),
            "checkpoints": through * entering.exp(),
            "prompt_inflow": self._from_prompt,
        }

    def by_edge(self) -> dict[str, Any]:
        """The strongest edges and the sums over edges, on the host, by the same names."""
        kept = self._sources, self._targets
        flows, tokens = (torch.stack(both).cpu().numpy() for both in zip(*kept, strict=True))
        sources, targets = map(self._strong, flows, tokens)
        steps, bins = self._steps.between(), self._bins.between()
        return {"sources": sources, "targets": targets, "steps": steps, "bins": bins}

    def _strong(
        self, flow: Float[np.ndarray, "token kept"], token: Int[np.ndarray, "token kept"]
    ) -> StrongEdges:
        rest = np.arange(len(flow), self._total)[:, None].repeat(self._kept, 1)
        return StrongEdges(
            token=np.concatenate([token, rest]),
            flow=np.concatenate([flow, np.zeros_like(rest, flow.dtype)]),
        )


class _PartSums:
    """The flow between parts of the text that begin at certain tokens."""

    def __init__(self, starts: list[int], total: int, like: Tensor) -> None:
        self.starts = starts
        self._number = _numbers(starts, total, like.device)
        self._sums = like.new_zeros(len(starts), len(starts))

    def add(
        self,
        start: int,
        stop: int,
        columns: Float[Tensor, "row smaller"],
        smaller: Int[Tensor, " smaller"],
    ) -> None:
        """Add the rows of the tokens `start` to `stop`, summed over the parts from `smaller`."""
        rows = columns.new_zeros(len(columns), len(self._sums))
        rows.index_add_(1, self._number[smaller], columns)
        self._sums.index_add_(0, self._number[start:stop], rows)

    def between(self) -> Float[np.ndarray, "part part"]:
        """The flow from each part to each other one, without the flow inside a part."""
        return self._sums.fill_diagonal_(0).cpu().numpy()


def _numbers(starts: list[int], total: int, device: torch.device) -> Int[Tensor, " token"]:
    """The number of the part in which each token lies; the parts begin at `starts`."""
    sizes = np.diff([*starts, total])
    return sent(np.arange(len(starts)).repeat(sizes), device)


def _entropy(flow: Tensor, whole: Tensor, over: int) -> Tensor:
    """The entropy of the flows' shares in a whole, summed along the axis `over`."""
    shares = flow / whole.where(whole > 0, 1)
    return torch.special.entr(shares).sum(over)
