"""How far each head's values move the residual stream: `‖W_O v‖`, by head and key.

A head adds attention times this length to the stream, so attention to a token with a short value
moves little (Kobayashi et al. 2020, arXiv 2004.10102).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flowtracer_plugin.attention.adapter import (
    AttentionCall,
    AttentionSite,
    AttentionWeights,
    UnsupportedArchitectureError,
)
from flowtracer_plugin.attention.head_mean import attention_output
from flowtracer_plugin.attention.rounding import difference, rounding

Projections = Mapping[AttentionSite, nn.Module | None]
"""For each site, the linear map of its attention output, all heads side by side, or None."""


@torch.no_grad()
def value_lengths(
    call: AttentionCall | AttentionWeights, projection: nn.Module | None
) -> Float[Tensor, "batch head key"]:
    """`‖W_O v‖` of every query head and key, float32; query heads share the values of their group.

    Without a projection, it is `‖v‖`.

    Raises:
        UnsupportedArchitectureError: The projection's weights are in other processes.
    """
    value = call.value
    assert value is not None, "find_projections refuses calls without values"
    heads = (call.weights if isinstance(call, AttentionWeights) else call.query).shape[1]
    if projection is None:
        lengths = value.detach().float().norm(dim=-1)
        return repeat(lengths, "b group key -> b (group each) key", each=heads // value.shape[1])
    with torch.autocast(value.device.type, enabled=False):
        each = rearrange(
            _matrix(projection, value, heads).to(value.device),
            "(group each width) out -> group each width out",
            group=value.shape[1],
            width=value.shape[3],
        )
        # `v G v` with the Gram matrix, so that no vector of the stream's width is made per key.
        gram = einsum(each, each, "group each width out, group each v out -> group each width v")
        moved = einsum(
            value.detach().float(),
            gram,
            "b group key width, group each width v -> b group each key v",
        )
        squares = (moved * value.detach().float()[:, :, None]).sum(-1)
    return rearrange(squares.clamp_min(0.0).sqrt(), "b group each key -> b (group each) key")


def _matrix(projection: nn.Module, value: Tensor, heads: int) -> Float[Tensor, "inputs out"]:
    """The matrix of a linear map, float32: its weights, or its outputs for the unit vectors."""
    weight: Any = getattr(projection, "weight", None)
    if hasattr(weight, "ds_id"):
        raise UnsupportedArchitectureError(
            "edges='value' needs the weights of the output projections, which ZeRO-3 keeps in "
            "other processes; use edges='attention', or another stage of ZeRO"
        )
    plain = type(projection) in (nn.Linear, Conv1D) and type(weight) in (nn.Parameter, Tensor)
    if plain and not weight.is_meta and not vars(projection).get("_hf_hook"):
        return (weight.T if isinstance(projection, nn.Linear) else weight).detach().float()
    # Quantized, adapted or offloaded weights can be used only through the module.
    inputs = heads * value.shape[3]
    basis = torch.eye(inputs, dtype=value.dtype, device=value.device)
    with _without_dropout(projection):
        moved, bias = projection(basis), projection(torch.zeros_like(basis[:1]))
    return (moved - bias).detach().float()


@contextmanager
def _without_dropout(projection: nn.Module) -> Iterator[None]:
    """The map in evaluation mode, also during a forward pass in training mode."""
    training = [module for module in projection.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def find_projections(
    run: Callable[[Callable[..., None]], Any],
    read: Callable[..., AttentionCall | AttentionWeights],
    model: nn.Module,
    sites: Sequence[AttentionSite],
) -> Projections:
    """The linear maps whose input is the unchanged attention output, found in one run of the model.

    Args:
        run: Runs the model on a short text without padding, and calls its argument at each site.
        read: Returns the attention call of a site, given the arguments that it received.
        model: The model.
        sites: The places where it attends.

    Raises:
        UnsupportedArchitectureError: A site's output is gated, normalised or mixed first, or its
            values are not read.
    """
    found: dict[AttentionSite, nn.Module] = {}
    waiting: list[tuple[AttentionSite, Tensor, float]] = []

    def receive(site: AttentionSite, args: Any, kwargs: Any, _output: Any) -> None:
        call = read(site, args, kwargs)
        waiting.clear()
        if call.value is not None:
            waiting.append((site, attention_output(call).flatten(2), rounding(call.value)))

    def look(module: nn.Module, args: Any) -> None:
        for site, wanted, tolerance in waiting[:1]:
            given = args[0] if args else None
            if not isinstance(given, Tensor) or given.numel() != wanted.numel():
                return
            if difference(given.reshape(wanted.shape), wanted) <= tolerance:
                found[site] = module
                waiting.clear()

    with _watched(model, look):
        run(receive)
    for site in sites:
        if site not in found:
            raise UnsupportedArchitectureError(
                f"edges='value' needs the projection of the heads' values, and in {site.module} no "
                "linear layer takes the unchanged attention output: it is gated, normalised or "
                "mixed before; use edges='attention'"
            )
    return found


@contextmanager
def _watched(model: nn.Module, look: Callable[[nn.Module, Any], None]) -> Iterator[None]:
    """A context in which `look` is called before each linear layer of the model."""
    with ExitStack() as hooks:
        for module in model.modules():
            if hasattr(module, "in_features") or isinstance(module, Conv1D):
                hooks.callback(module.register_forward_pre_hook(look).remove)
        yield
