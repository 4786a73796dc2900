"""Models without attention, which no adapter could read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn, final

from torch import nn

from flowtracer_plugin.attention import AttentionAdapter, AttentionSite, NoAttentionError

RECURRENT_TYPES = frozenset({"falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"})


@final
class RecurrentAdapter(AttentionAdapter):
    """Refuses the recurrent model types of transformers, because they do not attend."""

    name: ClassVar[str] = "recurrent"

    def matches(self, model: nn.Module) -> bool:
        configs = (module.config for module in model.modules() if hasattr(module, "config"))
        return getattr(next(configs, None), "model_type", None) in RECURRENT_TYPES

    def sites(self, model: nn.Module) -> tuple[AttentionSite, ...]:
        raise NoAttentionError(
            f"{type(model).__name__} carries information in a recurrent state, not by attention "
            "between tokens, so there is no flow to trace; choose a model with attention layers"
        )

    def read(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> NoReturn:
        raise NoAttentionError(f"{type(module).__name__} does not attend")
