"""The models of benchmarks: random ones of a realistic shape, and pretrained ones from a folder."""

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
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

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

SMOLLM2 = "SmolLM2-135M-Instruct"


def build(config: LlamaConfig, implementation: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    # If two models shared a configuration, the second would switch the first one's attention.
    config = copy.deepcopy(config)
    return LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()


def number_tokenizer(size: int = SMALL.vocab_size) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are numbers, except special tokens, so that any text has an answer."""
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
    """The folder of a pretrained model.

    Raises:
        SystemExit: FLOWTRACER_MODELS is not set, or its folder does not hold the model.
    """
    folder = os.environ.get("FLOWTRACER_MODELS")
    if folder is None:
        raise SystemExit(f"this runs {name}: set FLOWTRACER_MODELS to the folder that holds it")
    path = Path(folder).resolve() / name
    if not path.is_dir():
        raise SystemExit(f"this runs {name}, and FLOWTRACER_MODELS holds no {path}")
    return path


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder, padding_side="left")
