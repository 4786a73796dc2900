"""Which adapter reads a model, what it takes for attention, and what it says when it cannot."""

from __future__ import annotations

import inspect
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the guide's example writes it so
from transformers import (
    BartConfig,
    GPT2Config,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RwkvConfig,
)
from transformers.modeling_outputs import CausalLMOutput

import flowtracer_plugin
from flowtracer_adapters import ADAPTERS, InterfaceAdapter, RecurrentAdapter
from flowtracer_plugin import attention
from flowtracer_plugin.attention import (
    ENTRY_POINT_GROUP,
    AttentionAdapter,
    AttentionCall,
    AttentionSite,
    NoAttentionError,
    UnsupportedArchitectureError,
    find_adapter,
    known_adapters,
    register_adapter,
)
from flowtracer_plugin.reader import AttentionReader
from tests.families import FAMILIES, LAYERS, redrawn, tiny_model

GUIDE = Path(__file__).parents[1] / "adapters" / "README.md"


class AcmeConfig(PreTrainedConfig):
    model_type = "acme"

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 3, **options})


def acme_attention(query, key, value, visible):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)


class AcmeAttention(nn.Module):
    """Attention as the guide's example describes it."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project, self.mix = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, hidden, visible):
        parts = self.project(hidden).chunk(3, dim=-1)
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in parts)
        mixed = acme_attention(query, key, value, visible)
        return hidden + self.mix(mixed.transpose(1, 2).flatten(2))


class AcmeForCausalLM(PreTrainedModel):
    config_class = AcmeConfig

    def __init__(self, config: AcmeConfig, heads: int = 4) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, 64)
        self.layers = nn.ModuleList(AcmeAttention(heads) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(64, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask):
        visible = attention_mask.bool()[:, None, None, :].expand(-1, -1, input_ids.shape[1], -1)
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, visible.tril())
        return CausalLMOutput(logits=self.lm_head(hidden))


def acme_model(heads: int = 4) -> AcmeForCausalLM:
    torch.manual_seed(0)
    model = AcmeForCausalLM(AcmeConfig(), heads).eval()
    for layer in model.layers:
        nn.init.normal_(layer.project.weight, std=0.3)
    nn.init.normal_(model.embed.weight)
    return model


class AcmeAdapter(AttentionAdapter):
    """Reads the call of `acme_attention`, of which no generic adapter knows."""

    name: ClassVar[str] = "acme"

    def matches(self, model):
        return bool(self.sites(model))

    def sites(self, model):
        found = [p for p, m in model.named_modules() if isinstance(m, AcmeAttention)]
        return tuple(
            AttentionSite(layer=layer, module=path, function="acme_attention")
            for layer, path in enumerate(found)
        )

    def read(self, module, args, kwargs):
        query, key, value, visible = args
        scaling = query.shape[-1] ** -0.5
        return AttentionCall(query=query, key=key, value=value, mask=visible, scaling=scaling)


class Named(AttentionAdapter):
    """Matches every model and finds nothing; only its name matters."""

    name: ClassVar[str] = "first"

    def matches(self, model):
        return True

    def sites(self, model):
        return ()

    def read(self, module, args, kwargs):
        raise NotImplementedError


class Other(Named):
    name: ClassVar[str] = "second"


class Generic(Named):
    name: ClassVar[str] = "looks around"
    generic: ClassVar[bool] = True


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    monkeypatch.setattr(attention, "_registered", [])


# --- the order of looking ---


def test_the_built_in_adapters_are_found_through_the_entry_point():
    (builtin,) = entry_points(group=ENTRY_POINT_GROUP, name="builtin")
    assert builtin.load() is ADAPTERS
    assert set(ADAPTERS) <= set(known_adapters())


def test_registered_adapters_come_before_installed_ones_and_generic_ones_last():
    register_adapter(Generic())
    register_adapter(Other())
    names = [adapter.name for adapter in known_adapters()]
    assert names.index("second") < names.index("recurrent")
    assert names.index("recurrent") < names.index("looks around") < names.index("interface")
    assert find_adapter(tiny_model("llama")).name == "second"


def test_the_adapter_that_is_passed_comes_first():
    register_adapter(Other())
    passed = InterfaceAdapter()
    assert AttentionReader(tiny_model("llama"), passed).adapter is passed


def test_registering_a_name_again_replaces_its_adapter():
    register_adapter(Named())
    register_adapter(Other())
    newer = Named()
    register_adapter(newer)
    known = known_adapters()
    assert [adapter.name for adapter in known].count("first") == 1
    assert known[0] is newer


# --- what an adapter is ---


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


# --- models that cannot be read ---


def test_an_unknown_architecture_is_named_with_what_was_tried():
    tried = ", ".join(adapter.name for adapter in known_adapters())
    wanted = rf"where AcmeForCausalLM attends; tried: {tried}\."
    with pytest.raises(UnsupportedArchitectureError, match=wanted):
        find_adapter(acme_model())
    with pytest.raises(UnsupportedArchitectureError, match="tried: none"):
        find_adapter(acme_model(), [])


def test_the_remedy_that_the_error_names_works():
    model = acme_model()
    with pytest.raises(UnsupportedArchitectureError, match=r"adapters/README\.md") as caught:
        flowtracer_plugin.wrap(model)
    assert GUIDE.is_file()
    assert "wrap(model, adapter=...)" in str(caught.value)
    flowtracer_plugin.wrap(model, adapter=AcmeAdapter())


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
def test_recurrent_models_are_told_that_they_do_not_attend(build, wrapper):
    model = wrapper(build())
    assert isinstance(find_adapter(model), RecurrentAdapter)
    with pytest.raises(NoAttentionError, match="choose a model with attention layers"):
        AttentionReader(model)


def test_the_recurrent_adapter_reads_nothing():
    with pytest.raises(NoAttentionError, match="Linear does not attend"):
        RecurrentAdapter().read(nn.Linear(1, 1), (), {})


def test_an_adapter_that_finds_no_site_is_refused():
    with pytest.raises(NoAttentionError, match="LlamaForCausalLM has no attention to read"):
        AttentionReader(tiny_model("llama"), Named())


# --- what is not attention between the tokens ---

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
def test_cross_attention_is_no_site(build):
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


# --- what the interface adapter takes from a call ---


def interface_call(module: nn.Module | None = None, **options: Any) -> AttentionCall:
    query, key = torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 3, 16)
    return InterfaceAdapter().read(module or nn.Identity(), (None, query, key, key), options)


def test_a_call_without_options_is_causal_and_scaled_by_the_width():
    call = interface_call()
    assert (call.scaling, call.causal, call.mask) == (0.25, True, None)
    assert (call.softcap, call.bias, call.sinks) == (None, None, None)


def test_a_mask_may_be_given_by_name():
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    assert interface_call(attention_mask=mask).mask is mask


def test_what_the_call_states_goes_before_what_the_module_says():
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


# --- an adapter of one's own; the guide's is built and installed in test_extension.py ---


@pytest.mark.parametrize("heads", [2, 4, 16])
def test_an_adapter_of_ones_own_reads_its_model(heads):
    reader = AttentionReader(acme_model(heads), AcmeAdapter())
    reader.verify()
    ids = torch.arange(20)[None]
    found = reader.read(ids, torch.ones_like(ids, dtype=torch.bool), [0, 1, 2])
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 20))
    assert found.triu(1).eq(0).all()
    assert found.amax(-1).mean() > 0.15


def test_an_adapter_of_ones_own_can_be_registered():
    register_adapter(AcmeAdapter())
    assert find_adapter(acme_model()).name == "acme"
    assert find_adapter(tiny_model("llama")).name == "interface"


def test_the_guide_names_the_length_of_the_self_check():
    from flowtracer_plugin.reader import CHECK_TOKENS

    assert f"{CHECK_TOKENS} tokens" in GUIDE.read_text()
