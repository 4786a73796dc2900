"""The likeliest paths to the answer, found in blocks from last to first."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowtracer_plugin.flow.backbone import FlowPath


class LikelyPaths:
    """The likeliest paths from every token to the sink, by exact dynamic programming.

    The share of an edge is `L[k, i] h(k) / h(i)`, so along a path all reaches except the first
    cancel: products of attention are compared, and no reach has to be known.

    Args:
        target: The tokens at which paths end.
        passing: The tokens that paths may leave for a later token; None for all.
        count: How many paths are kept for each token.
        dtype: Dtype of the rows.
    """

    def __init__(
        self,
        target: Bool[Tensor, " token"],
        passing: Bool[Tensor, " token"] | None,
        count: int,
        dtype: torch.dtype,
    ) -> None:
        length, device = len(target), target.device
        self._passing, self._count = passing, count
        # For each token the log probabilities of its paths, the best first. The path with the rank
        # r at the token t has the number t * count + r; `_next` is the number of the path that
        # remains after the first step, or -1 if that step leads to the sink.
        self._best = torch.full((length, count), -torch.inf, dtype=dtype, device=device)
        self._next = torch.full((length, count), -1, device=device)
        self._numbers = torch.arange(length * count, device=device).view(length, count)
        ends = torch.zeros(length, 1, dtype=dtype, device=device)
        self._ends = ends.masked_fill_(~target[:, None], -torch.inf)

    def visit(
        self, start: int, stop: int, part: Float[Tensor, "row key"], _potential: Tensor
    ) -> None:
        """Use a block of rows; the blocks of all later tokens have been used before."""
        logs = part.log()
        if self._passing is not None:
            logs.masked_fill_(~self._passing[:stop], -torch.inf)
        self._within(start, stop, logs[:, start:])
        if start:
            self._push(start, stop, logs[:, :start])

    def _within(self, start: int, stop: int, logs: Float[Tensor, "row row"]) -> None:
        """Find the paths of the block's tokens, from the last token to the first."""
        inside, sink = slice(start, stop), self._next.new_full((1,), -1)
        columns, numbers = logs.mT.contiguous().unbind(), self._numbers[inside].flatten()
        # Views of each token's row, made at once: indexing takes as long as the arithmetic.
        best, following = self._best[inside].unbind(), self._next[inside].unbind()
        ends = self._ends[inside].unbind()
        for token in reversed(range(stop - start)):
            later = token + 1
            inner = columns[token][later:, None] + self._best[start + later : stop]
            values = torch.cat([best[token], ends[token], inner.flatten()])
            whose = torch.cat([following[token], sink, numbers[later * self._count :]])
            kept, place = values.topk(self._count)
            best[token].copy_(kept)
            torch.index_select(whose, 0, place, out=following[token])

    def _push(self, start: int, stop: int, logs: Float[Tensor, "row key"]) -> None:
        """Offer the block's paths to all earlier tokens."""
        best = self._best[start:stop]
        # A token whose best path is not among the best has no other path among them.
        few = min(self._count, stop - start)
        row = (logs + best[:, :1]).topk(few, dim=0).indices
        offered = (logs.gather(0, row)[..., None] + best[row]).transpose(0, 1).flatten(1)
        ranks = torch.arange(self._count, device=row.device)
        numbers = ((start + row.T)[..., None] * self._count + ranks).flatten(1)
        known, following = self._best[:start], self._next[:start]
        kept, place = torch.cat([known, offered], 1).topk(self._count)
        following.copy_(torch.cat([following, numbers], 1).gather(1, place))
        known.copy_(kept)

    def likeliest(
        self, source: Float[Tensor, " token"], reach: Float[Tensor, " token"], unit: float
    ) -> tuple[FlowPath, ...]:
        """The likeliest paths from where flow is injected; `reach` is scaled by `unit`."""
        # Not reach / unit, which may be too small for the dtype.
        starts = source.log() - reach.where(reach > 0, 1).log() + math.log(unit)
        totals, first = (starts[:, None] + self._best).flatten().topk(self._count)
        following = self._next.flatten().cpu().numpy()
        likely = zip(totals.tolist(), first.tolist(), strict=True)
        return tuple(
            FlowPath(tokens=self._follow(following, path), probability=math.exp(total))
            for total, path in likely
            if math.isfinite(total)
        )

    def _follow(self, following: Int[np.ndarray, " path"], path: int) -> tuple[int, ...]:
        """The tokens of a path, given what remains of each path after its first step."""
        tokens = []
        while path >= 0:
            tokens.append(path // self._count)
            path = int(following[path])
        return tuple(tokens)
