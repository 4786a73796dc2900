"""What one forward pass attended to, added up call by call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from flowtracer_plugin.attention.adapter import (
    AttentionAdapter,
    AttentionCall,
    AttentionSite,
    AttentionWeights,
)
from flowtracer_plugin.attention.head_mean import add_head_mean
from flowtracer_plugin.attention.value_lengths import Projections, value_lengths
from flowtracer_plugin.model.parallel import average_heads


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Reading:
    """What one forward pass attended to.

    Attributes:
        attention: Mean over layers and heads, float32, rows and columns of padding zero; None if it
            was not asked for.
        calls: Of the layers, in the order of execution; none unless they were asked for.
        lengths: Of each call's values; none unless they were asked for.
        seconds: That reading took, beside the forward pass. On a GPU: until it was under way.
    """

    attention: Float[Tensor, "batch query key"] | None
    calls: tuple[AttentionCall | AttentionWeights, ...] = ()
    lengths: tuple[Float[Tensor, "batch _ _"], ...] = ()
    seconds: float = 0.0

    @property
    def mean(self) -> Float[Tensor, "batch query key"]:
        """The attention, of a reading that was asked for it."""
        assert self.attention is not None, "read with average=True"
        return self.attention


class ReadingSum:
    """The attention of one forward pass, as it comes.

    Args:
        model: Whose it is.
        adapter: How each call is read.
        shape: Of the map: batch, queries, keys.
        device: Where the map is.
        sites: How many calls will come.
        block: Query rows that are computed at a time.
        heads: Restricts layers to some query heads.
        keep: Whether the calls are kept.
        projections: If lengths of values are wanted, what they go through.
        average: Whether the mean is wanted at all: without it no map of all pairs is made.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: AttentionAdapter,
        shape: Sequence[int],
        device: torch.device,
        *,
        sites: int,
        block: int,
        heads: Mapping[int, Int[Tensor, " chosen"]] | None = None,
        keep: bool = False,
        projections: Projections | None = None,
        average: bool = True,
    ) -> None:
        self._model, self._adapter, self._block = model, adapter, block
        self._missing, self._share = sites, 1 / sites
        self._total: Tensor | None = None
        if average:
            self._total = torch.zeros(*shape, dtype=torch.float32, device=device)
        self._heads, self._keep, self._seconds = heads or {}, keep, 0.0
        self._calls: list[AttentionCall | AttentionWeights] = []
        self._projections, self._lengths = projections, list[Float[Tensor, "batch _ _"]]()
        self._error: Exception | None = None

    @property
    def complete(self) -> bool:
        """Whether all calls have come."""
        return not self._missing

    @torch.no_grad()
    def receive(self, site: AttentionSite, args: Any, kwargs: Any, _output: Any) -> None:
        """Add one call.

        What goes wrong waits for `reading`: a forward pass that other processes take part in, or
        that trains, goes to its end.
        """
        started = perf_counter()
        try:
            if self._error is None:
                self._add(site, args, kwargs)
        except Exception as error:  # noqa: BLE001 - raised in `reading`
            self._error = error
        self._missing -= 1
        self._seconds += perf_counter() - started

    def _add(self, site: AttentionSite, args: Any, kwargs: Any) -> None:
        call = self._adapter.read(self._model.get_submodule(site.module), args, kwargs)
        if self._total is not None:
            heads = self._heads.get(site.layer)
            add_head_mean(call, self._total, weight=self._share, heads=heads, block=self._block)
        if self._keep:
            self._calls.append(call)
        if self._projections is not None:
            self._lengths.append(value_lengths(call, self._projections[site]))

    def reading(self, seen: Bool[Tensor, "batch key"]) -> Reading:
        """The sum, without rows and columns of padding; it is not to be added to any more.

        Raises whatever went wrong in a call.
        """
        total = self._total
        if total is not None:
            average_heads(self._model, total)  # also where it failed: the others wait for it
        if self._error is not None:
            raise self._error
        if total is not None:
            seen = seen.to(total.device)
            rows = ~seen[:, -total.shape[1] :]  # filled, not multiplied: 0 times NaN is NaN
            total.masked_fill_(rows[:, :, None], 0).masked_fill_(~seen[:, None, :], 0)
        return Reading(
            attention=total,
            calls=tuple(self._calls),
            lengths=tuple(self._lengths),
            seconds=self._seconds,
        )
