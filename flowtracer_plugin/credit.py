"""Throughput into token weights: how much of a rollout's credit each of its tokens gets."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

Normalization = Literal["none", "mean_one"]


def token_credit(
    throughput: Float[Any, "*batch token"],
    mask: Bool[Any, "*batch token"],
    *,
    top_fraction: float = 0.4,
    gamma: float = 1.5,
    normalize: Normalization = "none",
) -> Float[Any, "*batch token"]:
    """Weight `gamma` for the tokens that carry the most flow, 1 for the others, 0 outside `mask`.

    In each row the `ceil(top_fraction · n)` of its `n` masked tokens with the highest throughput
    are chosen; of equal ones the earlier; never one without throughput, so that a row without any
    flow gets weight 1 throughout. With `normalize="mean_one"` the weights of a row's masked tokens
    are divided by their mean. Section 2 of the design and the paper's recipe: 0.4, 1.5, none.

    Args:
        throughput: numpy array or torch tensor; weights come back as the same kind.
        mask: Which tokens compete and are weighted: the response tokens of one rollout a row.
        top_fraction: Share of a row's tokens that is chosen, from 0 to 1.
        gamma: Weight of the chosen tokens; at least 0.
        normalize: Whether a row's weights keep its mean credit.

    Raises:
        ValueError: Shapes differ, an option is out of range, or throughput is negative or not
            finite.

    Examples:
        >>> token_credit(np.array([0.1, 0.6, 0.3, 0.0]), np.ones(4, bool), top_fraction=0.5)
        array([1. , 1.5, 1.5, 1. ])
    """
    _validate(throughput, mask, top_fraction, gamma, normalize)
    xp = _library(throughput)
    competing = xp.where(mask, throughput, -1.0)
    order = _descending(competing)
    rank = order.argsort(-1)
    limit = xp.ceil(xp.round(mask.sum(-1) * top_fraction, decimals=9))
    chosen = (rank < limit[..., None]) & (competing > 0)
    weights = xp.where(mask, xp.where(chosen, gamma, 1.0), 0.0)
    if normalize == "mean_one":
        total = weights.sum(-1)[..., None]
        weights = weights * mask.sum(-1)[..., None] / xp.where(total > 0, total, 1.0)
    return weights if isinstance(weights, np.ndarray) else weights.to(throughput.dtype)


def _library(array: Any) -> ModuleType:
    if isinstance(array, np.ndarray):
        return np
    import torch

    return torch


def _descending(values: Float[Any, "*batch token"]) -> Any:
    """Indices from the largest value to the smallest, equal ones in their order."""
    if isinstance(values, np.ndarray):
        return np.argsort(-values, axis=-1, kind="stable")
    return values.argsort(-1, descending=True, stable=True)


def _validate(
    throughput: Any, mask: Any, top_fraction: float, gamma: float, normalize: str
) -> None:
    if tuple(throughput.shape) != tuple(mask.shape):
        raise ValueError(
            f"mask must have the shape of throughput, {tuple(throughput.shape)}, "
            f"got {tuple(mask.shape)}"
        )
    if not 0 <= top_fraction <= 1:
        raise ValueError(f"top_fraction must be between 0 and 1, got {top_fraction!r}")
    if not (gamma >= 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma must be a number of at least 0, got {gamma!r}")
    if normalize not in ("none", "mean_one"):
        raise ValueError(f"normalize must be 'none' or 'mean_one', got {normalize!r}")
    if not bool(((throughput >= 0) & (throughput < math.inf)).all()):
        raise ValueError("throughput must be finite and not negative")
