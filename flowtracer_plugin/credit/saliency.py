"""Gradient times input: the first-order effect of each token's embedding on the answer."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from flowtracer_plugin.attention.adapter import UnsupportedArchitectureError
from flowtracer_plugin.model.causal_lm import first_output, text_inputs
from flowtracer_plugin.model.padding import in_front, moved_back, text_first
from flowtracer_plugin.model.parallel import may_stop, tensor_parallel_group
from flowtracer_plugin.reading.influence import own_graph


def answer_saliency(
    model: nn.Module,
    ids: Int[Tensor, "batch token"],
    visible: Bool[Tensor, "batch token"],
    answer: Bool[Tensor, "batch token"],
    *,
    batch_size: int | None = None,
) -> Float[Tensor, "batch token"]:
    """`‖∂ log p(answer) / ∂x‖ · ‖x‖` at the embedding `x` of every token, float32, 0 at padding.

    `log p` is the sum over the answer's tokens, each given all tokens before it (Li et al. 2016,
    arXiv 1506.01066). The product of the two lengths found more of the tokens that answers depend
    on than the absolute dot product. It takes a forward pass without dropout and a backward pass
    that does not change the gradients of the parameters.

    Raises:
        UnsupportedArchitectureError: The model's parameters are spread over several processes.
    """
    check_whole(model)
    found = torch.zeros(ids.shape, device=ids.device)
    size = batch_size or len(ids)
    for start in range(0, len(ids), size):
        rows = slice(start, start + size)
        if bool(answer[rows].any()):
            found[rows] = _of_batch(model, ids[rows], visible[rows], answer[rows])
    return found


def check_whole(model: nn.Module) -> None:
    """Refuse models that cannot run additional passes.

    Raises:
        UnsupportedArchitectureError: Parameters are spread over processes, or offloaded.
    """
    if not may_stop(model) or tensor_parallel_group(model) is not None:
        raise UnsupportedArchitectureError(
            "the scorers 'grad_x_input', 'oar', 'counterfactual', 'causal' and 'flow:causal' need "
            "passes of their own, which a sharded or offloaded model cannot run between others; "
            "choose another scorer"
        )


def _of_batch(model: nn.Module, ids: Tensor, visible: Tensor, answer: Tensor) -> Tensor:
    # Padding on the left would shift learned positions.
    ordered_ids, ordered = text_first(ids, visible)
    asked = in_front(answer, visible, ordered)
    with own_graph(model) as embedded:
        row, place = asked[:, 1:].nonzero(as_tuple=True)
        logits = first_output(model(**text_inputs(model, ordered_ids, ordered)))[row, place].float()
        chances = logits.log_softmax(-1)
        total = chances.gather(-1, ordered_ids[row, place + 1, None]).sum()
        (gradient,) = torch.autograd.grad(total, embedded)
    lengths = gradient.float().norm(dim=-1) * embedded[0].detach().float().norm(dim=-1)
    return moved_back(lengths, visible).to(ids.device)
