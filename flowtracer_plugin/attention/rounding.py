"""How far two ways of computing the same numbers may differ."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def difference(found: Float[Tensor, "*shape"], wanted: Float[Tensor, "*shape"]) -> float:
    """The norm of the difference, as a share of the norm of `wanted`."""
    wanted = wanted.detach().float()
    size = wanted.norm().clamp(min=torch.finfo(wanted.dtype).tiny)
    return float((found.detach().float() - wanted).norm() / size)


def rounding(computed: Float[Tensor, "..."]) -> float:
    """The difference, as a share, that rounding in the model's own computation can explain."""
    # Half precision keeps 8 to 11 bits of the output, TF32 products on a GPU keep 10.
    return 2e-3 if computed.dtype == torch.float32 else 2e-2
