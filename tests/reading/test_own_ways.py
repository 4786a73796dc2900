"""Architectures whose attention is more than one map of tokens per layer, by slow definitions."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import BigBirdConfig, PreTrainedModel

from flowtracer_adapters import OutputSinkAdapter
from flowtracer_plugin.attention import UnsupportedArchitectureError
from flowtracer_plugin.reading.reader import AttentionReader
from tests.conformance.tiny_configs import tiny_config
from tests.families import redrawn
from tests.reading.own_ways import (
    ALL,
    CSA_RATE,
    HCA_RATE,
    HEADS,
    LENGTH,
    PADDING,
    WINDOW,
    compare,
    defined,
    inputs_of,
    members_of,
    model_of,
    one_hot_values,
    padded,
    text,
)

# --- what is read is what the definition says ---


@pytest.mark.parametrize("name", ALL)
def test_every_layer_is_read_as_defined_wherever_the_padding_is(name):
    reader, ids = AttentionReader(model_of(name)), text()
    reader.verify()
    wanted = defined(name, ids, torch.ones_like(ids, dtype=torch.bool))
    assert len(reader.sites) == len(wanted)
    for site, map_ in zip(reader.sites, wanted, strict=True):
        alone = None
        for sides in PADDING.values():
            longer, mask = padded(ids, *sides)
            found = reader.read(longer, mask, [site.layer])
            assert found.triu(1).eq(0).all()
            assert found.amax(-1)[mask].mean() > 0.12
            inside = found[mask[:, :, None] & mask[:, None, :]].view_as(map_)
            assert found.sum() == pytest.approx(float(inside.sum()))
            torch.testing.assert_close(inside, map_, atol=1e-4, rtol=0)
            alone = inside if alone is None else alone
            torch.testing.assert_close(inside, alone, atol=1e-5, rtol=0)


# --- HRM: a layer is a run of a module ---


def test_every_run_of_a_module_is_a_layer_of_its_own():
    model = model_of("hrm_text")
    order: list[str] = []
    for path, module in model.named_modules():
        if type(module).__name__ == "HrmTextAttention":
            module.register_forward_pre_hook(lambda *_, path=path: order.append(path))
    with torch.no_grad():
        model(text())
    sites = AttentionReader(model).sites
    assert [site.layer for site in sites] == list(range(len(order)))
    assert [site.module for site in sites] == order
    for place, site in enumerate(sites):
        assert site.visit == order[:place].count(site.module)


def test_some_layers_of_several_cycles_are_averaged():
    ids, mask = padded(text())
    wanted = defined("hrm_text", ids, mask)
    chosen = [1, 4, 7, len(wanted) - 1]
    found = AttentionReader(model_of("hrm_text")).read(ids, mask, chosen)
    compare(found, torch.stack([wanted[layer] for layer in chosen]).mean(0), mask)


# --- DeepSeek-V4: keys that stand for several tokens ---


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("tokens", [3, 29])
def test_a_summary_stands_for_its_window_and_sparse_ones_for_the_window_before_too(layer, tokens):
    compressor = model_of("deepseek_v4").model.layers[layer].self_attn.compressor
    rate, windows = (CSA_RATE, 2) if layer == 1 else (HCA_RATE, 1)
    wanted = [
        list(range(max(0, rate * (window + 1 - windows)), rate * (window + 1)))
        for window in range(tokens // rate)
    ]
    assert members_of(compressor, tokens) == wanted


@pytest.mark.parametrize("tokens", [1, CSA_RATE, HCA_RATE, 2 * HCA_RATE + 1])
def test_no_token_looks_at_a_summary_before_its_window_is_over(tokens):
    ids = text(tokens)
    model = model_of("deepseek_v4", eager=True)
    with torch.no_grad(), one_hot_values(model) as found:
        model(**inputs_of("deepseek_v4", ids))
    for layer, rate in ((1, CSA_RATE), (2, HCA_RATE), (3, CSA_RATE)):
        for query in range(tokens):
            over = (query + 1) // rate
            assert found[layer][:, :, query, tokens + over :].eq(0).all()


def test_most_of_the_attention_beyond_the_window_goes_through_summaries():
    ids, mask = padded(text())
    reader = AttentionReader(model_of("deepseek_v4"))
    sliding, sparse, heavy, _ = (reader.read(ids, mask, [layer])[0] for layer in range(4))
    far = torch.ones(LENGTH, LENGTH).tril(-WINDOW).bool()
    assert sliding[far].eq(0).all()
    assert sparse[far].sum() > 0.5
    assert heavy[far].sum() > 0.5


# --- Granite: sinks on the output ---


@pytest.mark.parametrize("name", ["granite_swa", "granitemoe_swa"])
def test_the_share_of_output_sinks_is_left_out_or_given_back(name):
    ids, mask = padded(text())
    twin = model_of(name, eager=True)
    with torch.no_grad():
        inputs = inputs_of(name, ids)
        reported = twin(**inputs, output_attentions=True).attentions
    effective, eager = (
        AttentionReader(model_of(name), OutputSinkAdapter(as_eager=choice))
        for choice in (False, True)
    )
    eager.verify()
    effective.verify()
    for layer, map_ in enumerate(reported):
        found = eager.read(ids, mask, [layer])
        compare(found, map_.mean(1), mask)
        torch.testing.assert_close(found.sum(-1)[mask], torch.ones(LENGTH))
        assert effective.read(ids, mask, [layer]).sum(-1)[mask].min() < 0.9


# --- MiniMax-M3: blocks that are chosen ---


def test_a_sparse_layer_hides_what_it_did_not_choose():
    ids, mask = padded(text())
    reader = AttentionReader(model_of("minimax_m3_vl_text"))
    before = torch.ones(LENGTH, LENGTH).tril().bool()
    full, sparse = (reader.read(ids, mask, [layer])[0] for layer in (0, 1))
    assert (full[before] > 0).all()
    assert (sparse[before] == 0).float().mean() > 0.2


# --- models without a map from token to earlier token ---


def sparse_big_bird() -> PreTrainedModel:
    config = BigBirdConfig(
        **HEADS, attention_type="block_sparse", block_size=4, num_random_blocks=1
    )
    return redrawn(config)


def test_cpmant_looks_ahead():
    config = tiny_config("cpmant")
    config.prompt_length = 6
    model = redrawn(config)
    with torch.no_grad():
        reported = model(text(), output_attentions=True, use_cache=False).attentions
    assert reported[0].shape[-2:] == (LENGTH, LENGTH)
    assert reported[0].triu(1).sum(-1).mean() > 0.2
    assert reported[0].sum(-1).max() < 1  # the rest goes to the prompt in front


def test_blt_attends_between_patches():
    config = tiny_config("blt")
    config.patching_threshold = 4.9
    model, ids = redrawn(config), text()
    sides: dict[str, int] = {}
    for path in ("local_encoder", "global_transformer", "local_decoder"):
        attention = model.model.get_submodule(f"{path}.layers.0.self_attn")
        attention.register_forward_hook(
            lambda _, __, output, path=path: sides.update({path: output[0].shape[1]})
        )
    with torch.no_grad():
        model(ids, use_cache=False)
    assert sides["local_encoder"] == sides["local_decoder"] == LENGTH
    assert 1 < sides["global_transformer"] < LENGTH


def test_block_sparse_big_bird_is_refused_because_it_changes_with_the_length():
    model = sparse_big_bird()
    refused = 'attention_type="original_full" and is_decoder=True'
    with pytest.raises(UnsupportedArchitectureError, match=refused):
        AttentionReader(model)
    attention = model.bert.encoder.layer[0].attention
    assert type(attention.self).__name__ == "BigBirdBlockSparseAttention"
    with torch.no_grad():
        model(text(12))
    assert type(attention.self).__name__ == "BigBirdSelfAttention"
    remedy = deepcopy(model.config)
    remedy.attention_type, remedy.is_decoder = "original_full", True
    AttentionReader(redrawn(remedy)).verify()
