"""The models that benchmarks run: random ones of a real shape, where weights do not matter."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

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


def number_tokenizer(size: int = SMALL.vocab_size) -> PreTrainedTokenizerFast:
    """Every id but those of the special tokens is a number, so that any text has a last number."""
    special = ("<pad>", "<s>", "</s>")
    words = {word: place for place, word in enumerate(special)}
    words |= {f" {number}": number for number in range(len(special), size)}
    backend = Tokenizer(WordLevel(words, unk_token="<pad>"))
    backend.decoder = Fuse()
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@torch.no_grad()
def forward(model: PreTrainedModel, ids: Tensor, **options: Any) -> Any:
    """A plain forward pass over whole texts."""
    return model(input_ids=ids, use_cache=False, **options)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
