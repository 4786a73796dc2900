"""The attention of one forward pass as rows that are computed when they are asked for.

Queries and keys are kept instead of the map that they span: `O(tokens)` instead of `O(tokens²)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from flowtracer_plugin.attention import (
    AttentionAdapter,
    AttentionCall,
    AttentionSite,
    AttentionWeights,
    UnsupportedArchitectureError,
)
from flowtracer_plugin.head_mean import mean_of_rows
from flowtracer_plugin.parallel import average_heads

ROWS_CHECKED = 1024
"""Of a mask that are looked at together, so that no copy of the whole is made."""


class KeptCalls:
    """The calls of one forward pass, as they come."""

    def __init__(self, model: nn.Module, adapter: AttentionAdapter) -> None:
        self._model, self._adapter = model, adapter
        self._calls: list[AttentionCall] = []
        self._error: Exception | None = None

    @torch.no_grad()
    def receive(self, site: AttentionSite, args: Any, kwargs: Any, _output: Any) -> None:
        """Keep one call. What goes wrong waits for `calls`, as the forward pass goes on."""
        try:
            if self._error is None:
                call = self._adapter.read(self._model.get_submodule(site.module), args, kwargs)
                self._calls.append(_slim(call, site))
        except Exception as error:  # noqa: BLE001 - raised in `calls`
            self._error = error

    def calls(self) -> tuple[AttentionCall, ...]:
        """All of them; raises whatever went wrong."""
        if self._error is not None:
            raise self._error
        return tuple(self._calls)


def _slim(call: AttentionCall | AttentionWeights, site: AttentionSite) -> AttentionCall:
    """The call without what its rows do not need."""
    if isinstance(call, AttentionWeights):
        raise UnsupportedArchitectureError(
            f"{site.module} hands over its probabilities, a [head, query, key] map, and no queries "
            "and keys: there is nothing to stream from; wrap(..., mode='dense')"
        )
    return replace(call, query=_own(call.query), key=_own(call.key), value=None)


def _own(part: Tensor) -> Tensor:
    """The tensor, copied if keeping it would keep more: all values, if one product made them."""
    part = part.detach()
    shared = part.untyped_storage().nbytes() > 1.1 * part.numel() * part.element_size()
    return part.clone() if shared else part


class AttentionRows:
    """Blocks of rows of the mean over layers and heads; rows and columns of padding are zero.

    Args:
        model: Whose calls they are.
        calls: Of the layers that are averaged.
        visible: Which tokens are no padding.
        block: Query rows that are computed at a time.

    Raises:
        UnsupportedArchitectureError: A call lets tokens look at later ones.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Sequence[AttentionCall],
        visible: Bool[Tensor, "batch token"],
        *,
        block: int,
    ) -> None:
        # Layers share masks, and each is looked at once.
        kinds = {(id(call.mask), call.causal, call.key_tokens is None): call for call in calls}
        for call in kinds.values():
            _check_causal(call)
        self._model, self._calls, self._block = model, calls, block
        self._hidden = None if bool(visible.all()) else ~visible
        self.shape, self.device = visible.shape, visible.device

    @torch.no_grad()
    def __call__(self, start: int, stop: int) -> Float[Tensor, "batch row key"]:
        """The rows `start` to `stop`, up to the column `stop`."""
        total = torch.zeros(self.shape[0], stop - start, stop, device=self.device)
        for first in range(start, stop, self._block):
            last = min(first + self._block, stop)
            for call in self._calls:
                # Keys that are not the tokens themselves cannot be told apart by their number.
                keys = stop if call.key_tokens is None else None
                mean = mean_of_rows(call, slice(first, last), keys=keys)[..., :stop]
                part = total[:, first - start : last - start, : mean.shape[-1]]
                part.add_(mean.to(total.device), alpha=1 / len(self._calls))
        average_heads(self._model, total)
        if self._hidden is not None:
            total.masked_fill_(self._hidden[:, start:stop, None], 0)
            total.masked_fill_(self._hidden[:, None, :stop], 0)
        return total


def _check_causal(call: AttentionCall) -> None:
    """Rows are only ever computed up to the diagonal, so nothing may be beyond it."""
    if call.key_tokens is not None:
        return
    ahead = not call.causal if call.mask is None else _looks_ahead(call.mask)
    if ahead:
        raise UnsupportedArchitectureError(
            "attention looks at later tokens, so no flow from earlier to later ones is defined"
        )


def _looks_ahead(mask: Tensor) -> bool:
    length = mask.shape[2]
    for start in range(0, length, ROWS_CHECKED):
        rows = mask[:, :, start : start + ROWS_CHECKED, start:]
        open_ = rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2
        if bool(open_.triu(1).any()):
            return True
    return False
