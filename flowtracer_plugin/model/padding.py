"""Move padding behind the text, where no causal model can notice it.

Padding on the left shifts learned positions, runs through recurrent states, and fills the blocks
of models that choose among blocks. Behind the text it has no effect: no token looks ahead.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from flowtracer_plugin.flow.torch_arrays import sent


def text_first(
    input_ids: Int[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
) -> tuple[Int[Tensor, "batch most"], Bool[Tensor, "batch most"]]:
    """Ids and mask with the visible tokens of every row first, as wide as the longest row.

    The host waits for the device of the mask once, so a mask on the host costs nothing.
    """
    ordered = mask.sort(dim=1, descending=True).values
    most, moved = torch.stack([ordered.any(0).sum(), (ordered != mask).sum()]).tolist()
    if moved:
        input_ids = input_ids.gather(1, sent(_order(mask), input_ids.device))
    return input_ids[:, : max(1, most)], ordered[:, : max(1, most)]


def is_in_front(mask: Bool[Tensor, "batch token"]) -> bool:
    """Whether `text_first` leaves such texts as they are; waits as `text_first` does."""
    ordered = mask.sort(dim=1, descending=True).values
    return bool((ordered == mask).all() & mask[:, 1:].any(0).all())


def in_front(
    values: Shaped[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    ordered: Bool[Tensor, "batch most"],
) -> Shaped[Tensor, "batch most"]:
    """Values of visible tokens at the places to which `text_first` moves these tokens, else 0."""
    order = sent(_order(mask)[:, : ordered.shape[1]], ordered.device)
    return sent(values, ordered.device).gather(1, order).masked_fill(~ordered, 0)


def moved_back(
    values: Shaped[Tensor, "batch most *more"], mask: Bool[Tensor, "batch token"]
) -> Shaped[Tensor, "batch token *more"]:
    """Values of texts that `text_first` moved, with the tokens back in place, and 0 for padding."""
    mask = sent(mask, values.device)
    row = torch.arange(len(mask), device=mask.device)[:, None]
    hidden = ~mask.reshape(*mask.shape, *(1,) * (values.ndim - 2))
    return values[row, _places(mask)].masked_fill(hidden, 0)


def put_back(
    total: Float[Tensor, "batch most most"], mask: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch token token"]:
    """Maps of texts that `text_first` moved, with the tokens back in place, and 0 for padding.

    Maps of the full width are changed in place.
    """
    mask = sent(mask, total.device)
    wide = total if mask.shape == total.shape[:2] else total.new_zeros(*mask.shape, mask.shape[1])
    for map_, found, place in zip(wide, total, _places(mask), strict=True):
        map_.copy_(found[place].index_select(1, place))
    return wide.masked_fill_(~mask[:, :, None], 0).masked_fill_(~mask[:, None, :], 0)


def _order(mask: Bool[Tensor, "batch token"]) -> Int[Tensor, "batch token"]:
    """The place that each token comes from, when the visible ones come first."""
    return (~mask).to(torch.uint8).argsort(dim=1, stable=True)


def _places(mask: Bool[Tensor, "batch token"]) -> Int[Tensor, "batch token"]:
    """The place among the visible tokens of each visible one; any place for padding."""
    return (mask.cumsum(-1) - 1).clamp_min_(0)
