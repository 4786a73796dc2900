"""Models that call PyTorch's `scaled_dot_product_attention` themselves."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from torch import nn

from flowtracer_adapters.source import calls, code, definition, dotted, layer_number, text_attention
from flowtracer_plugin.attention import (
    AttentionAdapter,
    AttentionCall,
    AttentionSite,
    AttentionWeights,
)

FUNCTION = "scaled_dot_product_attention"
_PARAMETERS = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in {
            "query": inspect.Parameter.empty,
            "key": inspect.Parameter.empty,
            "value": inspect.Parameter.empty,
            "attn_mask": None,
            "dropout_p": 0.0,
            "is_causal": False,
            "scale": None,
            "enable_gqa": False,
        }.items()
    ]
)
"""The parameters of PyTorch's function, which is built in and has no signature."""


@final
class TorchAttentionAdapter(AttentionAdapter):
    """Finds every module whose `forward` calls PyTorch's function in exactly one place."""

    name: ClassVar[str] = "torch_sdpa"
    generic: ClassVar[bool] = True

    def matches(self, model: nn.Module) -> bool:
        return bool(self.sites(model))

    def sites(self, model: nn.Module) -> tuple[AttentionSite, ...]:
        found = {m: (p, _written(type(m))) for p, m in reversed([*text_attention(model)])}
        single = [(m, path, names[0]) for m, (path, names) in found.items() if len(names) == 1]
        numbers = [layer_number(path, module) for module, path, _ in single]
        sites = (
            AttentionSite(layer=number, module=path, function=name)
            for (_, path, name), number in zip(single, numbers, strict=True)
            if number is not None
        )
        return tuple(sorted(sites, key=lambda site: site.layer))

    def read(
        self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> AttentionCall:
        return torch_call(args, kwargs)


@final
class FalconAdapter(AttentionAdapter):
    """Reads Falcon, which attends in four ways, by its positions and its implementation.

    With SDPA it calls PyTorch's function, in one place for rotary positions and in another for
    ALiBi. In eager attention it multiplies with `@`, so the scores are read at the softmax.
    """

    name: ClassVar[str] = "falcon"

    def matches(self, model: nn.Module) -> bool:
        return any(type(module).__name__ == "FalconAttention" for module in model.modules())

    def sites(self, model: nn.Module) -> tuple[AttentionSite, ...]:
        return tuple(
            AttentionSite(
                layer=module.layer_idx,
                module=path,
                function=f"torch.nn.functional.{FUNCTION}"
                if _config(module)._attn_implementation == "sdpa"
                else "F.softmax",
                occurrence=int(_config(module).alibi),
            )
            for path, module in model.named_modules()
            if type(module).__name__ == "FalconAttention"
        )

    def read(
        self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> AttentionCall | AttentionWeights:
        if _config(module)._attn_implementation == "sdpa":
            return torch_call(args, kwargs)
        return AttentionWeights(weights=args[0].detach().float().softmax(-1))


def _config(module: nn.Module) -> Any:
    return module.config


def torch_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> AttentionCall:
    """The attention call, from the arguments of PyTorch's function."""
    given = _PARAMETERS.bind(*args, **kwargs)
    given.apply_defaults()
    query, key, value, mask, _, causal, scale, _ = given.args
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        mask=mask if mask is None else mask[(None,) * (4 - mask.ndim)],
        scaling=query.shape[-1] ** -0.5 if scale is None else float(scale),
        causal=causal,
    )


def _written(module_type: type[nn.Module]) -> list[str]:
    """The name that `forward` uses for the function, for each of its calls."""
    compiled = code(module_type.forward)
    if compiled is None or FUNCTION not in compiled.co_names:
        return []
    names = (dotted(call.func) for call in calls(definition(module_type.forward) or ast.Pass()))
    return [name for name in names if name.split(".")[-1] == FUNCTION]
