"""Which adapter reads a model, which calls it reads, and what it says if it cannot."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, ClassVar, final

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    GPT2Config,
    MambaConfig,
    PreTrainedModel,
    RwkvConfig,
)

from flowtracer_adapters import InterfaceAdapter, RecurrentAdapter
from flowtracer_plugin.attention import (
    AttentionAdapter,
    AttentionCall,
    NoAttentionError,
    UnsupportedArchitectureError,
    find_adapter,
    known_adapters,
)
from flowtracer_plugin.reading.reader import AttentionReader
from tests.families import FAMILIES, LAYERS, redrawn, tiny_model

GUIDE = Path(__file__).parents[2] / "adapters" / "README.md"


@pytest.mark.parametrize("adapter", known_adapters(), ids=lambda adapter: adapter.name)
def test_an_installed_adapter_is_final_without_state_and_documented(adapter):
    assert type(adapter).__final__
    frozen = getattr(type(adapter), "__dataclass_params__", None)
    assert vars(adapter) == {} or (frozen is not None and frozen.frozen)
    assert inspect.getdoc(type(adapter)) != inspect.getdoc(AttentionAdapter)
    assert isinstance(adapter.name, str)


def test_the_names_of_installed_adapters_are_unique():
    names = [adapter.name for adapter in known_adapters()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_by_the_interface_adapter_at_every_layer(family):
    model = tiny_model(family)
    adapter = find_adapter(model)
    assert isinstance(adapter, InterfaceAdapter)
    sites = adapter.sites(model)
    assert [site.layer for site in sites] == list(range(LAYERS))
    for site in sites:
        assert model.get_submodule(site.module).layer_idx == site.layer


def test_an_unknown_architecture_is_refused_with_the_adapters_tried():
    known = ", ".join(adapter.name for adapter in known_adapters())
    wanted = f"no adapter knows where Identity attends; tried: {known}. To add one, follow"
    with pytest.raises(UnsupportedArchitectureError, match=re.escape(wanted)):
        find_adapter(nn.Identity())
    with pytest.raises(UnsupportedArchitectureError, match="tried: none"):
        find_adapter(nn.Identity(), [])
    with pytest.raises(UnsupportedArchitectureError, match="docs adapters', and pass it as"):
        find_adapter(nn.Identity(), [])
    assert GUIDE.is_file()


def tiny_mamba() -> PreTrainedModel:
    return redrawn(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=50, state_size=4))


def tiny_rwkv() -> PreTrainedModel:
    return redrawn(RwkvConfig(hidden_size=32, num_hidden_layers=2, vocab_size=50))


class Outer(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


@pytest.mark.parametrize("wrapper", [nn.Module.eval, Outer], ids=["bare", "wrapped"])
@pytest.mark.parametrize("build", [tiny_mamba, tiny_rwkv])
def test_recurrent_models_are_refused(build, wrapper):
    model = wrapper(build())
    assert isinstance(find_adapter(model), RecurrentAdapter)
    with pytest.raises(NoAttentionError, match="choose a model with attention layers"):
        AttentionReader(model)


def test_the_recurrent_adapter_refuses_to_read():
    with pytest.raises(NoAttentionError, match="Linear does not attend"):
        RecurrentAdapter().read(nn.Linear(1, 1), (), {})


@final
class Blind(AttentionAdapter):
    """Matches every model and finds nothing."""

    name: ClassVar[str] = "blind"

    def matches(self, model):
        return True

    def sites(self, model):
        return ()

    def read(self, module, args, kwargs):
        raise NotImplementedError


def test_an_adapter_that_finds_no_site_is_refused():
    with pytest.raises(NoAttentionError, match="LlamaForCausalLM has no attention to read"):
        AttentionReader(tiny_model("llama"), Blind())


TOKENS = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def bart_decoder() -> PreTrainedModel:
    config = BartConfig(
        **TOKENS, d_model=32, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=32,
        is_decoder=True, is_encoder_decoder=False,
    )  # fmt: skip
    return redrawn(config)


def gpt2_with_cross_attention() -> PreTrainedModel:
    config = GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=2, add_cross_attention=True)
    return redrawn(config)


@pytest.mark.parametrize("build", [bart_decoder, gpt2_with_cross_attention])
def test_cross_attention_is_not_a_site(build):
    reader = AttentionReader(build())
    assert [site.layer for site in reader.sites] == [0, 1]
    assert not any("cross" in site.module or "encoder_attn" in site.module for site in reader.sites)
    reader.verify()


def test_a_module_without_readable_source_is_found_by_its_compiled_code(monkeypatch):
    model = tiny_model("llama")
    wanted = InterfaceAdapter().sites(model)

    def unreadable(_):
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsource", unreadable)
    assert InterfaceAdapter().sites(model) == wanted


def interface_call(module: nn.Module | None = None, **options: Any) -> AttentionCall:
    query, key = torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 3, 16)
    return InterfaceAdapter().read(module or nn.Identity(), (None, query, key, key), options)


def test_a_call_without_options_is_causal_and_scaled_by_the_width():
    call = interface_call()
    assert (call.scaling, call.causal, call.mask) == (0.25, True, None)
    assert (call.softcap, call.bias, call.sinks) == (None, None, None)


def test_the_mask_may_be_a_keyword_argument():
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    assert interface_call(attention_mask=mask).mask is mask


def test_arguments_of_the_call_override_attributes_of_the_module():
    module = nn.Identity()
    module.is_causal, module.sinks = False, torch.zeros(4)
    assert not interface_call(module).causal
    assert interface_call(module).sinks.eq(0).all()
    assert interface_call(module, is_causal=True).causal
    assert not interface_call(is_causal=False).causal
    assert interface_call(module, s_aux=torch.ones(4)).sinks.eq(1).all()
    assert (
        interface_call(module, s_aux=torch.ones(4), sinks=torch.full((4,), 2.0)).sinks.eq(2).all()
    )
