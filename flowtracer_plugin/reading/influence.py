"""How strongly each head's output, in each row, decided the sampled tokens: one backward pass.

The log-odds of a sampled token, `λ = log p − log(1 − p)`, still tell apart two tokens of which the
model is nearly certain, where `log p` does not. The gradient of their sum with respect to a head's
output `o`, before the output projection, says how far that row's decisions hang on the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from flowtracer_plugin.attention.adapter import UnsupportedArchitectureError
from flowtracer_plugin.model.causal_lm import (
    embeddings_as_leaves,
    evaluating,
    first_output,
    text_inputs,
)
from flowtracer_plugin.model.padding import text_first
from flowtracer_plugin.model.parallel import may_stop, tensor_parallel_group

Influence = Float[Tensor, "batch head token"]


def influences(
    model: nn.Module,
    projections: Sequence[nn.Module | None],
    heads: Sequence[int],
    ids: Int[Tensor, "batch token"],
    visible: Bool[Tensor, "batch token"],
    decided: Bool[Tensor, "batch token"],
) -> tuple[Influence, ...]:
    """`‖∂ Σ λ / ∂ o‖` of every head and row of each layer, float32, 0 at padding.

    It takes a forward pass without dropout and a backward pass that changes no gradient of a
    parameter.

    Args:
        model: The model.
        projections: For each layer, the linear map that takes its attention output.
        heads: The number of heads of each layer.
        ids: The texts.
        visible: False on padding, wherever it is.
        decided: The sampled tokens whose log-odds are summed.

    Raises:
        UnsupportedArchitectureError: The model cannot make a backward pass of its own.
    """
    check_backward(model)
    ordered_ids, ordered = text_first(ids, visible)
    asked = torch.zeros_like(ordered)
    asked[ordered] = decided[visible]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(evaluating(model))
        outputs = stack.enter_context(_outputs(model, projections))
        row, place = asked[:, 1:].nonzero(as_tuple=True)
        logits = first_output(model(**text_inputs(model, ordered_ids, ordered)))[row, place].float()
        total = log_odds(logits, ordered_ids[row, place + 1].to(logits.device)).sum()
        reached = [outputs[number] for number in range(len(projections)) if number in outputs]
        if len(reached) < len(projections) or not all(one.requires_grad for one in reached):
            raise without_gradients(model)
        gradients = torch.autograd.grad(total, reached)
    found = []
    for gradient, count in zip(gradients, heads, strict=True):
        placed = torch.zeros(*ids.shape, count, device=gradient.device)
        placed[visible] = _lengths(gradient, count, ordered)[ordered]
        found.append(placed.transpose(1, 2))
    return tuple(found)


def log_odds(
    logits: Float[Tensor, "token vocabulary"], chosen: Int[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """`log p − log(1 − p)` of the chosen tokens; `1 − p` is summed over the others, not rounded."""
    others = logits.scatter(-1, chosen[:, None], -torch.inf)
    return logits.gather(-1, chosen[:, None])[:, 0] - others.logsumexp(-1)


def check_backward(model: nn.Module, edges: str = "influence") -> None:
    """Refuse models that cannot run the backward pass of their own that such edges need.

    Raises:
        UnsupportedArchitectureError: Parameters are spread over processes, or offloaded.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise without_gradients(model, edges)
    if not may_stop(model) or tensor_parallel_group(model) is not None:
        raise UnsupportedArchitectureError(
            f"edges={edges!r} needs a forward and a backward pass of its own, which a sharded or "
            "offloaded model cannot make; use edges='value' (preset='decided')"
        )


def without_gradients(model: nn.Module, edges: str = "influence") -> UnsupportedArchitectureError:
    """The error of a model in which attention's output has no gradient."""
    return UnsupportedArchitectureError(
        f"edges={edges!r} needs the gradient at the attention's output, and in "
        f"{type(model).__name__} there is none: it is quantized without gradients, or was loaded "
        "in inference mode; use edges='value' (preset='decided')"
    )


def _lengths(
    gradient: Tensor, heads: int, ordered: Bool[Tensor, "batch most"]
) -> Float[Tensor, "batch most head"]:
    return gradient.detach().float().reshape(*ordered.shape, heads, -1).norm(dim=-1)


@contextmanager
def _outputs(
    model: nn.Module, projections: Sequence[nn.Module | None]
) -> Iterator[dict[int, Tensor]]:
    """The attention output of each layer, by its place in `projections`, once the model has run."""
    kept: dict[int, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(embeddings_as_leaves(model))
        for number, projection in enumerate(projections):

            def keep(_module: nn.Module, args: Any, number: int = number) -> None:
                kept[number] = args[0]

            if projection is not None:
                stack.callback(projection.register_forward_pre_hook(keep).remove)
        yield kept
