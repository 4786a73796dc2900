"""Models that call transformers' attention interface: nearly all of them."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import nn

from flowtracer_adapters.masks import visible_keys
from flowtracer_adapters.source import code, definition, layer_number, text_attention
from flowtracer_plugin.attention import AttentionAdapter, AttentionCall, AttentionSite

DISPATCHER = "ALL_ATTENTION_FUNCTIONS"
"""The table from which a module's `forward` takes the configured attention function."""


@final
class InterfaceAdapter(AttentionAdapter):
    """Finds every module whose `forward` takes its attention function from transformers' table.

    The call has the signature `function(module, query, key, value, attention_mask, **options)`,
    whichever implementation is configured.
    """

    name: ClassVar[str] = "interface"
    generic: ClassVar[bool] = True
    interface: ClassVar[bool] = True

    def matches(self, model: nn.Module) -> bool:
        return bool(self.sites(model))

    def sites(self, model: nn.Module) -> tuple[AttentionSite, ...]:
        return interface_sites(model)

    def read(
        self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> AttentionCall:
        return interface_call(module, args, kwargs)


def interface_sites(model: nn.Module) -> tuple[AttentionSite, ...]:
    """Every call of the attention interface between tokens of the text, in layer order."""
    found = [(p, m, name) for p, m in text_attention(model) if (name := _function(type(m)))]
    # In a model with causal attention, all other modules attend to an encoder or to an image.
    causal = [entry for entry in found if getattr(entry[1], "is_causal", True)]
    paths: dict[nn.Module, str] = {}
    times, visits = Counter(module for _, module, _ in found), Counter[nn.Module]()
    sites: dict[tuple[nn.Module, int], AttentionSite] = {}
    for path, module, function in causal or found:
        first = paths.setdefault(module, path)
        layer = layer_number(path, module, shared=times[module] > 1)
        if layer is None or (module, layer) in sites:
            continue
        # A module that several layers share is run once for each of them.
        site = AttentionSite(layer=layer, module=first, function=function, visit=visits[module])
        sites[module, layer] = site
        visits[module] += 1
    return tuple(sorted(sites.values(), key=lambda site: site.layer))


def interface_call(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> AttentionCall:
    """The attention call, from the arguments of the attention interface."""
    query, key, value = args[1:4]
    mask = args[4] if len(args) > 4 else kwargs.get("attention_mask")
    scaling = kwargs.get("scaling")
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        mask=visible_keys(module, query, key, mask, kwargs),
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=kwargs.get("softcap"),
        bias=kwargs.get("position_bias"),
        sinks=_sinks(module, kwargs),
        causal=_causal(module, kwargs),
    )


def _function(module_type: type[nn.Module]) -> str | None:
    """The name of `forward`'s variable for the function from the table; None if it takes none."""
    compiled = code(module_type.forward)
    if compiled is None or DISPATCHER not in compiled.co_names:
        return None
    for node in ast.walk(definition(module_type.forward) or ast.Pass()):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            names = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if DISPATCHER in names and isinstance(target, ast.Name):
                return target.id
    return "attention_interface"  # without source: the name that transformers uses everywhere


def _sinks(module: nn.Module, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    for sinks in (kwargs.get("sinks"), kwargs.get("s_aux"), getattr(module, "sinks", None)):
        if isinstance(sinks, torch.Tensor):
            return sinks if sinks.ndim == 4 else sinks.reshape(-1)
    return None


def _causal(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    stated = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if stated is None else stated)
