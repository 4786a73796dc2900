"""Granite models with sliding windows, which apply their sinks to the output of attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

from torch import nn

from flowtracer_adapters.interface import interface_call, interface_sites
from flowtracer_plugin.attention import AttentionAdapter, AttentionCall, AttentionSite

CLASSES = frozenset({"GraniteSWAAttention", "GraniteMoeSWAAttention"})


@final
@dataclass(frozen=True)
class OutputSinkAdapter(AttentionAdapter):
    """Reads attention without the share of the sinks, or as transformers' eager attention does.

    The output of a head is multiplied by `sigmoid(logsumexp(scores) - sink)`. A sink in the softmax
    has the same effect, so rows sum to less than 1, as for any model with sinks.

    Attributes:
        as_eager: Whether to ignore the sinks, so that rows sum to 1, as `output_attentions` does
            for these models.
    """

    as_eager: bool = False
    name: ClassVar[str] = "output_sinks"
    interface: ClassVar[bool] = True

    def matches(self, model: nn.Module) -> bool:
        return any(type(module).__name__ in CLASSES for module in model.modules())

    def sites(self, model: nn.Module) -> tuple[AttentionSite, ...]:
        return interface_sites(model)

    def read(
        self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> AttentionCall:
        return replace(interface_call(module, args, kwargs), normalized=self.as_eager)
