"""The flow of one text and what stands out in it, from attention that comes in blocks of rows.

Two passes see each block once: from the end for reach and the likeliest paths, from the beginning
for throughput and the edges. A block has served when it has been seen, so that no matrix of all
pairs of tokens exists, unless it is what the blocks are cut from.
"""

from __future__ import annotations

import warnings
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
from flowtracer_plugin.flow.solve import Nodes, into_sink, solve_nodes, unit_of
from flowtracer_plugin.flow.substitution import BLOCK, Rows, Visit, stored, substitute


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
    """Reach, throughput and backbone, in numpy; `rows` are trusted to be attention.

    Args:
        rows: Blocks of the attention, on the device of the masks; each is asked for twice.
        question: Where the unit is injected.
        target: Where it ends.
        outline: What else the backbone says is about.
        dtype: Of the rows.
        question_weights: As for `solve_flow`.
        boundary: As for `solve_flow`.
        block: Rows that are there at a time.
        paths: How many of the likeliest paths are kept.
        edges: How many edges into, and out of, each token are kept.

    Raises:
        ValueError: No question token reaches the target.
        FloatingPointError: As `solve_flow`.
    """
    # After the last target there is no flow, so these rows are never asked for.
    length = int(target.nonzero().max()) + 1
    total, question, target = len(target), question[:length], target[:length]
    passes = _Passes(rows, target, outline, dtype, block, paths, edges, boundary, total)
    nodes = solve_nodes(
        passes.solve,
        question,
        target,
        dtype=dtype,
        question_weights=question_weights,
        boundary=boundary,
        zero=False,
    )
    backbone = passes.backbone(nodes)
    padded = {
        name: _padded(getattr(nodes, name), total)
        for name in ("reach", "throughput", "source", "potential")
    }
    return nodes._replace(**padded), backbone


def stream_stored(
    attention: Float[np.ndarray, "query key"],
    question: Bool[np.ndarray, " token"],
    target: Bool[np.ndarray, " token"],
    outline: Outline,
    **options: Any,
) -> Backbone:
    """The backbone of attention that lies in memory."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor written to
        matrix, inject, end = map(torch.from_numpy, (attention, question, target))
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

    Texts without target, or whose question does not reach it, carry no flow.
    """
    entered, reach = torch.zeros_like(target, dtype=torch.float32), torch.zeros(0)
    passing = ~target if boundary == "absorbing" else torch.ones_like(target)

    def visit(start: int, stop: int, part: Tensor, potential: Tensor) -> None:
        leaving = potential[:, :stop].where(passing[:, :stop] & prompt[:, :stop], 0)
        arriving = reach[:, start:stop].where(potential[:, start:stop] > 0, 0)
        paid = (leaving[:, None] @ part.tril(start - 1).mT)[:, 0]
        entered[:, start:stop] = arriving * paid

    def solve(rhs: Tensor, *, transposed: bool, **masks: Any) -> Tensor:
        nonlocal reach
        if not transposed:
            reach = reach.where(masks["queries"], 0)
        solution = substitute(
            rows,
            rhs,
            transposed=transposed,
            block=block,
            visit=None if transposed else visit,
            **masks,
        )
        if transposed:
            reach = solution
        return solution

    nodes = solve_nodes(
        solve,
        question,
        target,
        dtype=torch.float32,
        question_weights=question_weights,
        boundary=boundary,
        zero=True,
    )
    return nodes, entered


def _padded(values: Tensor, length: int) -> Float[np.ndarray, " token"]:
    """With zeros for the tokens after the last target."""
    return np.pad(values.cpu().numpy(), (0, length - len(values)))


class _Passes:
    """The two substitutions of one flow, and what they gather on their way."""

    def __init__(
        self,
        rows: Rows,
        target: Bool[Tensor, " token"],
        outline: Outline,
        dtype: torch.dtype,
        block: int,
        paths: int,
        edges: int,
        boundary: str,
        total: int,
    ) -> None:
        self._rows, self._block, self._total = rows, block, total
        self._target, self._outline, self._edges = target, outline, edges
        self._passing = ~target if boundary == "absorbing" else None
        self._paths = LikelyPaths(target, self._passing, paths, dtype)
        self._reach = torch.zeros_like(target, dtype=dtype)
        self._sums: _EdgeSums | None = None

    def solve(self, rhs: Float[Tensor, " token"], *, transposed: bool, **masks: Any) -> Tensor:
        """As `solve_nodes` wants it: first from the end, then from the beginning."""
        visit: Visit = self._paths.visit
        if not transposed:
            self._reach = reach = self._reach.where(masks["queries"], 0)
            self._sums = _EdgeSums(
                reach, self._passing, self._outline, min(self._edges, len(reach)), self._total
            )
            visit = self._sums.visit
        solution = substitute(
            self._rows, rhs, transposed=transposed, block=self._block, visit=visit, **masks
        )
        if transposed:
            self._reach = solution
        return solution

    def backbone(self, nodes: Nodes) -> Backbone:
        assert self._sums is not None, "solve_nodes solves twice"
        sink = into_sink(self._target, nodes.reach, nodes.throughput)
        unit = unit_of(torch.finfo(self._reach.dtype))
        return Backbone(
            question_reached=int(nodes.question_reached),
            source=_padded(nodes.source, self._total),
            sink=_padded(sink, self._total),
            paths=self._paths.likeliest(nodes.source, self._reach, unit),
            **self._sums.found(nodes, sink),
        )


class _EdgeSums:
    """What is known of the edges when each has been seen once, in the forward pass."""

    def __init__(
        self,
        reach: Float[Tensor, " token"],
        passing: Bool[Tensor, " token"] | None,
        outline: Outline,
        kept: int,
        total: int,
    ) -> None:
        length, like = len(reach), reach
        self._reach, self._passing, self._total, self._kept = reach, passing, total, kept
        self._prompt = outline.prompt_length
        self._entering = torch.zeros_like(like)  # entropy of the shares
        self._leaving = torch.zeros_like(like)
        self._from_prompt = torch.zeros_like(like)
        self._sources = like.new_zeros(length, kept), _themselves(length, kept, like.device)
        self._targets = like.new_zeros(length, kept), _themselves(length, kept, like.device)
        self._steps = _PartSums([start for start, _ in outline.bounds], total, like)
        self._bins = _PartSums(bin_starts(total, self._prompt).tolist(), total, like)
        # Summing over tokens takes long, so it is done once, for parts of both.
        cuts = sorted({*self._steps.starts, *self._bins.starts})
        self._part = _numbers(cuts, total, like.device)
        self._parts = torch.tensor(cuts, device=like.device)

    def visit(
        self, start: int, stop: int, part: Float[Tensor, "row key"], potential: Tensor
    ) -> None:
        """Take a block of rows, whose potential has just become known."""
        potential = potential[:stop]
        through = self._reach[:stop] * potential
        arriving = self._reach[start:stop].where(potential[start:] > 0, 0)
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
        """The strongest of those that were kept of earlier blocks, and of this one."""
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

    def found(self, nodes: Nodes, sink: Float[Tensor, " token"]) -> dict[str, Any]:
        """The sums as fields of a backbone."""
        through = nodes.throughput
        leaving = self._leaving + _entropy(sink[None], through, 0)
        entering = self._entering + _entropy(nodes.source[None], through, 0)
        return {
            "hubs": _padded(through * leaving.exp(), self._total),
            "checkpoints": _padded(through * entering.exp(), self._total),
            "prompt_inflow": _padded(self._from_prompt, self._total),
            "sources": self._strong(self._sources),
            "targets": self._strong(self._targets),
            "steps": self._steps.between(),
            "bins": self._bins.between(),
        }

    def _strong(self, edges: tuple[Tensor, Tensor]) -> StrongEdges:
        flow, token = (part.cpu().numpy() for part in edges)
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
        """Take the rows of tokens `start` to `stop`, summed over parts that begin at `smaller`."""
        rows = columns.new_zeros(len(columns), len(self._sums))
        rows.index_add_(1, self._number[smaller], columns)
        self._sums.index_add_(0, self._number[start:stop], rows)

    def between(self) -> Float[np.ndarray, "part part"]:
        """Without what stays inside a part."""
        return self._sums.fill_diagonal_(0).cpu().numpy()


def _numbers(starts: list[int], total: int, device: torch.device) -> Int[Tensor, " token"]:
    """Which of the parts that begin at `starts` each token lies in."""
    sizes = torch.tensor([*starts, total], device=device).diff()
    return torch.arange(len(starts), device=device).repeat_interleave(sizes)


def _themselves(length: int, count: int, device: torch.device) -> Int[Tensor, "token count"]:
    return torch.arange(length, device=device)[:, None].repeat(1, count)


def _entropy(flow: Tensor, whole: Tensor, over: int) -> Tensor:
    """Of the shares that flows have in a whole."""
    shares = flow / whole.where(whole > 0, 1)
    return torch.special.entr(shares).sum(over)
