"""The self-check: it passes right readings in every precision, and names each kind of mistake."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import BartConfig, DeepseekV3Config, GPT2Config, LlamaConfig

from flowtracer_plugin.attention import AdapterMismatchError, AttentionCall
from flowtracer_plugin.reading.reader import AttentionReader
from flowtracer_plugin.reading.runner import BACKENDS
from tests.families import FAMILIES, redrawn, tiny_model
from tests.reading.comparison import MASK_KINDS, Misreader, count_calls, eager_twin

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def swapped(call: AttentionCall) -> AttentionCall:
    shared = call.query.shape[1] // call.key.shape[1]
    key, value = (x.repeat_interleave(shared, 1) for x in (call.key, call.value))
    return replace(call, query=key, key=call.query, value=value)


def interleaved(call: AttentionCall) -> AttentionCall:
    """As if head 0 and head 2 shared a key head, instead of head 0 and head 1."""
    shared = call.query.shape[1] // call.key.shape[1]
    value = call.value.repeat_interleave(shared, 1)
    return replace(call, key=call.key.repeat(1, shared, 1, 1), value=value)


MISTAKES: dict[str, tuple[str, Callable[[AttentionCall], AttentionCall]]] = {
    "scaling left out": ("llama", lambda call: replace(call, scaling=1.0)),
    "scaling a tenth too large": ("qwen3", lambda call: replace(call, scaling=call.scaling * 1.1)),
    "softcap dropped": ("gemma2", lambda call: replace(call, softcap=None)),
    "sinks dropped": ("gpt_oss", lambda call: replace(call, sinks=None)),
    "sinks in another order": ("gpt_oss", lambda call: replace(call, sinks=call.sinks.flip(0))),
    "not causal": ("llama", lambda call: replace(call, mask=None, causal=False)),
    "not causal without a mask": ("llama", lambda call: replace(call, causal=False)),
    "window ignored": ("mistral", lambda call: replace(call, mask=None)),
    "padding ignored": ("llama", lambda call: replace(call, mask=None)),
    "query and key swapped": ("gpt2", swapped),
    "groups interleaved": ("llama", interleaved),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_self_check_passes_on_both_backends(family):
    for backend in BACKENDS:
        AttentionReader(tiny_model(family), backend=backend).verify()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_self_check_catches(mistake):
    family, break_it = MISTAKES[mistake]
    reader = AttentionReader(tiny_model(family), Misreader(break_it))
    with pytest.raises(AdapterMismatchError, match=r"'misreader' misreads \S*\.0\..*mend its read"):
        reader.verify()
    assert not reader.verified


@pytest.mark.parametrize(
    ("mistake", "dtype"),
    [
        *((name, torch.bfloat16) for name in MISTAKES if "tenth" not in name),
        ("scaling left out", torch.float16),  # its tolerance is smaller than that of bfloat16
        ("sinks dropped", torch.float16),
    ],
)
def test_the_self_check_catches_mistakes_in_half_precision(mistake, dtype):
    family, break_it = MISTAKES[mistake]
    reader = AttentionReader(tiny_model(family).to(dtype), Misreader(break_it))
    with pytest.raises(AdapterMismatchError, match="misreads"):
        reader.verify()


@HALF
@pytest.mark.parametrize("family", [*MASK_KINDS, "qwen3", "qwen3_moe"])
def test_the_self_check_allows_for_the_rounding_of_half_precision(family, dtype):
    AttentionReader(tiny_model(family).to(dtype)).verify()


def test_the_self_check_allows_for_rounding_where_scores_are_large():
    model = eager_twin("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(8)
    AttentionReader(model.to(torch.bfloat16)).verify()


TINY = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 128}
SMALL_LLAMA = {
    **TINY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
UNUSUAL = {
    "scaling by layer": GPT2Config(
        **TINY, n_embd=64, n_layer=3, n_head=4, scale_attn_by_inverse_layer_idx=True
    ),
    "values wider than keys": DeepseekV3Config(
        **SMALL_LLAMA, q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16,
        v_head_dim=40, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        n_group=1, topk_group=1, first_k_dense_replace=1, num_key_value_heads=4,
    ),
    "five known tokens": LlamaConfig(**{**SMALL_LLAMA, "vocab_size": 5}),
    "sixteen heads": LlamaConfig(
        **{**SMALL_LLAMA, "num_attention_heads": 16, "num_key_value_heads": 4}
    ),
    "an encoder's place in every layer": BartConfig(
        **TINY, d_model=64, decoder_layers=2, encoder_layers=1, decoder_attention_heads=4,
        encoder_attention_heads=4, decoder_ffn_dim=64, encoder_ffn_dim=64, is_decoder=True,
        is_encoder_decoder=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSUAL)
def test_the_self_check_passes_for_unusual_models(kind):
    model = redrawn(UNUSUAL[kind])
    AttentionReader(model.train()).verify()
    assert model.training


def test_the_self_check_passes_where_values_are_zero():
    model = tiny_model("llama")
    nn.init.zeros_(model.model.layers[1].self_attn.v_proj.weight)
    AttentionReader(model).verify()


def test_the_self_check_fails_where_values_are_not_numbers():
    model = tiny_model("llama")
    nn.init.constant_(model.model.layers[1].self_attn.v_proj.weight, torch.nan)
    with pytest.raises(ValueError, match=r"logits that are not finite .* weights are damaged"):
        AttentionReader(model).verify()


def test_the_self_check_needs_values():
    reader = AttentionReader(tiny_model("llama"), Misreader(lambda call: replace(call, value=None)))
    with pytest.raises(AdapterMismatchError, match="reads no values"):
        reader.verify()


def test_the_self_check_names_shapes_that_do_not_fit():
    def narrow(call: AttentionCall) -> AttentionCall:
        return replace(call, value=call.value[..., :-1])

    with pytest.raises(AdapterMismatchError, match=re.escape("[1, 17, 4, 15]")):
        AttentionReader(tiny_model("llama"), Misreader(narrow)).verify()


def test_the_self_check_runs_once():
    model = tiny_model("llama")
    reader = AttentionReader(model)
    reader.verify()
    counts = count_calls(model)
    reader.verify()
    assert not any(counts.values())


def test_the_self_check_compares_the_logits_of_a_traced_and_a_plain_run(monkeypatch):
    model = tiny_model("llama")
    passes = 0

    def drift(module, args, output):
        nonlocal passes
        passes += 1
        return output + passes

    model.lm_head.register_forward_hook(drift)
    with pytest.raises(AdapterMismatchError, match="does not give the model's own logits"):
        AttentionReader(model).verify()
