"""Reformer's chunks and hashes, by the derivative of what it computes by its values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, ReformerConfig

import flowtracer_plugin as ft
from flowtracer_plugin.attention import UnsupportedArchitectureError
from flowtracer_plugin.reading.reader import AttentionReader
from tests.conformance.probed import PROBES, probed_attention
from tests.families import redrawn
from tests.reading.comparison import assert_close
from tests.reading.own_ways import TOKENS, padded, text

CHUNK = 8
KINDS: dict[str, dict[str, Any]] = {
    "local": {"attn_layers": ["local"] * 2},
    "local, three chunks": {"attn_layers": ["local"] * 2, "local_num_chunks_before": 2},
    "local, own chunk": {"attn_layers": ["local"] * 2, "local_num_chunks_before": 0},
    "hashed once": {"num_hashes": 1},
    "hashed three times": {"num_hashes": 3},
    "hashed in two factors": {"num_hashes": 2, "num_buckets": [2, 4]},
    "both": {"attn_layers": ["local", "lsh"], "num_hashes": 2},
}


def reformer(**options: Any) -> PreTrainedModel:
    chosen = {"attn_layers": ["lsh"] * 2, "num_buckets": 4, "hash_seed": 0, **options}
    config = ReformerConfig(
        **TOKENS, hidden_size=64, num_attention_heads=4, attention_head_size=16,
        feed_forward_size=64, axial_pos_shape=[8, 16], axial_pos_embds_dim=[32, 32],
        local_attn_chunk_length=CHUNK, lsh_attn_chunk_length=CHUNK, is_decoder=True, **chosen,
    )  # fmt: skip
    return redrawn(config)


def wanted(model: PreTrainedModel, ids: Tensor) -> dict[int, Tensor]:
    shown = torch.ones_like(ids, dtype=torch.bool)
    found = probed_attention(model, ids, shown, PROBES["reformer"])
    return {layer: map_.float().mean(1) for layer, map_ in found.items()}


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        *(("both", tokens) for tokens in (5, CHUNK, CHUNK + 1, 29, 4 * CHUNK)),
        *((kind, tokens) for kind in KINDS if kind != "both" for tokens in (CHUNK + 1, 29)),
    ],
)
def test_every_layer_is_read_as_computed(kind, tokens):
    model = reformer(**KINDS[kind])
    ids = text(tokens)
    expected = wanted(model, ids)
    reader = AttentionReader(model)
    for layer, map_ in expected.items():
        found = reader.read(ids, torch.ones_like(ids, dtype=torch.bool), [layer])
        assert_close(found, map_)
        assert_close(found.sum(-1), torch.ones(1, tokens), 5e-3)  # the model's own rounding
        assert not found.triu(1).any()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_within_a_chunk_changes_nothing_and_the_self_check_passes(kind):
    reader, ids = AttentionReader(reformer(**KINDS[kind])), text(29)
    reader.verify()
    alone = reader.read(ids, torch.ones_like(ids, dtype=torch.bool), [0, 1])
    for side in ("left", "right"):
        more, mask = padded(ids, **{side: 3})
        found = reader.read(more, mask, [0, 1])
        assert_close(found[:, mask[0]][:, :, mask[0]], alone)


def test_a_chunk_of_padding_changes_what_hashed_layers_compute_themselves():
    model, ids = reformer(), text(29)
    more, mask = padded(ids, right=CHUNK + 3)
    with torch.no_grad():
        alone = model(ids, attention_mask=torch.ones_like(ids)).logits
        found = model(more, attention_mask=mask.long()).logits[:, :29]
    assert (found - alone).abs().max() > 1e-2  # the first chunk looks at the last one


def test_hashes_leave_the_random_numbers_alone():
    tracer = ft.wrap(reformer(attn_layers=["lsh"]), layers=[0], preset="paper")
    tracer.attention(text(32))
    torch.manual_seed(1)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    tracer.attention(text(32))
    assert torch.equal(torch.rand(3), drawn)


def test_buckets_by_the_first_text_are_refused_with_the_setting_that_helps():
    with pytest.raises(UnsupportedArchitectureError, match="num_buckets=, a power of two near"):
        ft.wrap(reformer(num_buckets=None), preset="paper")
    with torch.no_grad():
        model = reformer(num_buckets=None)
        model(text(32))
        assert model.config.num_buckets == 8  # 2 · 32 / 8
    ft.wrap(model, preset="paper")


def test_hashes_that_are_drawn_anew_are_refused_with_the_setting_that_helps():
    torch.manual_seed(0)
    model, ids = reformer(hash_seed=None), text(32)
    with torch.no_grad():
        first, second = (model(ids).logits for _ in range(2))
    assert (first - second).abs().max() > 1e-3  # no pass tells what another one did
    with pytest.raises(UnsupportedArchitectureError, match="load it with hash_seed=0"):
        ft.wrap(model, preset="paper")
    ft.wrap(reformer(hash_seed=0), preset="paper").attention(ids)


def test_local_layers_need_no_seed():
    ft.wrap(reformer(attn_layers=["local"] * 2, hash_seed=None), preset="paper").attention(text(32))


def test_a_cached_prefix_is_refused():
    model, ids = reformer(), text(32)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_buckets_states
    with pytest.raises(NotImplementedError, match="pass the whole text"):
        ft.wrap(model, preset="paper").attention(
            ids[:, :1], model_inputs={"past_buckets_states": cache}
        )
