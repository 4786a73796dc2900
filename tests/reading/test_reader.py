"""Reading attention: the numbers of every family, on both backends, and how calls are found."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from flowtracer_adapters import InterfaceAdapter
from flowtracer_plugin.attention import AdapterMismatchError, AttentionCall
from flowtracer_plugin.attention.head_mean import add_head_mean
from flowtracer_plugin.reading.reader import AttentionReader
from flowtracer_plugin.reading.runner import BACKENDS
from tests.attention.reference_attention import eager_attentions, eager_head_mean
from tests.device.gpu import GPU, on_gpu
from tests.families import FAMILIES, WINDOW, redrawn, tiny_model
from tests.reading.comparison import (
    MASK_KINDS,
    SOME_LAYERS,
    TOKENS,
    Misreader,
    assert_close,
    eager_twin,
    prompt,
)

SINKS = {"gpt_oss"}


# --- the numbers ---


def check_rows(found: Tensor, mask: Tensor, family: str) -> None:
    """Rows of tokens sum to one unless sinks take their share; no token looks ahead."""
    sums = found.sum(-1)
    assert torch.all(sums[~mask] == 0)
    if family in SINKS:
        assert torch.all((sums[mask] > 0) & (sums[mask] < 0.99))
    else:
        assert_close(sums[mask], torch.ones(int(mask.sum())))
    assert torch.all(found.triu(1) == 0)


@pytest.mark.parametrize(
    ("family", "padding"),
    [
        *((family, "left") for family in FAMILIES),
        *((family, padding) for family in MASK_KINDS for padding in ("none", "right")),
    ],
)
def test_both_backends_read_the_attention_that_eager_reports(family, padding):
    (ids, mask), twin = prompt(padding), eager_twin(family)
    for attention in eager_attentions(twin, ids, mask):  # flat attention would prove nothing
        peaks = attention[:, :, WINDOW:].amax(-1).mT
        assert peaks[mask[:, WINDOW:]].mean() >= 0.15
    found, other = (
        AttentionReader(tiny_model(family), backend=backend).read(ids, mask, SOME_LAYERS)
        for backend in BACKENDS
    )
    assert torch.equal(found, other)
    assert found.dtype == torch.float32
    assert_close(found, eager_head_mean(twin, ids, mask, SOME_LAYERS))
    check_rows(found, mask, family)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_the_implementation_that_the_model_runs_on_does_not_matter(family):
    ids, mask = prompt("left")
    read = {}
    for implementation in ("sdpa", "eager"):
        model = tiny_model(family)
        model.set_attn_implementation(implementation)
        read[implementation] = AttentionReader(model).read(ids, mask, SOME_LAYERS)
        assert model.config._attn_implementation == implementation
    assert_close(read["sdpa"], read["eager"])


@pytest.mark.parametrize("family", [*MASK_KINDS, "qwen3", "qwen3_moe"])
def test_bfloat16_models_are_read_in_float32(family):
    # Eager rounds scores (of size 5) and probabilities to 8 bits, we do not: 6 * 2**-9 at most for
    # one probability of size 1, and less in a mean over heads and layers.
    ids, mask = prompt("left")
    twin = eager_twin(family).to(torch.bfloat16)
    found = AttentionReader(twin).read(ids, mask, SOME_LAYERS)
    assert_close(found, eager_head_mean(twin, ids, mask, SOME_LAYERS), atol=6 * 2**-9)
    check_rows(found, mask, family)


@pytest.mark.parametrize(
    ("family", "block"), [("llama", 1), ("llama", 7), ("gemma2", 7), ("gpt_oss", 7)]
)
def test_the_block_size_does_not_matter(family, block):
    ids, mask = prompt("left")
    found = AttentionReader(tiny_model(family), block=block).read(ids, mask, SOME_LAYERS)
    assert_close(found, eager_head_mean(eager_twin(family), ids, mask, SOME_LAYERS))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "mistral", "gpt_oss"])
def test_sliding_layers_see_their_window_and_others_see_everything(family):
    ids, mask = prompt()
    reader = AttentionReader(tiny_model(family))
    far = [bool(reader.read(ids, mask, [layer])[:, -1, : -2 * WINDOW].any()) for layer in (0, 5)]
    assert far == ([False, False] if family == "mistral" else [False, True])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_left_padding_does_not_change_what_the_tokens_see(family):
    ids, mask = prompt("left")
    reader = AttentionReader(tiny_model(family))
    padded = reader.read(ids, mask, SOME_LAYERS)[-1:, 5:, 5:]
    assert_close(padded, reader.read(ids[-1:, 5:], mask[-1:, 5:], SOME_LAYERS))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_rows_and_columns_of_padding_are_zero_whatever_the_model_computes_there(padding):
    ids, mask = prompt(padding)

    _, behind = prompt("right")  # where the reader puts all padding

    def careless(call: AttentionCall) -> AttentionCall:
        query = call.query.masked_fill(~behind[:, None, :, None], torch.nan)
        return replace(call, query=query, mask=None)

    found = AttentionReader(tiny_model("llama"), Misreader(careless)).read(ids, mask, [0])
    assert found[~mask].eq(0).all()
    assert found.mT[~mask].eq(0).all()
    assert found[mask].sum(-1).gt(0).all()


# --- finding the call ---


class TwiceAssigned(LlamaAttention):
    """Llama's attention as another version might write it: the function's name is set twice."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        attention_interface = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attention_interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, weights = attention_interface(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling
        )
        return self.o_proj(output.flatten(2)), weights


def call_label(reader: AttentionReader) -> str:
    site = reader.sites[0]
    return reader.backend._operation(site).name


def test_a_call_is_found_whatever_number_its_label_has():
    ids, mask = prompt("left")
    plain, other = AttentionReader(tiny_model("llama")), tiny_model("llama")
    for layer in other.model.layers:
        layer.self_attn.__class__ = TwiceAssigned
    twice = AttentionReader(other)
    twice.verify()
    assert call_label(twice) != call_label(plain)
    assert_close(twice.read(ids, mask, SOME_LAYERS), plain.read(ids, mask, SOME_LAYERS))


class WrongName(Misreader):
    def sites(self, model):
        return tuple(replace(site, function="flash") for site in self.right.sites(model))


def test_a_function_that_is_not_called_is_named_beside_those_that_are():
    reader = AttentionReader(tiny_model("llama"), WrongName(lambda call: call))
    with pytest.raises(AdapterMismatchError, match=r"a call of 'flash' in model\.layers\.0"):
        reader.verify()


def test_a_call_on_a_branch_that_is_not_taken_is_an_adapter_mismatch():
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64)
    config.update({"bos_token_id": 1, "eos_token_id": 2, "reorder_and_upcast_attn": True})
    model = redrawn(config)
    reader = AttentionReader(model)
    reader.verify()
    model.set_attn_implementation("eager")
    reader.verified = False
    with pytest.raises(AdapterMismatchError, match="call that GPT2LMHeadModel does not make"):
        reader.verify()


def test_masks_that_an_implementation_keeps_to_itself_are_refused():
    adapter, query = InterfaceAdapter(), torch.zeros(1, 2, 3, 4)
    args = (nn.Identity(), query, query, query, torch.ones(1, 3))
    with pytest.raises(NotImplementedError, match=re.escape('attn_implementation="sdpa"')):
        adapter.read(nn.Identity(), args, {})


# --- other devices ---


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_read_on_cuda_gives_the_numbers_of_the_cpu(family):
    ids, mask = prompt("left")
    wanted = AttentionReader(tiny_model(family)).read(ids, mask, SOME_LAYERS)
    with on_gpu() as place:
        reader = AttentionReader(place(tiny_model(family)))
        reader.verify()
        found = reader.read(*place([ids, mask]), SOME_LAYERS)
        assert found.device == GPU
        assert_close(found.cpu(), wanted, atol=1e-3)


@pytest.mark.cuda
def test_the_head_mean_never_waits_for_the_device():
    # Mask building in transformers waits for the device itself, so waiting is no error here;
    # the head mean, which is ours, must not wait at all.
    call = AttentionCall(
        query=torch.randn(2, 4, TOKENS, 16, device="cuda"),
        key=torch.randn(2, 2, TOKENS, 16, device="cuda"),
        mask=torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool, device="cuda").tril(),
        scaling=0.25,
    )
    total = torch.zeros(2, TOKENS, TOKENS, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        add_head_mean(call, total, block=7)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert total.sum() > 0
