"""A tiny configuration for every type of causal language model in transformers.

Fields are shrunk by their names, in nested configurations too; `type_table` adds what one type
needs. Every kind of layer that a type has occurs, and every window, chunk and top-k is shorter than
the texts: a selection that selects everything proves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from itertools import cycle, islice
from types import MappingProxyType
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.conformance.type_table import PARTS, TYPES

ALL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

LAYERS = 4
WINDOW = 8
VOCABULARY = 128

_BY_VALUE: tuple[tuple[Any, str], ...] = (
    (VOCABULARY, "vocab_size vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size"),
    (256, "ngram_vocab_size_base encoder_hash_byte_group_vocab"),
    (0, "pad_token_id"),
    (1, "bos_token_id"),
    (2, "eos_token_id"),
    (128, "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length"),
    (128, "max_target_positions max_source_positions"),
    (64, "hidden_size hidden_size_global d_model n_embd emb_dim embedding_size embedding_dim"),
    (64, "lru_width word_embed_proj_dim input_embedding_size output_embedding_size ple_embed_dim"),
    (
        64,
        "intermediate_size intermediate_size_mlp moe_intermediate_size ffn_dim dff dim_ff",
    ),
    (64, "encoder_ffn_dim decoder_ffn_dim ffn_hidden_size expert_ffn_hidden_size n_inner d_inner"),
    (64, "shared_intermediate_size shared_expert_intermediate_size feed_forward_size"),
    (64, "shared_experts_intermediate_size moe_shared_expert_intermediate_size"),
    (64, "dense_intermediate_size prefix_dense_intermediate_size"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers"),
    (LAYERS, "num_encoder_layers num_decoder_layers num_blocks"),
    (True, "is_decoder causal use_sliding_window"),
    (4, "num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads"),
    (4, "encoder_attention_heads decoder_attention_heads num_encoder_attention_heads"),
    (4, "num_decoder_attention_heads"),
    (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups"),
    (16, "head_dim d_head dim_head swa_head_dim attention_head_size kv_channels"),
    (8, "rotary_dim"),
    (16, "query_pre_attn_scalar"),
    (32, "q_lora_rank kv_lora_rank o_lora_rank gated_norm_rank adapter_rank"),
    (8, "qk_rope_head_dim laurel_rank d_rel hc_lowrank hidden_size_per_layer_input"),
    (16, "qk_nope_head_dim v_head_dim index_head_dim pronunciation_embed_dim shape_embed_dim"),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k n_shared_experts"),
    (2, "num_shared_experts moe_num_shared_experts zero_expert_num"),
    (1, "n_group topk_group num_expert_group first_k_dense_replace num_dense_layers"),
    (0, "num_nextn_predict_layers num_mtp_layers"),
    (WINDOW, "sliding_window sliding_window_size attention_window_size attention_chunk_size"),
    (WINDOW, "window_size local_attention keep_window_size local_attention_window_len"),
    (6, "index_topk"),
    (16, "index_n_heads"),  # with few, scores tie at 0, and ties depend on the padding
    (2, "linear_num_key_heads linear_num_value_heads linear_num_heads n_mamba_heads"),
    (16, "linear_key_head_dim linear_value_head_dim linear_head_dim"),
    (8, "mamba_n_heads mamba_num_heads n_groups mamba_d_head mamba_head_dim"),
    (8, "chunk_size mamba_chunk_size mamba_d_state ssm_state_size state_size"),
    (32, "rel_extent router_hidden_size"),
)
SMALL: dict[str, Any] = {name: value for value, names in _BY_VALUE for name in names.split()}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A configuration of `model_type`, a key of transformers' mapping of causal models."""
    config = _shrunk(CONFIG_MAPPING[model_type], TYPES.get(model_type, {}))
    if model_type == "gemma4_assistant":
        # Its validator demands that every layer takes its keys from elsewhere, and then its layers
        # demand that one of each kind does not (kv_sharing_modes): no such model can be built.
        config.text_config.num_kv_shared_layers = 2
    return getattr(config, PARTS[model_type]) if model_type in PARTS else config


def _shrunk(
    config_class: type[PreTrainedConfig],
    own: Mapping[str, Any],
    preset: Mapping[str, Any] = MappingProxyType({}),
) -> PreTrainedConfig:
    known = {field.name for field in fields(config_class)}
    small = {name: value for name, value in SMALL.items() if name in known}
    if "layer_types" in known and "layer_types" not in own:
        small |= _layer_types(config_class)
    if "kv_lora_rank" in known:  # latent attention gives every head keys of its own
        small["num_key_value_heads"] = SMALL["num_attention_heads"]
    chosen = {**preset, **small, **own}
    for name, part in config_class.sub_configs_defaults.items():
        value = chosen.get(name)
        if isinstance(value, dict) or (value is None and not part.optional):
            automatic = part.config_class is AutoConfig
            part_class = CONFIG_MAPPING[part.model_type] if automatic else part.config_class
            chosen[name] = _shrunk(part_class, value or {}, part.init_kwargs)
    return config_class(**chosen)


def _layer_types(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Every kind of layer in the order of the full-size model, again and again."""
    kinds = list(dict.fromkeys(config_class().layer_types or ()))
    count = max(LAYERS, len(kinds))
    return {"layer_types": list(islice(cycle(kinds), count))} if kinds else {}
