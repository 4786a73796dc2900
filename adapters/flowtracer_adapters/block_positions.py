"""MiniMax-M3, which divides the text into blocks by place, not by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from torch import nn

from flowtracer_adapters.interface import interface_call, interface_sites
from flowtracer_plugin.attention import AttentionAdapter, AttentionCall, AttentionSite


@final
class BlockPositionAdapter(AttentionAdapter):
    """Leaves positions to the model: those that skip padding do not fit its blocks.

    Keys are grouped by their place in the padded row, and queries choose among the groups by their
    position. If positions did not count padding, a query could be left with no key at all.
    """

    name: ClassVar[str] = "block_positions"
    interface: ClassVar[bool] = True
    counts_padding: ClassVar[bool] = True

    def matches(self, model: nn.Module) -> bool:
        return any(type(module).__name__ == "MiniMaxM3VLIndexer" for module in model.modules())

    def sites(self, model: nn.Module) -> tuple[AttentionSite, ...]:
        return interface_sites(model)

    def read(
        self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> AttentionCall:
        return interface_call(module, args, kwargs)
