"""Models whose attention is more than one map of tokens per layer, and slow definitions of it.

The attention of a token to another is the output of the model's own attention function for one-hot
values: how much of each key goes into each query, after all sinks, masks and scalings.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.deepseek_v4 import DeepseekV4Config
from transformers.models.granite_swa import GraniteSWAConfig
from transformers.models.granitemoe_swa import GraniteMoeSWAConfig
from transformers.models.hrm_text import HrmTextConfig
from transformers.models.mimo_v2_flash import MiMoV2FlashConfig

from tests.conformance.tiny_configs import tiny_config
from tests.families import redrawn

LENGTH = 29  # longer than every window, and no multiple of a compression rate
WINDOW = 8
CSA_RATE, HCA_RATE = 4, 8

TOKENS: dict[str, Any] = {
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 128,
}
HEADS: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
_GROUPED: dict[str, Any] = {**HEADS, "num_key_value_heads": 2, "head_dim": 16}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ALTERNATING: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
}


def special_configs() -> dict[str, PreTrainedConfig]:
    """Types that need other settings here than in the comparison of all types."""
    return {
        "deepseek_v4": DeepseekV4Config(
            **{**_GROUPED, **_EXPERTS, "num_key_value_heads": 1},
            n_routed_experts=4,
            n_shared_experts=1,
            moe_intermediate_size=32,
            q_lora_rank=32,
            o_lora_rank=32,
            o_groups=2,
            index_n_heads=16,  # with few, scores tie at 0, and ties depend on the padding
            index_head_dim=16,
            index_topk=3,
            sliding_window=WINDOW,
            layer_types=[
                "sliding_attention",
                "compressed_sparse_attention",
                "heavily_compressed_attention",
                "compressed_sparse_attention",
            ],
            compress_rates={
                "compressed_sparse_attention": CSA_RATE,
                "heavily_compressed_attention": HCA_RATE,
            },
        ),
        "granite_swa": GraniteSWAConfig(**_GROUPED, **_ALTERNATING, attention_multiplier=0.3),
        "granitemoe_swa": GraniteMoeSWAConfig(
            **_GROUPED, **_EXPERTS, **_ALTERNATING, attention_multiplier=0.3
        ),
        "hrm_text": HrmTextConfig(
            **{**HEADS, "num_hidden_layers": 2}, head_dim=16, H_cycles=2, L_cycles=3
        ),
        "mimo_v2_flash": MiMoV2FlashConfig(
            **_GROUPED,
            **_ALTERNATING,
            **_EXPERTS,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=32,
            v_head_dim=24,  # unlike head_dim
            attention_value_scale=0.7,
        ),
    }


WEIGHTS = ("big_bird", "prophetnet", "xlnet", "bigbird_pegasus")
"""Types that multiply weights and values in their own code."""

ALL = (*special_configs(), "inkling2_text", "minimax_m3_vl_text", "zamba", "zamba2", *WEIGHTS)


def model_of(name: str, *, eager: bool = False) -> PreTrainedModel:
    config = special_configs().get(name) or tiny_config(name)
    if eager:
        config._attn_implementation = "eager"
    return redrawn(config)


def text(length: int = LENGTH, *, seed: int = 5) -> Tensor:
    return torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(seed))


def padded(ids: Tensor, left: int = 0, right: int = 0) -> tuple[Tensor, Tensor]:
    """The ids between padding, and their mask."""
    ids = nn.functional.pad(ids, (left, right))
    place = torch.arange(ids.shape[1])[None]
    return ids, (place >= left) & (place < ids.shape[1] - right)


PADDING = {"none": (0, 0), "left": (5, 0), "right": (0, 5)}


def inputs_of(name: str, ids: Tensor) -> dict[str, Any]:
    """The model's inputs for one text without padding."""
    inputs: dict[str, Any] = {"input_ids": ids}
    return inputs if name == "xlnet" else {**inputs, "use_cache": False}


@contextmanager
def one_hot_values(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """A list that fills with the attention of every head, for each attention call."""
    code = sys.modules[type(model).__module__]
    attend, found = code.eager_attention_forward, list[Tensor]()

    def probed(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any):
        one_hot = torch.eye(key.shape[2]).expand(*key.shape[:2], -1, -1)
        found.append(attend(module, query, key, one_hot, *rest, **options)[0].transpose(1, 2))
        return attend(module, query, key, value, *rest, **options)

    code.eager_attention_forward = probed
    try:
        yield found
    finally:
        code.eager_attention_forward = attend


def defined(name: str, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Head means by the definition, one for each attention call in the order of execution.

    The text runs alone, and its maps are put where it stands among the padding.
    """
    placed = []
    for mean in _alone(name, ids[mask][None]):
        whole = torch.zeros(1, ids.shape[1], ids.shape[1])
        whole[mask[:, :, None] & mask[:, None, :]] = mean.flatten()
        placed.append(whole)
    return placed


def _alone(name: str, ids: Tensor) -> list[Tensor]:
    model = model_of(name, eager=True)
    with torch.no_grad():
        if name in WEIGHTS:
            reported = model(**inputs_of(name, ids), output_attentions=True).attentions
            return [map_.mean(1) for map_ in reported]
        with one_hot_values(model) as found:
            model(**inputs_of(name, ids))
    means = [map_.mean(1) for map_ in found]
    return means if name != "deepseek_v4" else [_spread(model, *it) for it in enumerate(means)]


def _spread(model: PreTrainedModel, layer: int, mean: Tensor) -> Tensor:
    """Divides what each summary gets evenly among its tokens, found by changing one at a time."""
    tokens = mean.shape[1]
    compressor = model.model.layers[layer].self_attn.compressor
    if compressor is None:
        return mean
    members = members_of(compressor, tokens)
    spread = mean[:, :, :tokens].clone()
    for summary, made_of in enumerate(members):
        for token in made_of:
            spread[:, :, token] += mean[:, :, tokens + summary] / len(made_of)
    return spread


def members_of(compressor: Any, tokens: int) -> list[list[int]]:
    """The tokens that change each summary."""
    drawn = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, tokens, 64, generator=drawn)
    residual, positions = torch.randn(1, tokens, 32, generator=drawn), torch.arange(tokens)[None]

    def summaries(states: Tensor) -> Tensor:
        return compressor(states, residual, positions, None, 0)[0][0, 0]

    with torch.no_grad():
        before = summaries(hidden)
        members: list[list[int]] = [[] for _ in before]
        for token in range(tokens):
            other = hidden.clone()
            other[:, token] += 1
            for summary in (summaries(other) != before).any(-1).nonzero().flatten().tolist():
                members[summary].append(token)
    return members


def compare(found: Tensor, wanted: Tensor, mask: Tensor) -> None:
    wanted = wanted * mask[:, :, None] * mask[:, None, :]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
