"""The attention of one forward pass, added up call by call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from flowtracer_plugin.attention.adapter import (
    AttentionAdapter,
    AttentionCall,
    AttentionSite,
    AttentionWeights,
)
from flowtracer_plugin.attention.head_mean import add_head_mean, add_weighed_mean, keep_sums
from flowtracer_plugin.attention.value_lengths import Projections, value_lengths
from flowtracer_plugin.flow.torch_arrays import sent
from flowtracer_plugin.model.parallel import average_heads


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What a `Reading` must hold.

    Attributes:
        keep: Whether it holds the calls.
        projections: The linear maps of the values, if attention is weighed by the values' lengths.
        sizes: Further factors of each call's heads and rows, such as their influence.
        average: Whether it holds the mean. Without it, no map of all pairs of tokens is made.
    """

    keep: bool = False
    projections: Projections | None = None
    sizes: Sequence[Float[Tensor, "batch _ _"]] = ()
    average: bool = True

    def rows(self, rows: slice) -> Wanted:
        """The same for some of the texts."""
        return replace(self, sizes=[size[rows] for size in self.sizes])


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Reading:
    """The attention that was read in one forward pass.

    Attributes:
        attention: Mean over layers and heads, float32, with 0 in rows and columns of padding; None
            unless it was asked for. Where it is weighed, rows have the sums of the plain mean.
        calls: The attention calls in the order of execution; empty unless they were asked for.
        lengths: The lengths of each call's values, if it holds calls that are weighed by them.
        seconds: Time spent on reading, without the forward pass. On a GPU, the time to start it.
    """

    attention: Float[Tensor, "batch query key"] | None
    calls: tuple[AttentionCall | AttentionWeights, ...] = ()
    lengths: tuple[Float[Tensor, "batch _ _"], ...] = ()
    seconds: float = 0.0

    @property
    def mean(self) -> Float[Tensor, "batch query key"]:
        """The attention, in a reading that was asked for it."""
        assert self.attention is not None, "read with average=True"
        return self.attention


class ReadingSum:
    """Builds the `Reading` of one forward pass, call by call.

    Args:
        model: The model that runs.
        adapter: Reads each call.
        shape: Shape of the map: batch, queries, keys.
        device: Device of the map.
        sites: Number of calls to come.
        block: Query rows that are computed at a time.
        wanted: What the reading must hold.
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
        wanted: Wanted,
    ) -> None:
        self._model, self._adapter, self._block, self._wanted = model, adapter, block, wanted
        self._missing, self._share = sites, 1 / sites
        self._total: Tensor | None = None
        if wanted.average:
            self._total = torch.zeros(*shape, dtype=torch.float32, device=device)
        # Of the plain mean's rows, which a weighed mean keeps.
        self._sums = torch.zeros(*shape[:2], dtype=torch.float32, device=device)
        self._calls: list[AttentionCall | AttentionWeights] = []
        self._lengths: list[Float[Tensor, "batch _ _"]] = []
        self._seconds = 0.0
        self._error: Exception | None = None

    @property
    def complete(self) -> bool:
        """Whether all calls have come."""
        return not self._missing

    @torch.no_grad()
    def receive(self, site: AttentionSite, args: Any, kwargs: Any, _output: Any) -> None:
        """Add one call.

        An error waits until `reading`: a forward pass that trains, or that other processes take
        part in, must go to its end.
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
        lengths = None
        if self._wanted.projections is not None:
            lengths = value_lengths(call, self._wanted.projections[site])
        if self._total is not None and lengths is None:
            add_head_mean(call, self._total, weight=self._share, block=self._block)
        elif self._total is not None and lengths is not None:
            add_weighed_mean(
                call,
                self._total,
                self._sums,
                lengths,
                sizes=self._wanted.sizes[-self._missing] if self._wanted.sizes else None,
                weight=self._share,
                block=self._block,
            )
        if self._wanted.keep:
            weighed_later = self._total is None and lengths is not None
            self._calls.append(replace(call, value=None) if weighed_later else call)
            self._lengths += [] if lengths is None else [lengths]

    def reading(self, seen: Bool[Tensor, "batch key"]) -> Reading:
        """The reading, with 0 in rows and columns of padding; call it once, after the last call.

        Raises:
            Exception: The error of a call that could not be read.
        """
        total = self._total
        if total is not None:
            average_heads(self._model, total)  # also after an error: other processes wait for it
        if self._error is not None:
            raise self._error
        if total is not None:
            if self._wanted.projections is not None:
                keep_sums(total, self._sums)
            seen = sent(seen, total.device)
            rows = ~seen[:, -total.shape[1] :]  # filled, not multiplied: 0 times NaN is NaN
            total.masked_fill_(rows[:, :, None], 0).masked_fill_(~seen[:, None, :], 0)
        return Reading(
            attention=total,
            calls=tuple(self._calls),
            lengths=tuple(self._lengths),
            seconds=self._seconds,
        )
