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
        self._target, self._passing, self._count = target.cpu().numpy(), passing, count
        # For each token the log probabilities of its paths, the best first. A path continues at the
        # token `_next` with the path that has the rank `_rank` there.
        self._best = torch.full((length, count), -torch.inf, dtype=dtype, device=device)
        self._next = torch.full((length, count), -1, device=device)
        self._rank = torch.zeros(length, count, dtype=torch.long, device=device)

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
        inside = slice(start, stop)
        state = self._best[inside], self._next[inside], self._rank[inside]
        best, following, rank = (part.cpu().numpy() for part in state)
        square, count = logs.cpu().numpy(), self._count
        for token in reversed(range(stop - start)):
            inner = (square[token + 1 :, token, None] + best[token + 1 :]).ravel()
            sink = 0.0 if self._target[start + token] else -np.inf
            values = np.concatenate([best[token], [sink], inner])
            chosen = _largest(values, count)
            row, place = np.divmod(chosen - count - 1, count)
            new, beyond = chosen > count, chosen < count
            old = np.where(beyond, chosen, 0)
            following[token] = np.where(
                new, start + token + 1 + row, np.where(beyond, following[token][old], -1)
            )
            rank[token] = np.where(new, place, np.where(beyond, rank[token][old], 0))
            best[token] = values[chosen]
        for kept, found in zip(state, (best, following, rank), strict=True):
            kept.copy_(torch.from_numpy(found))

    def _push(self, start: int, stop: int, logs: Float[Tensor, "row key"]) -> None:
        """Offer the block's paths to all earlier tokens."""
        best = self._best[start:stop]
        # A token whose best path is not among the best has no other path among them.
        few = min(self._count, stop - start)
        row = (logs + best[:, :1]).topk(few, dim=0).indices
        offered = (logs.gather(0, row)[..., None] + best[row]).transpose(0, 1).flatten(1)
        known = self._best[:start], self._next[:start], self._rank[:start]
        rank = torch.arange(self._count, device=row.device).repeat(few).expand_as(offered)
        following = (start + row.T).repeat_interleave(self._count, 1)
        kept, place = torch.cat([known[0], offered], 1).topk(self._count)
        for old, new in ((known[1], following), (known[2], rank)):
            old.copy_(torch.cat([old, new], 1).gather(1, place))
        known[0].copy_(kept)

    def likeliest(
        self, source: Float[Tensor, " token"], reach: Float[Tensor, " token"], unit: float
    ) -> tuple[FlowPath, ...]:
        """The likeliest paths from where flow is injected; `reach` is scaled by `unit`."""
        # Not reach / unit, which may be too small for the dtype.
        starts = source.log() - reach.where(reach > 0, 1).log() + math.log(unit)
        totals = (starts[:, None] + self._best).flatten().cpu().numpy()
        following, rank = self._next.cpu().numpy(), self._rank.cpu().numpy()
        return tuple(
            FlowPath(
                tokens=_follow(following, rank, *divmod(int(first), self._count)),
                probability=float(np.exp(totals[first])),
            )
            for first in _largest(totals, self._count)
            if np.isfinite(totals[first])
        )


def _largest(values: Float[np.ndarray, " candidate"], count: int) -> Int[np.ndarray, " chosen"]:
    """Indices of the `count` largest values, in descending order."""
    few = np.argpartition(-values, min(count, len(values)) - 1)[:count]
    return few[np.argsort(-values[few], kind="stable")]


def _follow(
    following: Int[np.ndarray, "token place"],
    rank: Int[np.ndarray, "token place"],
    token: int,
    place: int,
) -> tuple[int, ...]:
    tokens = []
    while token >= 0:
        tokens.append(token)
        token, place = int(following[token, place]), int(rank[token, place])
    return tuple(tokens)
