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
) -> tuple[Int[Tensor, "batch most"], Bool[Tensor, "batch most"]]:
    """Ids and mask with every row's visible tokens in front, as wide as the longest row."""
    ordered = mask.sort(dim=1, descending=True).values
    most = max(1, int(ordered.any(0).sum()))
    if not torch.equal(ordered, mask):
        order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
        input_ids = input_ids.gather(1, order.to(input_ids.device))
    return input_ids[:, :most], ordered[:, :most]


def put_back(
    total: Float[Tensor, "batch most most"], mask: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch token token"]:
    """The maps of `text_first`, moved to where the tokens were; padding is 0.

    In place, if they are as wide as that.
    """
    mask = mask.to(total.device)
    wide = total if mask.shape == total.shape[:2] else total.new_zeros(*mask.shape, mask.shape[1])
    for map_, found, visible in zip(wide, total, mask, strict=True):
        places = visible.nonzero()[:, 0]
        block = found[: len(places), : len(places)].clone()
        map_.zero_()
        map_[places[:, None], places] = block
    return wide
