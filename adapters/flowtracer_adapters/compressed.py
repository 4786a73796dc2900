"""DeepSeek-V4, whose layers attend to single tokens nearby, and to summaries of earlier tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flowtracer_adapters.interface import interface_call, interface_sites
from flowtracer_plugin.attention import AttentionAdapter, AttentionCall, AttentionSite


@final
class CompressedAdapter(AttentionAdapter):
    """Divides the attention to each summary evenly among the tokens that it stands for.

    A summary is a gated mean over its tokens, with gates for each channel. So a token has no
    common share for all channels, and equal shares need no assumption about the content.
    """

    name: ClassVar[str] = "deepseek_v4"
    interface: ClassVar[bool] = True

    def matches(self, model: nn.Module) -> bool:
        return any(type(module).__name__ == "DeepseekV4Attention" for module in model.modules())

    def sites(self, model: nn.Module) -> tuple[AttentionSite, ...]:
        return interface_sites(model)

    def read(
        self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> AttentionCall:
        call = interface_call(module, args, kwargs)
        compressor: Any = module.compressor
        if compressor is None:
            return call
        tokens, summaries = call.query.shape[2], call.key.shape[2] - call.query.shape[2]
        rate = compressor.compress_rate
        if summaries != tokens // rate:
            raise NotImplementedError(
                f"wanted {tokens // rate} summaries of {tokens} tokens, found {summaries}: with a "
                "cached prefix the summaries do not say which tokens they stand for; pass the "
                "whole text"
            )
        # Sparse layers (CSA) summarise each window together with the window before it.
        windows = 2 if hasattr(compressor, "indexer") else 1
        shares = _shares(tokens, summaries, rate, windows).to(call.query.device)
        return replace(call, key_tokens=shares)


def _shares(tokens: int, summaries: int, rate: int, windows: int) -> Float[Tensor, "1 key token"]:
    """The share of each token in each key: first the tokens themselves, then the summaries."""
    end = rate * torch.arange(1, summaries + 1)[:, None]
    token = torch.arange(tokens)
    inside = ((token < end) & (token >= end - rate * windows)).float()
    return torch.cat([torch.eye(tokens), inside / inside.sum(-1, keepdim=True)])[None]
