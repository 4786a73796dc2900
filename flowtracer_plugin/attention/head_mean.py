"""Head-averaged attention probabilities of one attention call, a block of query rows at a time.

No tensor of shape [head, query, key] ever exists, so reading attention stays as light as the
forward pass itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowtracer_plugin.attention.adapter import AttentionCall, AttentionWeights

SCORES = 2**24
"""Bytes of scores that the host computes at a time, so that they stay in its cache. For tensors of
more than 32 MB, the C library would ask the system for new memory each time."""


def add_head_mean(
    call: AttentionCall | AttentionWeights,
    total: Float[Tensor, "batch query key"],
    *,
    weight: float = 1.0,
    heads: Int[Tensor, " chosen"] | None = None,
    block: int = 64,
) -> None:
    """Add `weight` times the mean of the call's probabilities over its heads to `total`, in place.

    `heads` restricts the mean to some query heads. Rows of queries that see no key are unchanged.
    Computed in float32, also under autocast.
    """
    for rows in _row_blocks(call, total, block):
        _add_rows(call, total, rows, mean_of_rows(call, rows, heads=heads), weight)


def add_weighed_mean(
    call: AttentionCall | AttentionWeights,
    total: Float[Tensor, "batch query key"],
    sums: Float[Tensor, "batch query"],
    lengths: Float[Tensor, "batch head key"],
    *,
    sizes: Float[Tensor, "batch head query"] | None = None,
    weight: float = 1.0,
    block: int = 64,
) -> None:
    """Add what `weighed_mean_of_rows` returns, times `weight`, to `total` and `sums`, in place.

    Once all calls have been added, `keep_sums` gives the rows of `total` the sums of the plain
    mean. Computed in float32, also under autocast.
    """
    for rows in _row_blocks(call, total, block):
        mean, had = weighed_mean_of_rows(call, rows, lengths, sizes=sizes)
        _add_rows(call, total, rows, mean, weight)
        sums[:, rows].add_(had.to(sums.device), alpha=weight)


def keep_sums(total: Float[Tensor, "batch row key"], sums: Float[Tensor, "batch row"]) -> None:
    """Scale the rows of `total` to these sums, in place; rows of zeros stay so."""
    after = total.sum(-1)
    total *= torch.where(after > 0, sums.to(total.device) / after, 0.0)[..., None]


def _row_blocks(
    call: AttentionCall | AttentionWeights, total: Float[Tensor, "batch query key"], block: int
) -> Iterator[slice]:
    # Some models pad the text at its end.
    queries = min(query_tensor(call).shape[2], total.shape[1])
    block = rows_at_once(call, block)
    for start in range(0, queries, block):
        yield slice(start, min(start + block, queries))


def rows_at_once(call: AttentionCall | AttentionWeights, block: int) -> int:
    """How many query rows of the call are computed at a time: `block`, or on the host fewer."""
    queries = query_tensor(call)
    if queries.device.type != "cpu":
        return block
    batch, heads = queries.shape[:2]
    return rows_on_host(4 * batch * heads * tokens_of(call), block)


def rows_on_host(row: int, block: int) -> int:
    """The most rows, up to `block`, with `row` bytes of scores each that do not exceed `SCORES`.

    For fewer than 16, reading all keys would take longer than the product.
    """
    return min(block, max(16, SCORES // row))


def _add_rows(
    call: AttentionCall | AttentionWeights,
    total: Float[Tensor, "batch query key"],
    rows: slice,
    mean: Float[Tensor, "batch rows seen"],
    weight: float,
) -> None:
    # The cache of a sliding window holds only the last keys; a static cache has spare room.
    first = max(0, total.shape[2] - tokens_of(call))
    columns = slice(first, first + mean.shape[-1])
    mean = mean[..., : total.shape[2] - first].to(total.device)
    total[:, rows, columns].add_(mean, alpha=weight)


@torch.no_grad()
def mean_of_rows(
    call: AttentionCall | AttentionWeights,
    rows: slice,
    *,
    heads: Int[Tensor, " chosen"] | None = None,
    keys: int | None = None,
) -> Float[Tensor, "batch rows seen"]:
    """The mean over heads for the query rows `rows`, in float32, also under autocast.

    Keys that none of these rows can see may be left out. `keys` says that the call sees only the
    first `keys` keys.
    """
    call = _normalized(call)
    with torch.autocast(query_tensor(call).device.type, enabled=False):
        return _to_tokens(call, row_probabilities(call, rows, heads, keys))


@torch.no_grad()
def weighed_mean_of_rows(
    call: AttentionCall | AttentionWeights,
    rows: slice,
    lengths: Float[Tensor, "batch head key"],
    *,
    heads: Int[Tensor, " chosen"] | None = None,
    keys: int | None = None,
    sizes: Float[Tensor, "batch head query"] | None = None,
) -> tuple[Float[Tensor, "batch rows seen"], Float[Tensor, "batch rows"]]:
    """The mean of each head's attention times `lengths`, and the rows' sums without `lengths`.

    `sizes` are factors of each head's rows.
    """
    call = _normalized(call)
    with torch.autocast(query_tensor(call).device.type, enabled=False):
        probabilities = row_probabilities(call, rows, heads, keys)
        sums = reduce(probabilities.sum(-1), "batch head query -> batch query", "mean")
        return _to_tokens(call, _weighed(probabilities, rows, lengths, heads, sizes)), sums


@torch.no_grad()
def heads_of_row(
    call: AttentionCall | AttentionWeights,
    row: int,
    lengths: Float[Tensor, "batch head key"] | None = None,
    *,
    heads: Int[Tensor, " chosen"] | None = None,
    keys: int | None = None,
    sizes: Float[Tensor, "batch head query"] | None = None,
) -> tuple[Float[Tensor, "batch chosen seen"], Float[Tensor, " batch"]]:
    """What each head adds to one row of `weighed_mean_of_rows`, or of `mean_of_rows`, as a sum.

    Without `lengths`, it is the plain probability. The mean sum of these follows.
    """
    call, rows = _normalized(call), slice(row, row + 1)
    with torch.autocast(query_tensor(call).device.type, enabled=False):
        found = row_probabilities(call, rows, heads, keys)
        had = found.sum(-1).mean((1, 2))
        if lengths is not None:
            found = _weighed(found, rows, lengths, heads, sizes)
        if isinstance(call, AttentionCall) and call.key_tokens is not None:
            found = found @ call.key_tokens[:, None, : found.shape[-1]].float()
        return found[:, :, 0], had


def _weighed(
    probabilities: Float[Tensor, "batch head rows key"],
    rows: slice,
    lengths: Float[Tensor, "batch _ _"],
    heads: Int[Tensor, " chosen"] | None,
    sizes: Float[Tensor, "batch _ _"] | None,
) -> Float[Tensor, "batch head rows key"]:
    chosen = lengths if heads is None else lengths[:, heads]
    weighed = probabilities * chosen[:, :, None, : probabilities.shape[-1]]
    if sizes is not None:
        factors = (sizes if heads is None else sizes[:, heads])[..., rows]
        weighed *= factors[..., None].to(weighed.device)
    return weighed


def _to_tokens(
    call: AttentionCall | AttentionWeights, probabilities: Float[Tensor, "batch head rows key"]
) -> Float[Tensor, "batch rows seen"]:
    """The mean over heads, with the probabilities of keys divided among their tokens."""
    mean = reduce(probabilities, "batch head query key -> batch query key", "mean")
    if isinstance(call, AttentionCall) and call.key_tokens is not None:
        mean = mean @ call.key_tokens[:, : mean.shape[-1]].float()
    return mean


@torch.no_grad()
def attention_output(
    call: AttentionCall | AttentionWeights,
) -> Float[Tensor, "batch query head value_width"]:
    """Probabilities times values, as the model mixes them, in float32."""
    assert call.value is not None
    with torch.autocast(query_tensor(call).device.type, enabled=False):
        probabilities = row_probabilities(call, slice(0, query_tensor(call).shape[2]))
        value = call.value[:, :, : probabilities.shape[-1]].detach().float()
        folded = rearrange(
            probabilities, "b (group each) q k -> b group (each q) k", group=value.shape[1]
        )
        return rearrange(
            folded @ value,
            "b group (each q) width -> b q (group each) width",
            q=probabilities.shape[2],
        )


def one_text(call: AttentionCall | AttentionWeights, text: int) -> AttentionCall | AttentionWeights:
    """The call of one text of a batch, as a batch of one."""
    parts: dict[str, Any] = {
        field.name: part[text : text + 1]
        for field in fields(call)
        if isinstance(part := getattr(call, field.name), Tensor)
        and part.ndim > 1
        and part.shape[0] > 1
    }
    return replace(call, **parts)


def query_tensor(call: AttentionCall | AttentionWeights) -> Tensor:
    """The queries or, in their place, the weights: a tensor `[batch, head, query, …]`."""
    return call.weights if isinstance(call, AttentionWeights) else call.query


def token_probabilities(
    call: AttentionCall | AttentionWeights, rows: slice, tokens: int
) -> Float[Tensor, "batch head rows seen"]:
    """The attention of each head from the query rows `rows` to the first `tokens` tokens.

    `add_head_mean` averages the same numbers. The first key must be the text's first token. Tokens
    that the rows cannot see may be left out.
    """
    with torch.no_grad():
        probabilities = row_probabilities(_normalized(call), rows)
        if isinstance(call, AttentionCall) and call.key_tokens is not None:
            shares = call.key_tokens[:, None, : probabilities.shape[-1]].float()
            probabilities = probabilities @ shares
        return probabilities[..., :tokens]


def _normalized(call: AttentionCall | AttentionWeights) -> AttentionCall | AttentionWeights:
    """The call, without its sinks if the keys get the share of the sinks."""
    if isinstance(call, AttentionCall) and call.normalized:
        return replace(call, sinks=None)
    return call


def tokens_of(call: AttentionCall | AttentionWeights) -> int:
    """The number of tokens that the keys stand for."""
    if isinstance(call, AttentionWeights):
        return call.weights.shape[3]
    return call.key.shape[2] if call.key_tokens is None else call.key_tokens.shape[2]


def row_probabilities(
    call: AttentionCall | AttentionWeights,
    rows: slice,
    heads: Int[Tensor, " chosen"] | None = None,
    keys: int | None = None,
) -> Float[Tensor, "batch head rows seen"]:
    """The probabilities of the query rows `rows`, in float32.

    Keys that none of these rows can see may be left out. `keys` says that the call sees only the
    first `keys` keys.
    """
    if isinstance(call, AttentionWeights):
        every = slice(None) if heads is None else heads
        return call.weights[:, every, rows].detach().float()
    causal = call.mask is None and call.causal and call.query.shape[2] > 1
    seen = rows.stop if causal else _seen(call, rows, keys)
    scores = _scores(call, rows, seen, heads)
    sinks = _sink_column(call, rows, heads)
    if causal:  # only the square on the diagonal needs a mask, and every query sees itself
        square = scores[..., rows.start :]
        square.masked_fill_(_later(square), -torch.inf)
        return _softmax(scores, sinks)
    if call.mask is None:
        return _softmax(scores, sinks)
    blocked = _blocked(_block(call.mask, rows, seen, heads))
    probabilities = _softmax(scores.masked_fill_(blocked, -torch.inf), sinks)
    return probabilities.masked_fill_(blocked.all(-1, keepdim=True), 0.0)


def _seen(call: AttentionCall, rows: slice, keys: int | None) -> int:
    """The number of keys to compute: those after the rows' end are left out if the mask hides them.

    This check costs a fraction of the scores that it saves. On an accelerator it is not made,
    because the host would have to wait for the device.
    """
    every = call.key.shape[2]
    if keys is not None:
        return min(keys, every)
    if call.mask is None or call.mask.device.type != "cpu" or call.key_tokens is not None:
        return every
    beyond = _block(call.mask, rows, every, None)[..., rows.stop :]
    return min(rows.stop, every) if bool(_blocked(beyond).all()) else every


def _later(square: Float[Tensor, "*batch row row"]) -> Bool[Tensor, "row row"]:
    """The places above the diagonal."""
    size = square.shape[-2:]
    return torch.ones(size, dtype=torch.bool, device=square.device).triu_(1)


def _scores(
    call: AttentionCall, rows: slice, seen: int, heads: Int[Tensor, " chosen"] | None
) -> Float[Tensor, "batch head rows seen"]:
    query, key = call.query[:, :, rows].detach().float(), call.key[:, :, :seen].detach().float()
    if heads is not None:
        key = key[:, heads // (query.shape[1] // key.shape[1])]
        query = query[:, heads]
    # Query heads are folded into the key head that they share, so that no key is repeated.
    groups = key.shape[1]
    folded = rearrange(
        query, "batch (group each) query width -> batch group (each query) width", group=groups
    )
    scores = torch.matmul(folded * call.scaling, key.mT)
    scores = rearrange(scores, "b group (each q) k -> b (group each) q k", q=query.shape[2])
    if call.softcap is not None:
        scores = scores.div_(call.softcap).tanh_().mul_(call.softcap)
    for added in (call.bias, call.mask):
        if added is not None and added.dtype != torch.bool:
            scores += _block(added, rows, seen, heads)
    return scores


def _blocked(mask: Float[Tensor, "..."] | Bool[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """The places that a mask hides from a query."""
    if mask.dtype == torch.bool:
        return ~mask
    # Additive masks hide a key with the most negative number of their dtype, or close to it.
    return mask <= torch.finfo(mask.dtype).min / 2


def _block(
    added: Float[Tensor, "..."] | Bool[Tensor, "..."],
    rows: slice,
    seen: int,
    heads: Int[Tensor, " chosen"] | None,
) -> Float[Tensor, "..."] | Bool[Tensor, "..."]:
    """The part of a mask or bias that belongs to these rows and heads; axes of one broadcast."""
    if heads is not None and added.shape[1] > 1:
        added = added[:, heads]
    # The mask of a static cache may be longer than the keys, and the model cuts it to them.
    return added[:, :, rows if added.shape[2] > 1 else slice(None), :seen]


def _sink_column(
    call: AttentionCall, rows: slice, heads: Int[Tensor, " chosen"] | None
) -> Float[Tensor, "#batch #head #rows 1"] | None:
    if call.sinks is None:
        return None
    sinks = call.sinks if call.sinks.ndim == 4 else call.sinks[None, :, None, None]
    return _block(sinks, rows, 1, heads).detach().float()


def _softmax(
    scores: Float[Tensor, "batch head rows seen"],
    sinks: Float[Tensor, "#batch #head #rows 1"] | None,
) -> Float[Tensor, "batch head rows seen"]:
    if sinks is None:  # in place: a second tensor of this size takes longer than its numbers
        return torch.softmax(scores, -1, out=scores)
    column = sinks.expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
