"""Architectures with a way of attending of their own, beside the plain comparison of all types."""

from __future__ import annotations

from copy import deepcopy
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    FalconConfig,
    MusicgenForCausalLM,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import flowtracer_plugin as ft
from flowtracer_adapters import ADAPTERS
from flowtracer_adapters.refused import REASONS
from flowtracer_plugin.attention import UnsupportedArchitectureError
from flowtracer_plugin.reading.reader import AttentionReader
from flowtracer_plugin.reading.runner import BACKENDS
from tests.attention.reference_attention import eager_head_mean
from tests.conformance.reported import model_inputs, reported_attention
from tests.conformance.tiny_configs import tiny_config
from tests.conformance.tiny_models import tiny_pair
from tests.families import quiet_transformers, redrawn, tiny_model
from tests.reading.comparison import assert_close, eager_twin, prompt

SMALL = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


# --- modules that are run several times ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_that_share_a_module_are_told_apart(backend):
    model, twin = tiny_model("llama"), eager_twin("llama")
    model.model.layers[4].self_attn = model.model.layers[1].self_attn
    twin.model.layers[4].self_attn = deepcopy(twin.model.layers[1].self_attn)
    reader = AttentionReader(model, backend=backend)
    reader.verify()
    visits = [
        (site.layer, site.visit) for site in reader.sites if site.module.endswith("1.self_attn")
    ]
    assert visits == [(1, 0), (4, 1)]
    ids, mask = prompt("left")
    for layers in ([1], [4], [1, 2, 4]):
        assert_close(reader.read(ids, mask, layers), eager_head_mean(twin, ids, mask, layers))


def test_the_middle_of_a_hybrid_is_the_middle_of_its_attention_layers():
    model, _ = tiny_pair("qwen3_next")
    attending = [site.layer for site in AttentionReader(model).sites]
    layers = ft.wrap(model, preset="paper").layers
    assert set(layers) <= set(attending) < set(range(model.config.num_hidden_layers))


# --- keys that are not the tokens ---


def test_summaries_of_a_cached_prefix_are_refused():
    model, _ = tiny_pair("deepseek_v4")
    ids, mask = prompt()
    with torch.no_grad():
        cache = model(input_ids=ids[:, :16], use_cache=True).past_key_values
    with pytest.raises(NotImplementedError, match="pass the whole text"):
        ft.wrap(model, layers="all", preset="paper").attention(
            ids[:, 16:], mask, model_inputs={"past_key_values": cache}
        )


# --- several ways of attending, chosen by the configuration ---


def one_hot_values(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """What PyTorch's own function, called as Falcon calls it, makes of one-hot values."""
    real, found = torch.nn.functional.scaled_dot_product_attention, []

    def recorded(query, key, value, **options):
        one_hot = torch.eye(key.shape[2]).expand(*key.shape[:2], -1, -1)
        found.append(real(query, key, one_hot, **options))
        return real(query, key, value, **options)

    with (
        torch.no_grad(),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", recorded),
    ):
        model(**model_inputs(model, ids, torch.ones_like(ids)))
    return found


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("alibi", [False, True])
def test_falcon_is_read_in_all_of_its_four_ways(alibi, implementation):
    config = FalconConfig(**SMALL, alibi=alibi)
    model = redrawn(config)
    eager, own = (
        AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation=way).eval()
        for way in ("eager", implementation)
    )
    for each in (eager, own):
        each.load_state_dict(model.state_dict())
    reader = AttentionReader(own)
    reader.verify()
    assert own.config._attn_implementation == implementation
    for padding in ("none", "left", "right"):
        ids, mask = prompt(padding)
        if alibi and implementation == "sdpa":
            check_by_one_hot_values(reader, eager, ids, mask)
            continue
        for layer, weights in reported_attention(eager, ids, mask).items():
            wanted = weights.mean(1) * mask[:, :, None] * mask[:, None, :]
            assert_close(reader.read(ids, mask, [layer]), wanted)


def check_by_one_hot_values(
    reader: AttentionReader, eager: PreTrainedModel, ids: Tensor, mask: Tensor
) -> None:
    """In eager attention, transformers 5.23 adds the bias twice: with the mask, and by itself."""
    inputs = model_inputs(reader.model, ids, mask)
    with torch.no_grad():
        apart = reader.model(**inputs).logits - eager(**inputs).logits
    assert apart[mask].abs().max() > 0.1
    for row, shown in enumerate(mask):
        text = ids[row : row + 1, shown]
        for layer, wanted in enumerate(one_hot_values(reader.model, text)):
            found = reader.read(ids, mask, [layer])[row]
            assert_close(found[shown][:, shown], wanted[0].mean(0))


# --- models without a token graph ---


def test_an_encoder_that_looks_ahead_is_refused_with_the_setting_that_helps():
    model = redrawn(BertConfig(**SMALL, intermediate_size=64))
    with pytest.raises(UnsupportedArchitectureError, match=r"attends to later tokens.*is_decoder"):
        ft.wrap(model, preset="paper").attention(prompt()[0])
    decoder = redrawn(BertConfig(**SMALL, intermediate_size=64, is_decoder=True))
    ft.wrap(decoder, preset="paper").attention(prompt()[0])


REFUSED = ["blt", "cpmant", "gemma4_assistant", "gemma4_unified_assistant"]


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_without_a_token_graph_is_refused_with_the_reason(model_type):
    assert model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    model, _ = tiny_pair(model_type)
    reasons = "|".join(reason[:30].replace("(", r"\(") for reason in REASONS.values())
    with pytest.raises(UnsupportedArchitectureError, match=f"cannot be traced: ({reasons})"):
        ft.wrap(model, preset="paper")


def test_several_codebooks_are_refused():
    config = tiny_config("musicgen")
    config.num_codebooks = 4
    with quiet_transformers(), pytest.raises(UnsupportedArchitectureError, match="reads 4 tokens"):
        ft.wrap(MusicgenForCausalLM(config), preset="paper")


def test_no_special_adapter_matches_a_common_architecture():
    model, _ = tiny_pair("llama")
    assert [adapter.name for adapter in ADAPTERS if adapter.matches(model)] == ["interface"]
