"""Models that call transformers' attention interface: nearly all of them."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import nn

from flowtracer_plugin.attention import AttentionAdapter, AttentionCall, AttentionSite

DISPATCHER = "ALL_ATTENTION_FUNCTIONS"
"""The table from which a module's `forward` takes the attention function that is configured."""


@final
class InterfaceAdapter(AttentionAdapter):
    """Finds every module whose `forward` takes its attention function from transformers' table.

    The call has the signature `function(module, query, key, value, attention_mask, **options)`,
    whichever implementation is configured.
    """

    name: ClassVar[str] = "interface"
    generic: ClassVar[bool] = True

    def matches(self, model: nn.Module) -> bool:
        return bool(self.sites(model))

    def sites(self, model: nn.Module) -> tuple[AttentionSite, ...]:
        found = [(module, _site(path, module)) for path, module in model.named_modules()]
        sites = [(module, site) for module, site in found if site]
        # Beside causal attention, the other kind looks at an encoder's states or at an image.
        causal = [site for module, site in sites if getattr(module, "is_causal", True)]
        chosen = causal or [site for _, site in sites]
        return tuple(sorted(chosen, key=lambda site: site.layer))

    def read(
        self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> AttentionCall:
        query, key, value = args[1:4]
        mask = args[4] if len(args) > 4 else kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 4):
            raise NotImplementedError(
                "wanted an attention mask of shape [batch, head, query, key], found "
                f"{type(mask).__name__}{list(getattr(mask, 'shape', []))}: flash and flex "
                "attention keep their mask to themselves; load the model with "
                'attn_implementation="sdpa"'
            )
        scaling = kwargs.get("scaling")
        return AttentionCall(
            query=query,
            key=key,
            value=value,
            mask=mask,
            scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            softcap=kwargs.get("softcap"),
            bias=kwargs.get("position_bias"),
            sinks=_sinks(module, kwargs),
            causal=_causal(module, kwargs),
        )


def _site(path: str, module: nn.Module) -> AttentionSite | None:
    function = _attention_function(type(module))
    layer = getattr(module, "layer_idx", None)
    if function is None or layer is None or getattr(module, "is_cross_attention", False):
        return None
    return AttentionSite(layer=layer, module=path, function=function)


def _attention_function(module_type: type[nn.Module]) -> str | None:
    """The name that `forward` gives to the function from the table, if it takes one."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(module_type.forward)))
    except (OSError, TypeError):  # built at run time or compiled: nothing to look at
        return None
    if DISPATCHER not in source:
        return None
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            names = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if DISPATCHER in names and isinstance(target, ast.Name):
                return target.id
    return None


def _sinks(module: nn.Module, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    for sinks in (kwargs.get("sinks"), kwargs.get("s_aux"), getattr(module, "sinks", None)):
        if isinstance(sinks, torch.Tensor):
            return sinks if sinks.ndim == 4 else sinks.reshape(-1)
    return None


def _causal(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    stated = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if stated is None else stated)
