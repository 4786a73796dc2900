"""Move padding behind the text, where no causal model can notice it.

Padding on the left shifts learned positions, runs through recurrent states, and fills the blocks
of models that choose among blocks. Behind the text it has no effect: no token looks ahead.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def text_first(
    input_ids: Int[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
) -> tuple[Int[Tensor, "batch most"], Bool[Tensor, "batch most"]]:
    """Ids and mask with the visible tokens of every row first, as wide as the longest row."""
    ordered = mask.sort(dim=1, descending=True).values
    most = max(1, int(ordered.any(0).sum()))
    if not torch.equal(ordered, mask):
        order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
        input_ids = input_ids.gather(1, order.to(input_ids.device))
    return input_ids[:, :most], ordered[:, :most]


def in_front(
    values: Bool[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    ordered: Bool[Tensor, "batch most"],
) -> Bool[Tensor, "batch most"]:
    """Marks of visible tokens at the places to which `text_first` moves these tokens."""
    moved = torch.zeros_like(ordered)
    moved[ordered] = values.to(ordered.device)[mask.to(ordered.device)]
    return moved


def put_back(
    total: Float[Tensor, "batch most most"], mask: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch token token"]:
    """Maps of texts that `text_first` moved, with the tokens back in place, and 0 for padding.

    Maps of the full width are changed in place.
    """
    mask = mask.to(total.device)
    wide = total if mask.shape == total.shape[:2] else total.new_zeros(*mask.shape, mask.shape[1])
    for map_, found, visible in zip(wide, total, mask, strict=True):
        places = visible.nonzero()[:, 0]
        block = found[: len(places), : len(places)].clone()
        map_.zero_()
        map_[places[:, None], places] = block
    return wide
