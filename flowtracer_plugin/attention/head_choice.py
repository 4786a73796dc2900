"""The choice of the heads to average: those that attend most from the answer to the reasoning."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowtracer_plugin.attention.adapter import AttentionCall, AttentionWeights
from flowtracer_plugin.attention.head_mean import query_tensor, token_probabilities

Chosen = tuple[tuple[Int[Tensor, " _"], ...], ...]
"""The chosen heads of each call, for each text."""

_BLOCK = 64


def attention_to(
    call: AttentionCall | AttentionWeights,
    target: Bool[Tensor, "batch token"],
    reasoning: Bool[Tensor, "batch token"],
    asked: Sequence[bool],
) -> Float[Tensor, "batch head"]:
    """The attention that each head pays from the target's rows to earlier reasoning tokens.

    `asked` says which tokens are targets in any of the texts.
    """
    device = query_tensor(call).device
    target, reasoning = target.to(device), reasoning.to(device)
    batch, tokens = target.shape
    paid = torch.zeros(batch, query_tensor(call).shape[1], device=device)
    with torch.autocast(device.type, enabled=False):
        for start in range(0, tokens, _BLOCK):
            rows = slice(start, min(start + _BLOCK, tokens))
            if any(asked[rows]):
                found = token_probabilities(call, rows, tokens).tril(start - 1)
                keys = reasoning[:, None, None, : found.shape[-1]]
                paid += found.mul(keys).sum(-1).mul(target[:, None, rows]).sum(-1)
    return paid


def most_attentive(paid: Sequence[Float[Tensor, "batch _"]], share: float) -> Chosen:
    """The `⌈share · n⌉` of all `n` heads that pay the most attention; earlier heads win ties.

    A text in which no head pays any attention keeps all its heads.
    """
    counts = [one.shape[1] for one in paid]
    among = torch.cat([one.to(paid[0].device) for one in paid], dim=1).cpu()
    number = math.ceil(round(share * among.shape[1], 9))
    rank = among.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    chosen = (rank < number) | (among.sum(1, keepdim=True) <= 0)
    return tuple(tuple(part.nonzero()[:, 0] for part in text.split(counts)) for text in chosen)


def named_heads(
    pairs: Iterable[tuple[int, int]], layers: Sequence[int], counts: Sequence[int], texts: int
) -> Chosen:
    """The heads that `pairs` name by layer and head, the same for every text.

    Raises:
        ValueError: A layer is not among `layers`, or has no such head.
    """
    heads: list[list[int]] = [[] for _ in layers]
    for layer, head in pairs:
        here = [place for place, number in enumerate(layers) if number == layer]
        if not here:
            raise ValueError(
                f"heads names ({layer}, {head}), but layer {layer} is not among the layers "
                f"{sorted(set(layers))} that are averaged; choose layers= with this layer"
            )
        if not 0 <= head < counts[here[0]]:
            raise ValueError(
                f"heads names ({layer}, {head}), but layer {layer} has the heads 0 to "
                f"{counts[here[0]] - 1}"
            )
        for place in here:
            heads[place].append(head)
    named = tuple(torch.tensor(sorted(one), dtype=torch.long) for one in heads)
    return (named,) * texts
