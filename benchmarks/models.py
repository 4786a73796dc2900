"""The models that benchmarks run: random ones of a real shape, where weights do not matter."""

from __future__ import annotations

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SMALL = LlamaConfig(
    vocab_size=1000,
    hidden_size=512,
    intermediate_size=1376,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=65536,
)
"""Twelve layers in the proportions of current models."""


def build(config: LlamaConfig, implementation: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    # Two models must not share a configuration: the second would switch the first one's attention.
    config = copy.deepcopy(config)
    return LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()
