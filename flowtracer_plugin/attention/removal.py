"""What an answer loses, to first order, when a row of attention loses one of its keys.

If row `i` of a head stops attending to key `j` and the softmax spreads `a_ij` over its other keys,
the head's output moves from `o` to `(o − a_ij v_j) / (1 − a_ij)`, that is, by
`a_ij (o − v_j) / (1 − a_ij)`. With the gradient `∂o` of the answer's log-probability, the answer
loses `a_ij (∂o · v_j − ∂o · o) / (1 − a_ij)`. No gradient of attention, and no eager attention, is
needed for that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from flowtracer_plugin.attention.adapter import AttentionCall, AttentionWeights
from flowtracer_plugin.attention.head_mean import query_tensor, row_probabilities

ROUNDED = 1e-6
"""The share of a sink below which its float32 number is rounding."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class FeltCall:
    """An attention call, its output, and how the answer's log-probability moves with the output.

    Attributes:
        call: The call, with its values.
        output: The heads' outputs before the output projection.
        gradient: The gradient at these outputs, in nats.
    """

    call: AttentionCall | AttentionWeights
    output: Float[Tensor, "batch query head value_width"]
    gradient: Float[Tensor, "batch query head value_width"]


@torch.no_grad()
def removal_losses(felt: FeltCall, rows: slice, tokens: int) -> Float[Tensor, "batch rows token"]:
    """What the answer loses by each edge from the first `tokens` tokens to some rows, in nats.

    It is summed over the heads, in float32. Edges of a token to itself count, too; keys that no
    row sees are 0.
    """
    call = felt.call
    assert call.value is not None, "find_projections refuses calls without values"
    whole = isinstance(call, AttentionCall) and call.key_tokens is not None
    with torch.autocast(query_tensor(call).device.type, enabled=False):
        paid = row_probabilities(call, rows, keys=None if whole else tokens)
        gradient, output = felt.gradient[:, rows].float(), felt.output[:, rows].float()
        value = call.value[:, :, : paid.shape[-1]].detach().float()
        # Query heads are folded into the values that they share, so that no value is repeated.
        folded = rearrange(
            gradient, "b q (group each) width -> b group (each q) width", group=value.shape[1]
        )
        felt_keys = rearrange(
            folded @ value.mT, "b group (each q) key -> b (group each) q key", q=paid.shape[2]
        )
        felt_row = rearrange((gradient * output).sum(-1), "b q head -> b head q 1")
        lost = _lost(paid, felt_keys, felt_row, with_sinks=_has_sinks(call))
        total = reduce(lost, "b head q key -> b q key", "sum")
        if isinstance(call, AttentionCall) and call.key_tokens is not None:
            total = total @ call.key_tokens[:, : total.shape[-1]].float()
    found = total.new_zeros(*total.shape[:2], tokens)
    seen = min(tokens, total.shape[-1])
    found[..., :seen] = total[..., :seen]
    return found


def _lost(
    paid: Float[Tensor, "batch head row key"],
    felt_keys: Float[Tensor, "batch head row key"],
    felt_row: Float[Tensor, "batch head row 1"],
    *,
    with_sinks: bool,
) -> Float[Tensor, "batch head row key"]:
    """What the answer loses by each key of each head.

    If a row attends to one key almost alone, `1 − a` and `∂o · v − ∂o · o` are rounded away. What
    is left to its other keys is therefore summed over these. A row with a single key has nothing to
    renormalise, and loses nothing.
    """
    most = paid.argmax(-1, keepdim=True)
    others = paid.scatter(-1, most, 0.0)
    left, felt_left = others.sum(-1, keepdim=True), (others * felt_keys).sum(-1, keepdim=True)
    if with_sinks:  # they take part in the softmax, and move nothing
        rest = 1 - paid.sum(-1, keepdim=True)
        left = left + rest.where(rest > ROUNDED, 0.0)
    share, felt = paid.gather(-1, most), felt_keys.gather(-1, most)
    most_lost = torch.where(left > 0, share * (felt - felt_left / left), 0.0)
    # All other keys have at most half of the row.
    return (felt_keys - felt_row).mul_(others).div_(1 - others).scatter_(-1, most, most_lost)


def _has_sinks(call: AttentionCall | AttentionWeights) -> bool:
    return isinstance(call, AttentionWeights) or call.sinks is not None
