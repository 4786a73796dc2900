"""Tiny random models, one per family, with attention as peaked as in a trained model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    logging,
)
from transformers.pytorch_utils import Conv1D

LAYERS = 6
HEADS = 4
WINDOW = 8
VOCABULARY = 128

_TOKENS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 128,
}
_MULTI_HEAD: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
_GROUPED: dict[str, Any] = {**_MULTI_HEAD, "num_key_value_heads": 2, "head_dim": 16}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}
# Three of four layers, or all layers (mistral), see at most WINDOW earlier tokens.
_SLIDING: dict[str, Any] = {"sliding_window": WINDOW}
_ROPE_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 64,
}


CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_GROUPED),
    "qwen2": Qwen2Config(**_GROUPED),
    "qwen3": Qwen3Config(**_GROUPED),
    "qwen3_moe": Qwen3MoeConfig(**_GROUPED, **_EXPERTS, num_experts=4, moe_intermediate_size=32),
    "gemma2": Gemma2Config(
        **_GROUPED, **_SLIDING, query_pre_attn_scalar=16, attn_logit_softcapping=3.0
    ),
    "gemma3_text": Gemma3TextConfig(**_GROUPED, **_SLIDING, query_pre_attn_scalar=16),
    "mistral": MistralConfig(**_GROUPED, **_SLIDING),
    "phi3": Phi3Config(**_GROUPED),
    "gpt2": GPT2Config(**_TOKENS, n_embd=64, n_layer=LAYERS, n_head=HEADS, n_positions=128),
    "gpt_neox": GPTNeoXConfig(**_MULTI_HEAD),
    "gpt_oss": GptOssConfig(
        **_GROUPED, **_SLIDING, **_EXPERTS, num_local_experts=4, rope_parameters=_ROPE_YARN
    ),
    "olmo2": Olmo2Config(**_GROUPED),
}

FAMILIES = tuple(CONFIGS)


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model of this family in eval mode; `overrides` change its configuration."""
    config = CONFIGS[family]
    if overrides:
        config = type(config)(**{**config.to_dict(), **overrides})
    return redrawn(config, seed=seed)


def redrawn(config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """A model of this configuration with weights so large that attention has peaks.

    With the usual initialisation, attention is almost uniform, and wrong readings look right.
    """
    with quiet_transformers():
        # A copy, because models write their attention implementation into the configuration.
        model = AutoModelForCausalLM.from_config(deepcopy(config)).eval()
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1:
                    fan_in = parameter.shape[0 if isinstance(module, Conv1D) else -1]
                    parameter.normal_(0, 1.3 * fan_in**-0.5, generator=drawn)
                elif name.endswith(("bias", "sinks")):
                    parameter.normal_(0, 0.3, generator=drawn)
    return model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """A context without the warnings of transformers about unusual configurations."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
