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

LEAST_LEFT = 1e-6
"""A row that attends to one key alone has nothing to renormalise: its edge is 0 then, where
rounding would divide 0 by 0."""


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
        lost = (felt_keys - felt_row).mul_(paid).div_((1 - paid).clamp_min_(LEAST_LEFT))
        total = reduce(lost, "b head q key -> b q key", "sum")
        if isinstance(call, AttentionCall) and call.key_tokens is not None:
            total = total @ call.key_tokens[:, : total.shape[-1]].float()
    found = total.new_zeros(*total.shape[:2], tokens)
    seen = min(tokens, total.shape[-1])
    found[..., :seen] = total[..., :seen]
    return found
