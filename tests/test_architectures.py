"""Architectures with a way of attending of their own, beside the plain comparison of all types."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BigBirdConfig,
    FalconConfig,
    MusicgenForCausalLM,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import flowtracer_plugin as ft
from flowtracer_adapters import ADAPTERS, OutputSinkAdapter
from flowtracer_adapters.refused import REASONS
from flowtracer_plugin.attention import UnsupportedArchitectureError
from flowtracer_plugin.reader import BACKENDS, AttentionReader
from tests.conformance.reported import model_inputs, reported_attention
from tests.conformance.tiny_configs import tiny_config
from tests.conformance.tiny_models import tiny_pair
from tests.families import quiet_transformers, redrawn, tiny_model
from tests.reference_attention import eager_head_mean
from tests.test_capture import assert_close, eager_twin, prompt

SMALL = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


# --- modules that are run several times ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_run_of_a_recurrent_stack_is_a_layer(backend):
    model, twin = tiny_pair("hrm_text")
    reader = AttentionReader(model, backend=backend)
    config = model.config
    runs = config.H_cycles * (config.L_cycles + 1) * config.num_layers_per_stack
    assert [site.layer for site in reader.sites] == list(range(runs))
    ids, mask = prompt("left")
    wanted = reported_attention(twin, ids, mask)
    for layer in (0, runs // 2, runs - 1):
        seen = wanted[layer].mean(1) * mask[:, :, None] * mask[:, None, :]
        assert_close(reader.read(ids, mask, [layer]), seen)


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
    layers = ft.wrap(model).layers
    assert set(layers) <= set(attending) < set(range(model.config.num_hidden_layers))


# --- keys that are not the tokens ---


def spread_slowly(model, weights: torch.Tensor, layer: int) -> torch.Tensor:
    """What each summary gets, given in equal parts to the tokens that it is made of."""
    compressor = model.model.layers[layer].self_attn.compressor
    tokens = weights.shape[2]
    mean = weights.mean(1)
    spread = mean[:, :, :tokens].clone()
    for summary in range(weights.shape[3] - tokens):
        rate = compressor.compress_rate
        window = set(range(summary * rate, (summary + 1) * rate))
        if type(compressor).__name__ == "DeepseekV4CSACompressor" and summary:
            window |= {token - rate for token in window}
        for token in window:
            spread[:, :, token] += mean[:, :, tokens + summary] / len(window)
    return spread


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_summary_divides_its_attention_among_its_tokens(padding, backend):
    model, twin = tiny_pair("deepseek_v4")
    ids, mask = prompt(padding)
    with torch.no_grad():
        reported = twin(**model_inputs(twin, ids, mask), output_attentions=True).attentions
    kinds = set()
    for layer, weights in enumerate(reported):
        found = AttentionReader(model, backend=backend).read(ids, mask, [layer])
        if weights.shape[3] > weights.shape[2]:
            kinds.add(type(model.model.layers[layer].self_attn.compressor).__name__)
            weights = spread_slowly(model, weights, layer)[:, None]
        wanted = weights.mean(1) * mask[:, :, None] * mask[:, None, :]
        assert_close(found, wanted)
        assert not found.triu(1).any()
    assert kinds == {"DeepseekV4CSACompressor", "DeepseekV4HCACompressor"}


def test_summaries_of_a_cached_prefix_are_refused():
    model, _ = tiny_pair("deepseek_v4")
    ids, mask = prompt()
    with torch.no_grad():
        cache = model(input_ids=ids[:, :16], use_cache=True).past_key_values
    with pytest.raises(NotImplementedError, match="pass the whole text"):
        ft.wrap(model, layers="all").attention(
            ids[:, 16:], mask, model_inputs={"past_key_values": cache}
        )


# --- sinks that are applied to the output ---


@pytest.mark.parametrize("model_type", ["granite_swa", "granitemoe_swa"])
def test_sinks_take_their_share_unless_asked_to_report_as_eager_does(model_type):
    model, twin = tiny_pair(model_type)
    ids, mask = prompt("left")
    reported = reported_attention(twin, ids, mask)
    for layer, weights in reported.items():
        eager = weights.mean(1).float() * mask[:, :, None] * mask[:, None, :]
        reader = AttentionReader(model, OutputSinkAdapter(as_eager=True))
        reader.verify()
        assert_close(reader.read(ids, mask, [layer]), eager)
        share = AttentionReader(model).read(ids, mask, [layer])[mask].sum(-1)
        assert torch.all((share > 0) & (share <= 1 + 1e-5))
        assert share.min() < 0.9


# --- ways that a configuration chooses ---


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("alibi", [False, True])
def test_falcon_is_read_in_all_of_its_four_ways(alibi, implementation, padding):
    config = FalconConfig(**SMALL, alibi=alibi)
    model = redrawn(config)
    ids, mask = prompt(padding)
    eager, own = (
        AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation=way).eval()
        for way in ("eager", implementation)
    )
    for each in (eager, own):
        each.load_state_dict(model.state_dict())
    reader = AttentionReader(own)
    reader.verify()
    assert own.config._attn_implementation == implementation
    if alibi and implementation == "sdpa":
        # In eager attention, transformers 5.23 adds the bias twice: with the mask, and by itself.
        inputs = model_inputs(own, ids, mask)
        with torch.no_grad():
            apart = own(**inputs).logits - eager(**inputs).logits
        assert apart[mask].abs().max() > 0.1
        return
    for layer, weights in reported_attention(eager, ids, mask).items():
        wanted = weights.mean(1) * mask[:, :, None] * mask[:, None, :]
        assert_close(reader.read(ids, mask, [layer]), wanted)


def test_blocks_by_place_are_read_with_padding_on_the_left():
    model, _ = tiny_pair("minimax_m3_vl_text")
    AttentionReader(model).verify()
    ids, mask = prompt("left")
    found = AttentionReader(model).read(ids, mask, range(4))
    assert_close(found[mask].sum(-1), torch.ones(int(mask.sum())))


# --- what has no token graph ---


def test_an_encoder_that_looks_ahead_is_refused_with_the_setting_that_helps():
    model = redrawn(BertConfig(**SMALL, intermediate_size=64))
    with pytest.raises(UnsupportedArchitectureError, match=r"attends to later tokens.*is_decoder"):
        ft.wrap(model).attention(prompt()[0])
    decoder = redrawn(BertConfig(**SMALL, intermediate_size=64, is_decoder=True))
    ft.wrap(decoder).attention(prompt()[0])


def test_block_sparse_attention_is_refused_with_the_setting_that_helps():
    small = {**SMALL, "intermediate_size": 64, "is_decoder": True, "max_position_embeddings": 64}
    with pytest.raises(UnsupportedArchitectureError, match='attention_type="original_full"'):
        ft.wrap(redrawn(BigBirdConfig(**small)))
    ft.wrap(redrawn(BigBirdConfig(**small, attention_type="original_full"))).attention(prompt()[0])


REFUSED = ["blt", "cpmant", "gemma4_assistant", "gemma4_unified_assistant", "reformer"]


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_without_a_token_graph_is_refused_with_the_reason(model_type):
    assert model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    model, _ = tiny_pair(model_type)
    reasons = "|".join(reason[:30].replace("(", r"\(") for reason in REASONS.values())
    with pytest.raises(UnsupportedArchitectureError, match=f"cannot be traced: ({reasons})"):
        ft.wrap(model)


def test_cpmant_really_looks_ahead():
    _, twin = tiny_pair("cpmant")
    ids, _ = prompt()
    with torch.no_grad():
        attentions = twin(input_ids=ids, output_attentions=True).attentions
    assert attentions[0].mean(1).triu(1).sum(-1).max() > 0.3


def test_reformer_really_attends_differently_each_time():
    _, twin = tiny_pair("reformer")
    twin.config.hash_seed = None  # as it is by default; a seed is set for all of torch
    for module in twin.modules():
        if hasattr(module, "hash_seed"):
            module.hash_seed = None
    ids, mask = prompt()
    with torch.no_grad():
        first, second = (twin(input_ids=ids, attention_mask=mask.long()).logits for _ in range(2))
    assert (first - second).abs().max() > 1e-3


def test_several_codebooks_are_refused():
    config = tiny_config("musicgen")
    config.num_codebooks = 4
    with quiet_transformers(), pytest.raises(UnsupportedArchitectureError, match="reads 4 tokens"):
        ft.wrap(MusicgenForCausalLM(config))


def test_adapters_that_know_an_architecture_say_so_to_none_of_the_common_ones():
    model, _ = tiny_pair("llama")
    assert [adapter.name for adapter in ADAPTERS if adapter.matches(model)] == ["interface"]
