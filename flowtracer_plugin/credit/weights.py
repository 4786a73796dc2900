"""Throughput into token weights: how much of a rollout's credit each of its tokens gets."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int


def token_credit(
    throughput: Float[Any, "*batch token"],
    mask: Bool[Any, "*batch token"] | Int[Any, "*batch token"],
    *,
    top_fraction: float = 0.4,
    gamma: float = 1.5,
    normalize: str = "none",
) -> Float[Any, "*batch token"]:
    """Weight `gamma` for the tokens that carry the most flow, 1 for the others, 0 outside `mask`.

    The chosen tokens are `top_tokens`; a row without any flow gets weight 1 throughout. With
    `normalize="mean_one"` the weights of a row's masked tokens are divided by their mean, unless
    that is 0: then each is 1. Section 2 of the design and the paper's recipe: 0.4, 1.5, none.

    Args:
        throughput: numpy array or torch tensor; weights come back as the same kind and dtype.
        mask: Which tokens compete and are weighted: the response tokens of one rollout a row.
        top_fraction: Share of a row's tokens that is chosen, from 0 to 1.
        gamma: Weight of the chosen tokens; at least 0.
        normalize: `"none"`, or `"mean_one"`: a row's weights keep its mean credit.

    Raises:
        ValueError: Shapes differ, an option is out of range, or throughput is negative or not
            finite.

    Examples:
        >>> token_credit(np.array([0.1, 0.6, 0.3, 0.0]), np.ones(4, bool), top_fraction=0.5)
        array([1. , 1.5, 1.5, 1. ])
    """
    chosen, xp = top_tokens(throughput, mask, top_fraction=top_fraction), _library(throughput)
    boost = xp.where(chosen, throughput * 0 + 1, 0.0)
    weights = credit_weights(boost, mask, gamma=gamma, normalize=normalize)
    return xp.where(mask != 0, weights, 0.0)


def credit_weights(
    boost: Float[Any, "*batch token"],
    competing: Bool[Any, "*batch token"] | Int[Any, "*batch token"],
    *,
    gamma: float = 1.5,
    normalize: str = "none",
) -> Float[Any, "*batch token"]:
    """Weight `1 + (gamma − 1) · boost` for the competing tokens, exactly 1 for all others.

    With `gamma=1`, or without any boost, every weight is exactly 1. With `normalize="mean_one"` the
    weights of a row's competing tokens are divided by their mean, unless that is 0: then each is 1.

    Raises:
        ValueError: `gamma` or `normalize` is out of range.

    Examples:
        >>> credit_weights(np.array([0.0, 1.0, 0.5, 1.0]), np.array([1, 1, 1, 0]), gamma=1.5)
        array([1.  , 1.5 , 1.25, 1.  ])
    """
    if not (gamma >= 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma must be a number of at least 0, got {gamma!r}")
    if normalize not in ("none", "mean_one"):
        raise ValueError(f"normalize must be 'none' or 'mean_one', got {normalize!r}")
    xp, counted = _library(boost), competing != 0
    # Rounding must not make a whole boost anything but gamma.
    boosted = xp.where(boost == 1, gamma, 1 + (gamma - 1) * boost)
    weights = xp.where(counted, boosted, 1.0)
    if normalize == "none":
        return weights
    total = xp.where(counted, weights, 0.0).sum(-1)[..., None]
    count = xp.where(counted, boost * 0 + 1, 0.0).sum(-1)[..., None]
    scaled = weights * count / xp.where(total > 0, total, 1.0)
    return xp.where(counted & (total > 0), scaled, 1.0)


def top_tokens(
    throughput: Float[Any, "*batch token"],
    mask: Bool[Any, "*batch token"] | Int[Any, "*batch token"],
    *,
    top_fraction: float = 0.4,
) -> Bool[Any, "*batch token"]:
    """The `ceil(top_fraction · n)` of each row's `n` masked tokens that carry the most flow.

    Of equal ones the earlier, and never one without any flow.

    Raises:
        ValueError: Shapes differ, `top_fraction` is out of range, or throughput is negative or not
            finite.

    Examples:
        >>> top_tokens(np.array([0.1, 0.6, 0.3, 0.0]), np.array([1, 0, 1, 1]), top_fraction=0.5)
        array([ True, False,  True, False])
    """
    _validate(throughput, mask, top_fraction)
    xp, counted = _library(throughput), mask != 0
    competing = xp.where(counted, throughput, -1.0)
    rank = _descending(competing).argsort(-1)
    # A table of whole numbers: on tensors of float32, 0.4 · 5 can be more than 2.
    limits = [math.ceil(round(top_fraction * n, 9)) for n in range(mask.shape[-1] + 1)]
    limit = _beside(throughput, limits)[counted.sum(-1)]
    return (rank < limit[..., None]) & (competing > 0)


def _library(array: Any) -> ModuleType:
    if isinstance(array, np.ndarray):
        return np
    import torch

    return torch


def _beside(array: Any, values: list[int]) -> Any:
    """The values as an array of the same library, on the same device."""
    if isinstance(array, np.ndarray):
        return np.array(values)
    return _library(array).tensor(values, device=array.device)


def _descending(values: Float[Any, "*batch token"]) -> Any:
    """Indices from the largest value to the smallest, equal ones in their order."""
    if isinstance(values, np.ndarray):
        return np.argsort(-values, axis=-1, kind="stable")
    return values.argsort(dim=-1, descending=True, stable=True)


def _validate(throughput: Any, mask: Any, top_fraction: float) -> None:
    if tuple(throughput.shape) != tuple(mask.shape):
        raise ValueError(
            f"mask must have the shape of throughput, {tuple(throughput.shape)}, "
            f"got {tuple(mask.shape)}"
        )
    if not 0 <= top_fraction <= 1:
        raise ValueError(f"top_fraction must be between 0 and 1, got {top_fraction!r}")
    if not bool(((throughput >= 0) & (throughput < math.inf)).all()):
        raise ValueError("throughput must be finite and not negative")
