"""The weight of each token: how much of a rollout's credit it gets."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from flowtracer_plugin.flow.arrays import check_readable, dtype_name


def token_credit(
    throughput: Float[Any, "*batch token"],
    mask: Bool[Any, "*batch token"] | Int[Any, "*batch token"],
    *,
    top_fraction: float = 0.4,
    gamma: float = 1.5,
    normalize: str = "none",
) -> Float[Any, "*batch token"]:
    """Weight `gamma` for the tokens with the most flow, 1 for the others, 0 outside `mask`.

    `top_tokens` chooses the tokens; a row without flow has weight 1 everywhere. With
    `normalize="mean_one"` the weights of a row's masked tokens are divided by their mean; if
    that is 0, each weight is 1. The defaults are the paper's (section 4).

    Args:
        throughput: numpy array or torch tensor; weights come back as the same kind and dtype.
        mask: True on the tokens that compete, the response tokens of one rollout in each row.
        top_fraction: Share of a row's tokens to choose, from 0 to 1.
        gamma: Weight of the chosen tokens; at least 0.
        normalize: `"none"`, or `"mean_one"` to keep the mean credit of a row.

    Raises:
        TypeError: Throughput or mask are no arrays of one library, or of a kind or dtype that
            cannot be read, such as masked or sparse ones.
        ValueError: Shapes or devices differ, an option is out of range, or throughput is negative
            or not finite.

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
    """Weight `1 + (gamma − 1) · boost`, at least 0, for the competing tokens; exactly 1 for others.

    With `gamma=1` or a boost of 0, every weight is exactly 1. With `normalize="mean_one"` the
    weights of a row's competing tokens are divided by their mean; if that is 0, each weight is 1.

    Raises:
        TypeError: As for `token_credit`.
        ValueError: Shapes or devices differ, or `gamma` or `normalize` is out of range.

    Examples:
        >>> credit_weights(np.array([0.0, 1.0, 0.5, 1.0]), np.array([1, 1, 1, 0]), gamma=1.5)
        array([1.  , 1.5 , 1.25, 1.  ])
    """
    _check_pair("boost", boost, "competing", competing)
    if not (gamma >= 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma must be a number of at least 0, got {gamma!r}")
    if normalize not in ("none", "mean_one"):
        raise ValueError(f"normalize must be 'none' or 'mean_one', got {normalize!r}")
    xp, counted = _library(boost), competing != 0
    # Rounding must not change gamma where the boost is 1.
    boosted = xp.where(boost == 1, gamma, 1 + (gamma - 1) * boost)
    boosted = xp.where(boosted > 0, boosted, 0.0)
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
    """True on the `⌈top_fraction · n⌉` of each row's `n` masked tokens with the most flow.

    The earlier token goes first among equals, and a token without flow is never chosen.

    Raises:
        TypeError: As for `token_credit`.
        ValueError: Shapes or devices differ, `top_fraction` is out of range, or throughput is
            negative or not finite.

    Examples:
        >>> top_tokens(np.array([0.1, 0.6, 0.3, 0.0]), np.array([1, 0, 1, 1]), top_fraction=0.5)
        array([ True, False,  True, False])
    """
    _validate(throughput, mask, top_fraction)
    return highest(throughput, mask, top_fraction)


def highest(
    throughput: Float[Any, "*batch token"],
    mask: Bool[Any, "*batch token"] | Int[Any, "*batch token"],
    top_fraction: float,
) -> Bool[Any, "*batch token"]:
    """`top_tokens` without its checks, for which the host would wait for the device."""
    xp, counted = _library(throughput), mask != 0
    competing = xp.where(counted, throughput, -1.0)
    rank = _descending(competing).argsort(-1)
    # A table of whole numbers, because 0.4 · 5 can exceed 2 in float32.
    limits = [math.ceil(round(top_fraction * n, 9)) for n in range(mask.shape[-1] + 1)]
    limit = _beside(throughput, limits)[counted.sum(-1)]
    return (rank < limit[..., None]) & (competing > 0)


def _library(array: Any) -> ModuleType:
    if isinstance(array, np.ndarray):
        return np
    import torch

    return torch


def _beside(array: Any, values: list[int]) -> Any:
    """The values as an array of the same library and on the same device."""
    if isinstance(array, np.ndarray):
        return np.array(values)
    from flowtracer_plugin.flow.torch_arrays import sent

    return sent(values, array.device)


def _descending(values: Float[Any, "*batch token"]) -> Any:
    """The indices from the largest value to the smallest; equal values keep their order."""
    if isinstance(values, np.ndarray):
        return np.argsort(-values, axis=-1, kind="stable")
    return values.argsort(dim=-1, descending=True, stable=True)


def _validate(throughput: Any, mask: Any, top_fraction: float) -> None:
    _check_pair("throughput", throughput, "mask", mask)
    if not 0 <= top_fraction <= 1:
        raise ValueError(f"top_fraction must be between 0 and 1, got {top_fraction!r}")
    if not bool(((throughput >= 0) & (throughput < math.inf)).all()):
        raise ValueError("throughput must be finite and not negative")


def _check_pair(name: str, values: Any, mask_name: str, mask: Any) -> None:
    """Refuse values and a mask that cannot be read together."""
    for one, array, kinds in (
        (name, values, ("float", "bfloat", "int", "uint", "bool")),
        (mask_name, mask, ("bool", "int", "uint")),
    ):
        check_readable(one, array)
        if not _is_array(array):
            raise TypeError(
                f"{one} must be a numpy array or a torch tensor, got {type(array).__name__}; "
                "convert it first, for example with numpy.asarray"
            )
        if not dtype_name(array).startswith(kinds):
            wanted = "real numbers" if one == name else "booleans, or 0 and 1"
            raise TypeError(f"{one} must hold {wanted}, got dtype {dtype_name(array)}")
    if isinstance(values, np.ndarray) != isinstance(mask, np.ndarray):
        raise TypeError(
            f"{name} and {mask_name} must be of one library, got {type(values).__name__} and "
            f"{type(mask).__name__}; convert one of them"
        )
    if tuple(values.shape) != tuple(mask.shape):
        raise ValueError(
            f"{mask_name} must have the shape of {name}, {tuple(values.shape)}, "
            f"got {tuple(mask.shape)}"
        )
    devices = [str(getattr(array, "device", "cpu")) for array in (values, mask)]
    if devices[0] != devices[1]:
        raise ValueError(f"{mask_name} must be on {devices[0]} like {name}, got {devices[1]}")


def _is_array(array: Any) -> bool:
    if isinstance(array, np.ndarray):
        return True
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)
