"""Attention from derivatives by the values: for models that report other probabilities, or none.

An attention output is linear in the values, so its derivative by them is the probability that the
model used, whatever came between the softmax and the product: sinks, rounds of hashing, chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.conformance.reported import model_inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """Where a model attends.

    Attributes:
        module: Dotted path of the attention module of a layer, with `{}` for its number.
        value: The submodule that computes the values.
        output: The submodule that takes the attention output; if empty, the module returns it.
    """

    module: str
    value: str
    output: str = ""


PROBES = {
    "granite_swa": Probe(module="model.layers.{}.self_attn", value="v_proj", output="o_proj"),
    "granitemoe_swa": Probe(module="model.layers.{}.self_attn", value="v_proj", output="o_proj"),
    "reformer": Probe(module="reformer.encoder.layers.{}.attention.self_attention", value="value"),
}
"""Types whose own report cannot be compared; `NOTES` says why."""


def probed_attention(
    twin: PreTrainedModel,
    ids: Int[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    probe: Probe,
) -> dict[int, Float[Tensor, "batch head query key"]]:
    """Probabilities by layer, from a second run of each attention module on the same inputs."""
    modules = dict(enumerate(_modules(twin, probe)))
    with torch.no_grad(), _arguments(modules) as arguments:
        twin(**model_inputs(twin, ids, mask))
    heads, tokens = twin.config.num_attention_heads, ids.shape[1]
    return {  # some models pad the text behind its end
        layer: _derivative(module, probe, heads, *arguments[layer])[:, :, :tokens, :tokens]
        for layer, module in modules.items()
    }


def _derivative(
    module: nn.Module, probe: Probe, heads: int, args: Any, kwargs: Any
) -> Float[Tensor, "batch head query key"]:
    """The derivative of one channel of each head, another one for heads that share values."""
    with torch.enable_grad(), _tapped(module, probe) as tapped:
        returned = module(*args, **kwargs)
        output = tapped.get("output", returned[0])
    value = tapped["value"]
    split = rearrange(output, "batch query (head width) -> query batch head width", head=heads)
    each = output.shape[-1] // value.shape[-1]
    head = torch.arange(heads)
    rows = []
    for query in split:
        (moved,) = torch.autograd.grad(query[:, head, head % each].sum(), value, retain_graph=True)
        groups = rearrange(
            moved, "batch key (group width) -> batch group key width", width=split.shape[-1]
        )
        rows.append(groups[:, head // each, :, head % each])
    return rearrange(torch.stack(rows), "query head batch key -> batch head query key").double()


@contextmanager
def _arguments(modules: dict[int, nn.Module]) -> Iterator[dict[int, tuple[Any, Any]]]:
    """A dictionary that fills with the arguments of each module."""
    seen: dict[int, tuple[Any, Any]] = {}
    with ExitStack() as hooks:
        for layer, module in modules.items():
            hook = module.register_forward_pre_hook(
                lambda _, args, kwargs, layer=layer: seen.update(
                    {layer: (args, _uncached(kwargs))}
                ),
                with_kwargs=True,
            )
            hooks.callback(hook.remove)
        yield seen


def _uncached(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments without the cache that the first run has filled."""
    return {name: value for name, value in kwargs.items() if name != "past_key_values"}


@contextmanager
def _tapped(module: nn.Module, probe: Probe) -> Iterator[dict[str, Tensor]]:
    """Make the values a leaf of the graph, and keep the attention output."""
    tapped: dict[str, Tensor] = {}

    def value(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        tapped["value"] = output.detach().requires_grad_()
        return tapped["value"]

    def output(_module: nn.Module, args: Any) -> None:
        tapped["output"] = args[0]

    with ExitStack() as hooks:
        hooks.callback(module.get_submodule(probe.value).register_forward_hook(value).remove)
        if probe.output:
            taker = module.get_submodule(probe.output)
            hooks.callback(taker.register_forward_pre_hook(output).remove)
        yield tapped


def _modules(twin: PreTrainedModel, probe: Probe) -> Iterator[nn.Module]:
    for layer in range(twin.config.num_hidden_layers):
        yield twin.get_submodule(probe.module.format(layer))
