"""Models that attend, but not from token to earlier token, and the reason for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn, final

from torch import nn

from flowtracer_plugin.attention import (
    AttentionAdapter,
    AttentionSite,
    UnsupportedArchitectureError,
)

_ASSISTANT = (
    "it drafts tokens from the keys and values of another model and sees no text of its own; "
    "trace the model that it assists"
)
REASONS: Mapping[str, str] = {
    "BigBirdBlockSparseAttention": (
        "its block-sparse attention looks at later blocks too, and becomes full attention for "
        'short texts; load it with attention_type="original_full" and is_decoder=True'
    ),
    "BltModel": (
        "between its local layers, which attend from byte to byte, a global transformer attends "
        "from patch to patch: a map of bytes would leave out the way that most information takes"
    ),
    "CpmAntModel": (
        "its attention mask lets every token see every other, the later ones too, so information "
        "does not flow in one direction"
    ),
    "Gemma4AssistantForCausalLM": _ASSISTANT,
    "Gemma4UnifiedAssistantForCausalLM": _ASSISTANT,
}
"""The reason, by the class of the model or of a module in it."""


@final
class RefusedAdapter(AttentionAdapter):
    """Refuses models without a token graph, which no adapter could read."""

    name: ClassVar[str] = "refused"

    def matches(self, model: nn.Module) -> bool:
        return _found(model) is not None

    def sites(self, model: nn.Module) -> tuple[AttentionSite, ...]:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} cannot be traced: {REASONS[_found(model) or '']}"
        )

    def read(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> NoReturn:
        raise UnsupportedArchitectureError(f"{type(module).__name__} cannot be traced")


def _found(model: nn.Module) -> str | None:
    names = (type(module).__name__ for module in model.modules())
    return next((name for name in names if name in REASONS), None)
