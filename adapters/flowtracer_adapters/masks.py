"""Tensors for the masks that flash and flex attention do not pass as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask


def visible_keys(
    module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: Mapping[str, Any]
) -> Tensor | None:
    """The mask of an attention call as [batch, head, query, key]; `None` leaves it to `causal`."""
    if type(mask).__name__ == "BlockMask":
        return _from_blocks(mask, query, key)
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return mask
    window = kwargs.get("sliding_window")
    unmasked = mask is None and window is not None and key.shape[2] > window
    # An attention function that was registered without a mask function gets no mask, only a window.
    if unmasked or _is_masked_like_flash(module):
        return _of_flash(module, query, key, mask, kwargs)
    if mask is None:
        return None
    raise NotImplementedError(
        "wanted an attention mask of shape [batch, head, query, key], found "
        f"{type(mask).__name__}{list(getattr(mask, 'shape', []))}: this attention implementation "
        'passes no mask tensor; load the model with attn_implementation="sdpa"'
    )


def _is_masked_like_flash(module: nn.Module) -> bool:
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    table = ALL_MASK_ATTENTION_FUNCTIONS
    return name in table and table[name] is flash_attention_mask


def _from_blocks(mask: Any, query: Tensor, key: Tensor) -> Bool[Tensor, "#batch #head query key"]:
    """The mask of flex attention, which is a function of indices, evaluated at all of them."""
    from torch.nn.attention.flex_attention import create_mask

    heads, tokens = mask.shape[1], (query.shape[2], key.shape[2])
    return create_mask(mask.mask_mod, query.shape[0], heads, *tokens, device=query.device)


def _of_flash(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    padding: Bool[Tensor, "batch key"] | None,
    kwargs: Mapping[str, Any],
) -> Bool[Tensor, "#batch 1 query key"]:
    """The mask that flash attention makes of padding, a window and the limits of packed texts.

    As in transformers' `_flash_attention_forward`, the last query is at the last key, a window of
    `w` sees `w` keys, and cumulated lengths or restarting positions tell packed texts apart.
    """
    if kwargs.get("block_table") is not None or kwargs.get("cache") is not None:
        raise NotImplementedError(
            "attention over a paged cache has no mask that could be rebuilt; run the model "
            "without continuous batching"
        )
    queries, keys = query.shape[2], key.shape[2]
    at = torch.arange(keys, device=query.device)
    behind = at[keys - queries :, None] - at[None, :]  # how far a key lies before a query
    stated = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if stated is None else stated
    seen = behind >= 0 if causal else torch.ones_like(behind, dtype=torch.bool)
    window = kwargs.get("sliding_window")
    if window is not None and keys > window:
        seen &= behind.abs() < window
    seen = seen[None, None]
    if padding is not None:
        return seen & padding[:, None, None, -keys:].bool()
    document = _documents(kwargs, keys, query)
    return seen if document is None else seen & (document[keys - queries :, None] == document)


def _documents(kwargs: Mapping[str, Any], keys: int, query: Tensor) -> Tensor | None:
    """The number of each token's packed text, [key]; `None` if there is only one text."""
    lengths, positions = kwargs.get("cu_seq_lens_k"), kwargs.get("position_ids")
    if lengths is not None:
        return torch.searchsorted(lengths, torch.arange(keys, device=query.device), right=True)
    if positions is None or query.shape[0] != 1 or positions.shape[-1] != keys:
        return None
    return (positions.reshape(-1, keys)[0] == positions.min()).cumsum(0)
