"""The attention of one forward pass, as rows that are computed on demand.

Queries and keys are kept instead of the map of all pairs: `O(tokens)` instead of `O(tokens²)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from flowtracer_plugin.attention.adapter import (
    AttentionAdapter,
    AttentionCall,
    AttentionSite,
    AttentionWeights,
    UnsupportedArchitectureError,
)
from flowtracer_plugin.attention.head_choice import Chosen
from flowtracer_plugin.attention.head_mean import (
    heads_of_row,
    keep_sums,
    mean_of_rows,
    one_text,
    query_tensor,
    rows_at_once,
    weighed_mean_of_rows,
)
from flowtracer_plugin.attention.value_lengths import Projections, value_lengths
from flowtracer_plugin.flow.torch_arrays import sent
from flowtracer_plugin.model.parallel import average_heads

ROWS_CHECKED = 1024
"""Rows of a mask that are checked at a time, so that the whole mask is never copied."""


class KeptCalls:
    """Collects the calls of one forward pass.

    Args:
        model: The model that runs.
        adapter: Reads each call.
        maps: Whether to keep calls that hand over a map of all pairs of tokens, not refuse them.
        projections: The linear maps of the values, if the values' lengths are wanted.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: AttentionAdapter,
        *,
        maps: bool = False,
        projections: Projections | None = None,
    ) -> None:
        self._model, self._adapter, self._maps = model, adapter, maps
        self._projections, self.lengths = projections, list[Float[Tensor, "batch _ _"]]()
        self._calls: list[AttentionCall | AttentionWeights] = []
        self._error: Exception | None = None

    @torch.no_grad()
    def receive(self, site: AttentionSite, args: Any, kwargs: Any, _output: Any) -> None:
        """Keep one call. An error waits until `calls`, so that the forward pass goes on."""
        try:
            if self._error is None:
                call = self._adapter.read(self._model.get_submodule(site.module), args, kwargs)
                if self._projections is not None:
                    self.lengths.append(value_lengths(call, self._projections[site]))
                self._calls.append(_slim(call, site, maps=self._maps))
        except Exception as error:  # noqa: BLE001 - raised in `calls`
            self._error = error

    def calls(self) -> tuple[AttentionCall | AttentionWeights, ...]:
        """All calls.

        Raises:
            Exception: The error of a call that could not be kept.
        """
        if self._error is not None:
            raise self._error
        return tuple(self._calls)


def _slim(
    call: AttentionCall | AttentionWeights, site: AttentionSite, *, maps: bool
) -> AttentionCall | AttentionWeights:
    """The call without tensors that its rows do not need."""
    if isinstance(call, AttentionWeights):
        if maps:
            return replace(call, weights=call.weights.detach(), value=None)
        raise UnsupportedArchitectureError(
            f"{site.module} hands over its probabilities, a [head, query, key] map, and no queries "
            "and keys: there is nothing to stream from; wrap(..., mode='dense')"
        )
    return replace(call, query=_own(call.query), key=_own(call.key), value=None)


def _own(part: Tensor) -> Tensor:
    """The tensor, copied if it is a view that would keep a larger tensor alive."""
    part = part.detach()
    shared = part.untyped_storage().nbytes() > 1.1 * part.numel() * part.element_size()
    return part.clone() if shared else part


class AttentionRows:
    """Blocks of rows of the mean over layers and heads, with 0 in rows and columns of padding.

    Args:
        model: The model that made the calls.
        calls: The calls of the layers to average. None looks at later tokens: see `check_causal`.
        visible: True for tokens, False for padding.
        block: Query rows that are computed at a time.
        heads: The heads of each call to average, for each text; all by default.
        lengths: The lengths of each call's values, by which attention is weighed; rows keep their
            sums. Without them, attention is not weighed.
        sizes: Further factors of each head's rows, such as their influence.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Sequence[AttentionCall | AttentionWeights],
        visible: Bool[Tensor, "batch token"],
        *,
        block: int,
        heads: Chosen | None = None,
        lengths: Sequence[Float[Tensor, "batch _ _"]] = (),
        sizes: Sequence[Float[Tensor, "batch _ _"]] = (),
    ) -> None:
        self._model, self.heads = model, heads
        # On an accelerator, the host would have to wait to know that there is no padding.
        plain = visible.device.type == "cpu" and bool(visible.all())
        self._hidden = None if plain else ~visible
        self.shape, self.device = visible.shape, visible.device
        nothing = (None,) * len(calls)
        parts = zip(calls, lengths or nothing, sizes or nothing, strict=True)
        every = tuple(_Part(call, None, length, size) for call, length, size in parts)
        self._calls = every
        self._block = min((rows_at_once(call, block) for call in calls), default=block)
        self._parts = [(slice(None), every)]
        if heads is not None:
            self._parts = [
                (slice(text, text + 1), _of_text(every, text, chosen))
                for text, chosen in enumerate(heads)
            ]

    @torch.no_grad()
    def __call__(self, start: int, stop: int) -> Float[Tensor, "batch row key"]:
        """The rows from `start` to before `stop`, with as many columns as `stop`."""
        total = torch.zeros(self.shape[0], stop - start, stop, device=self.device)
        for first in range(start, stop, self._block):
            rows = slice(first, min(first + self._block, stop))
            for texts, parts in self._parts:
                block = total[texts, rows.start - start : rows.stop - start]
                _add_mean(block, parts, rows, stop)
        average_heads(self._model, total)
        if self._hidden is not None:
            total.masked_fill_(self._hidden[:, start:stop, None], 0)
            total.masked_fill_(self._hidden[:, None, :stop], 0)
        return total

    @torch.no_grad()
    def by_head(self, row: int) -> tuple[Float[Tensor, "head key"], ...]:
        """What each head of each call pays in a row of the first text; their sum is that row.

        Heads that are not averaged pay nothing. Columns end at the diagonal.
        """
        chosen = (None,) * len(self._calls) if self.heads is None else self.heads[0]
        counts = [1 if heads is None else len(heads) for heads in chosen]
        found, had = [], 0.0
        for (call, _, lengths, sizes), heads, count in zip(
            self._calls, chosen, counts, strict=True
        ):
            query = query_tensor(call)
            paid = torch.zeros(query.shape[1], row + 1, device=self.device)
            found.append(paid)
            if not count:
                continue
            keys = row + 1 if getattr(call, "key_tokens", None) is None else None
            here = None if heads is None else heads.to(query.device)
            each, sums = heads_of_row(call, row, lengths, heads=here, keys=keys, sizes=sizes)
            share = count / sum(counts)
            each = each[0, :, : row + 1].to(self.device) * (share / each.shape[1])
            paid[slice(None) if heads is None else heads.to(self.device), : each.shape[1]] = each
            had += share * float(sums[0])
        total = sum(float(paid.sum()) for paid in found)
        if self._calls[0].lengths is not None and total > 0:
            found = [paid * (had / total) for paid in found]
        return tuple(found)

    def whole(self) -> Float[Tensor, "batch token token"]:
        """All rows at once."""
        tokens = self.shape[1]
        total = torch.zeros(*self.shape, tokens, device=self.device)
        for start in range(0, tokens, self._block):
            stop = min(start + self._block, tokens)
            total[:, start:stop, :stop] = self(start, stop)
        return total


class _Part(NamedTuple):
    """A call, the heads of it that are averaged, and the factors of its keys and of its rows."""

    call: AttentionCall | AttentionWeights
    heads: Int[Tensor, " chosen"] | None
    lengths: Float[Tensor, "batch head key"] | None
    sizes: Float[Tensor, "batch head query"] | None


def _add_mean(
    total: Float[Tensor, "batch row key"], parts: Sequence[_Part], rows: slice, stop: int
) -> None:
    """Add the mean over all chosen heads; without a choice, the mean of the calls' head means."""
    counts = [1 if part.heads is None else len(part.heads) for part in parts]
    sums = total.new_zeros(total.shape[:2])
    for (call, heads, lengths, sizes), count in zip(parts, counts, strict=True):
        # Keys that stand for several tokens are not numbered like the tokens.
        keys = stop if getattr(call, "key_tokens", None) is None else None
        share = count / sum(counts)
        if lengths is None:
            mean = mean_of_rows(call, rows, heads=heads, keys=keys)
        else:
            mean, had = weighed_mean_of_rows(
                call, rows, lengths, heads=heads, keys=keys, sizes=sizes
            )
            sums.add_(had.to(total.device), alpha=share)
        mean = mean[..., :stop].to(total.device)
        total[..., : mean.shape[-1]].add_(mean, alpha=share)
    if parts and parts[0].lengths is not None:
        keep_sums(total, sums)


def _of_text(
    parts: Sequence[_Part], text: int, chosen: Sequence[Int[Tensor, " _"]]
) -> tuple[_Part, ...]:
    """The parts of one text, without calls whose heads are all left out."""
    return tuple(
        _Part(
            one_text(part.call, text),
            sent(heads, query_tensor(part.call).device),
            None if part.lengths is None else part.lengths[text : text + 1],
            None if part.sizes is None else part.sizes[text : text + 1],
        )
        for part, heads in zip(parts, chosen, strict=True)
        if len(heads)
    )


def check_causal(calls: Sequence[AttentionCall | AttentionWeights]) -> None:
    """Refuse calls in which tokens look at later ones: rows end at the diagonal.

    Raises:
        UnsupportedArchitectureError: Tokens look at later ones.
    """
    by_token = [c for c in calls if isinstance(c, AttentionCall) and c.key_tokens is None]
    # Layers share masks, and each is checked once.
    masks = {id(call.mask): call.mask for call in by_token if call.mask is not None}
    ahead = [_looks_ahead(mask) for mask in masks.values()]
    unmasked = any(call.mask is None and not call.causal for call in by_token)
    if unmasked or (ahead and bool(torch.stack([one.to(ahead[0].device) for one in ahead]).any())):
        raise UnsupportedArchitectureError(
            "attention looks at later tokens, so no flow from earlier to later ones is defined"
        )


def _looks_ahead(mask: Tensor) -> Bool[Tensor, ""]:
    found = torch.zeros((), dtype=torch.bool, device=mask.device)
    for start in range(0, mask.shape[2], ROWS_CHECKED):
        rows = mask[:, :, start : start + ROWS_CHECKED, start:]
        open_ = rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2
        found |= open_.triu(1).any()
    return found
