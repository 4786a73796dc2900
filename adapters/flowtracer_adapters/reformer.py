"""Reformer, which attends in chunks: of neighbours, or of tokens with the same hash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from flowtracer_plugin.attention import (
    AttentionAdapter,
    AttentionCall,
    AttentionSite,
    AttentionWeights,
    UnsupportedArchitectureError,
)


@final
class ReformerAdapter(AttentionAdapter):
    """Computes again which tokens share a chunk, and how much each attends to the others.

    Every round of hashing sorts the tokens in a new order, and attends within chunks of it. Scores
    give the weight of each round (Kitaev et al. 2020, section 2). The map of tokens is the weighted
    sum of the rounds' maps, each in the order of the text.
    """

    name: ClassVar[str] = "reformer"

    def matches(self, model: nn.Module) -> bool:
        return any(_attends(module) for module in model.modules())

    def sites(self, model: nn.Module) -> tuple[AttentionSite, ...]:
        found = {path: module for path, module in model.named_modules() if _attends(module)}
        hashing = [_inner(module) for module in found.values() if _hashes(module)]
        if any(inner.hash_seed is None or inner.num_buckets is None for inner in hashing):
            raise UnsupportedArchitectureError(
                f"the LSH layers of {type(model).__name__} draw their hashes anew in every forward "
                "pass, and keep the number of buckets that suits the first text they see, so no "
                "pass tells what another one attended to; load it with hash_seed=0 and "
                "num_buckets=, a power of two near 2 · tokens / lsh_attn_chunk_length"
            )
        return tuple(
            AttentionSite(layer=_inner(module).layer_idx, module=path, function=FUNCTION)
            for path, module in found.items()
        )

    def read(
        self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> AttentionCall | AttentionWeights:
        if len(kwargs["past_buckets_states"] or ()):
            raise NotImplementedError(
                "a cached prefix of Reformer holds states, not keys; pass the whole text"
            )
        inner, states, mask = _inner(module), kwargs["hidden_states"], kwargs["attention_mask"]
        shown = (states.new_ones(states.shape[:2]) if mask is None else mask).bool()
        if not _hashes(module):
            return _local_call(inner, states, shown)
        weights = _hashed_weights(inner, states, shown, kwargs["num_hashes"] or inner.num_hashes)
        return AttentionWeights(weights=weights, value=_heads(inner, inner.value(states)))


FUNCTION = "self.self_attention"
"""The attention call. Its text is padded at the end, to a whole number of chunks."""


def _attends(module: nn.Module) -> bool:
    return type(module).__name__ == "ReformerAttention"


def _inner(module: nn.Module) -> Any:
    return module.self_attention


def _hashes(module: nn.Module) -> bool:
    return type(_inner(module)).__name__ == "LSHSelfAttention"


def _heads(
    inner: Any, states: Float[Tensor, "batch token hidden"]
) -> Float[Tensor, "batch head token width"]:
    heads = inner.num_attention_heads
    return rearrange(states, "b token (head width) -> b head token width", head=heads)


def _local_call(
    inner: Any, states: Float[Tensor, "batch token hidden"], shown: Bool[Tensor, "batch token"]
) -> AttentionCall:
    """Attention to a token's own chunk and to the neighbouring chunks."""
    tokens, length = states.shape[1], inner.chunk_length
    place = torch.arange(tokens, device=states.device)
    chunk = place // length if tokens > length else torch.zeros_like(place)
    times = _neighbours(inner, int(chunk[-1]) + 1).to(place.device)[chunk[:, None], chunk]
    return AttentionCall(
        query=_heads(inner, inner.query(states)),
        key=_heads(inner, inner.key(states)),
        value=_heads(inner, inner.value(states)),
        mask=((times > 0) & (place <= place[:, None])) & shown[:, None, None, :],
        bias=times.clamp(min=1).log()[None, None],
        scaling=inner.attention_head_size**-0.5,
    )


def _neighbours(inner: Any, chunks: int) -> Float[Tensor, "chunk other"]:
    """How often each chunk looks at each other one: chunks form a circle, so it can be twice."""
    if chunks == 1:
        return torch.ones(1, 1)
    steps = torch.arange(-inner.num_chunks_before, inner.num_chunks_after + 1)
    chunk = torch.arange(chunks)
    seen = (chunk[:, None] + steps) % chunks
    return nn.functional.one_hot(seen, chunks).sum(1).float()


def _hashed_weights(
    inner: Any,
    states: Float[Tensor, "batch token hidden"],
    shown: Bool[Tensor, "batch token"],
    rounds: int,
) -> Float[Tensor, "batch head query key"]:
    """The weights of a hashing layer: the output of the module's own code for one-hot values."""
    tokens = states.shape[1]
    vectors = _heads(inner, inner.query_key(states))
    if tokens <= inner.chunk_length:
        order = torch.arange(tokens, device=states.device).expand(vectors.shape[:3])
        return _attended(inner, vectors, order, shown)[0]
    # Hashing sets the random seed of the process.
    with torch.random.fork_rng([states.device] if states.is_cuda else []):
        buckets = inner._hash_vectors(vectors, rounds, shown)
    entry, undo = inner._get_sorted_bucket_idx_and_undo_sorted_bucket_idx(tokens, buckets, rounds)
    order = entry % tokens  # every token occurs once in each round
    gathered = inner._gather_by_expansion(vectors, order, rounds)
    weights, scores = _attended(inner, gathered, order, shown)
    weights = weights.gather(2, undo[..., None].expand_as(weights))
    weights = rearrange(weights, "b head (round query) key -> b head round query key", round=rounds)
    scores = rearrange(scores.gather(2, undo), "b head (round q) -> b head round q 1", round=rounds)
    # As in the model: scores of -1e5, of tokens that see only themselves, are rounded by 0.4 %.
    return (weights * (scores - scores.logsumexp(2, keepdim=True)).exp()).sum(2)


def _attended(
    inner: Any,
    vectors: Float[Tensor, "batch head entry width"],
    order: Int[Tensor, "batch head entry"],
    shown: Bool[Tensor, "batch token"],
) -> tuple[Float[Tensor, "batch head entry token"], Float[Tensor, "..."]]:
    """The share of every token in each entry of the sorted list, and the size of its scores."""
    tokens, length = shown.shape[1], inner.chunk_length
    one_hot = nn.functional.one_hot(order, tokens).to(vectors.dtype)
    chunked = tokens > length
    if chunked:
        pattern = "b head (chunk place) width -> b head chunk place width"
        vectors, one_hot = (rearrange(x, pattern, place=length) for x in (vectors, one_hot))
    weights, scores, _ = inner._attend(
        query_vectors=vectors,
        key_vectors=inner._len_and_dim_norm(vectors, inner.attention_head_size**0.5),
        value_vectors=one_hot,
        sorted_bucket_idx_per_hash=order,
        attention_mask=shown,
        do_standard_self_attention=not chunked,
        use_cache=False,
    )
    return weights, scores
