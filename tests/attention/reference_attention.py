"""Slow definitions of attention and of its mean over heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flowtracer_plugin.attention import AttentionCall


def loop_head_mean(call: AttentionCall, heads: Sequence[int] | None = None) -> np.ndarray:
    """The head mean [batch, query, key] by the definition of `AttentionCall`, score by score."""
    query, key = (tensor.double().numpy() for tensor in (call.query, call.key))
    batches, every, queries, _ = query.shape
    chosen = range(every) if heads is None else heads
    mean = np.zeros((batches, queries, key.shape[2]))
    for b, h, q in np.ndindex(batches, len(chosen), queries):
        head = chosen[h]
        shared = key[b, head * key.shape[1] // every]
        scores = [
            _score(call, b, head, q, k, query[b, head, q], shared[k]) for k in range(len(shared))
        ]
        seen = [score for score in scores if score is not None]
        if not seen:
            continue
        sink = [] if call.sinks is None else [float(call.sinks[head])]
        top = max([*seen, *sink])
        total = sum(math.exp(score - top) for score in [*seen, *sink])
        for k, score in enumerate(scores):
            mean[b, q, k] += 0 if score is None else math.exp(score - top) / total / len(chosen)
    return mean


def _score(
    call: AttentionCall, b: int, h: int, q: int, k: int, query: np.ndarray, key: np.ndarray
) -> float | None:
    """The score of one query and key, or `None` if the query does not see the key."""
    score = float(query @ key) * call.scaling
    if call.softcap is not None:
        score = call.softcap * math.tanh(score / call.softcap)
    if call.bias is not None:
        score += _entry(call.bias, b, h, q, k)
    if call.mask is None:
        return None if call.causal and call.query.shape[2] > 1 and k > q else score
    allowed = _entry(call.mask, b, h, q, k)
    if call.mask.dtype == torch.bool:
        return score if allowed else None
    return None if allowed < -1e4 else score + allowed


def _entry(tensor: Tensor, *index: int) -> float:
    return tensor[
        tuple(i if size > 1 else 0 for i, size in zip(index, tensor.shape, strict=True))
    ].item()


def eager_attentions(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """The attention that the model itself returns: [batch, head, query, key] for each layer."""
    assert model.config._attn_implementation == "eager"
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions}
    with torch.no_grad():
        return model(**inputs, output_attentions=True, use_cache=False).attentions


def eager_head_mean(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    layers: Sequence[int],
    heads: Mapping[int, Sequence[int]] | None = None,
) -> Tensor:
    """The mean of the returned attention over layers and heads, with padding set to zero."""
    reported = eager_attentions(model, ids, mask)
    maps = [reported[layer].double() for layer in layers]
    if heads is not None:
        maps = [map_[:, list(heads[layer])] for layer, map_ in zip(layers, maps, strict=True)]
    mean = torch.stack([map_.mean(1) for map_ in maps]).mean(0)
    return mean * mask[:, :, None] * mask[:, None, :]
