"""The models that benchmarks run: random ones of a real shape, where weights do not matter."""

from __future__ import annotations

import copy
import os
from pathlib import Path

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


def pretrained(name: str) -> Path:
    """The folder of a model whose weights do matter.

    Raises:
        SystemExit: The environment does not say where models are, or this one is not there.
    """
    folder = os.environ.get("FLOWTRACER_MODELS")
    if folder is None:
        raise SystemExit(f"this runs {name}: set FLOWTRACER_MODELS to the folder that holds it")
    path = Path(folder).resolve() / name
    if not path.is_dir():
        raise SystemExit(f"this runs {name}, and FLOWTRACER_MODELS holds no {path}")
    return path
