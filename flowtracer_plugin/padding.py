"""Padding, moved to where no causal model can notice it.

Padding on the left shifts learned positions, runs through recurrent states, and fills the blocks
of models that choose among blocks. Behind the text it does nothing: nothing looks ahead.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def text_first(
    input_ids: Int[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
) -> tuple[Int[Tensor, "batch token"], Bool[Tensor, "batch token"]]:
    """Ids and mask with every row's visible tokens in front; both as they are if they are there."""
    ordered = mask.sort(dim=1, descending=True).values
    if torch.equal(ordered, mask):
        return input_ids, mask
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    return input_ids.gather(1, order.to(input_ids.device)), ordered


def put_back(total: Float[Tensor, "batch token token"], mask: Bool[Tensor, "batch token"]) -> None:
    """Move the maps of `text_first` to where the tokens were, in place; padding becomes 0."""
    for map_, visible in zip(total, mask.to(total.device), strict=True):
        places = visible.nonzero()[:, 0]
        block = map_[: len(places), : len(places)].clone()
        map_.zero_()
        map_[places[:, None], places] = block
