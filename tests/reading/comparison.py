"""What tests of reading share: inputs, eager twins, a comparison, and an adapter with a mistake."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flowtracer_adapters import InterfaceAdapter
from flowtracer_plugin.attention import AttentionAdapter, AttentionCall
from tests.families import VOCABULARY, tiny_model

TOKENS = 24
SOME_LAYERS = (1, 2, 4)
MASK_KINDS = ("llama", "mistral", "gemma2", "gpt_oss", "gpt2")
"""Families that differ in masks, sinks or positions: all tokens, windows everywhere, windows in
some layers with a softcap, windows with sinks, and learned positions."""


def prompt(padding: str = "none", *, rows: int = 2) -> tuple[Tensor, Tensor]:
    """Random ids, longer than any window, and their mask."""
    ids = torch.randint(3, VOCABULARY, (rows, TOKENS), generator=torch.Generator().manual_seed(7))
    mask = torch.ones(rows, TOKENS, dtype=torch.bool)
    if padding == "left":
        mask[-1, :5] = False
    if padding == "right":
        mask[-1, -5:] = False
    return ids.masked_fill(~mask, 0), mask


def eager_twin(family: str, **overrides) -> PreTrainedModel:
    """The same weights, on the implementation that reports its attention."""
    model = tiny_model(family, **overrides)
    model.set_attn_implementation("eager")
    return model


def assert_close(found: Tensor, wanted: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=atol)


def count_calls(model: nn.Module) -> dict[str, int]:
    """How often each module has run since this call; the counts go on."""
    counts = dict.fromkeys((name for name, _ in model.named_modules()), 0)

    def counting(name: str) -> Callable[..., None]:
        def hook(*_) -> None:
            counts[name] += 1

        return hook

    for name, module in model.named_modules():
        module.register_forward_pre_hook(counting(name))
    return counts


class Misreader(AttentionAdapter):
    """The interface adapter, with a mistake."""

    name: ClassVar[str] = "misreader"
    interface: ClassVar[bool] = True

    def __init__(self, mistake: Callable[[AttentionCall], AttentionCall]) -> None:
        self.right, self.mistake = InterfaceAdapter(), mistake

    def matches(self, model):
        return True

    def sites(self, model):
        return self.right.sites(model)

    def read(self, module, args, kwargs):
        return self.mistake(self.right.read(module, args, kwargs))
