"""Unusual models and inputs: without a head, with masks of their own, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import AttentionInterface

import flowtracer_plugin as ft
from flowtracer_plugin.attention import (
    AdapterMismatchError,
    AttentionAdapter,
    AttentionCall,
    AttentionSite,
    UnsupportedArchitectureError,
)
from flowtracer_plugin.reading.runner import BACKENDS
from tests.attention.reference_attention import eager_head_mean
from tests.families import quiet_transformers, redrawn, tiny_model
from tests.reading.comparison import SOME_LAYERS, assert_close, eager_twin, prompt

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning"),
]
SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 6,
    "num_attention_heads": 4,
}  # fmt: skip
BOTH = pytest.mark.parametrize("backend", BACKENDS)


# --- masks and positions ---


@pytest.fixture
def _own_function():
    """Attention with a window, registered without a function that makes masks."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any):
        assert mask is None
        each = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(each, dim=1) for x in (key, value))
        place = torch.arange(query.shape[2])
        behind = place[:, None] - place
        seen = (behind >= 0) & (behind < (options.get("sliding_window") or len(place)))
        scores = (query @ key.mT * options["scaling"]).masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("own", attend)
    yield
    del AttentionInterface._global_mapping["own"]


@BOTH
@pytest.mark.usefixtures("_own_function")
def test_a_window_that_comes_without_a_mask_is_read(backend):
    def model(implementation: str) -> PreTrainedModel:
        config = MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=32)
        config._attn_implementation = implementation
        return redrawn(config)

    ids = torch.randint(3, 100, (1, 60), generator=torch.Generator().manual_seed(1))
    shown = torch.ones_like(ids)
    wanted = eager_head_mean(model("eager"), ids, shown, SOME_LAYERS)
    found = ft.wrap(model("own"), layers=SOME_LAYERS, backend=backend, preset="paper").attention(
        ids
    )
    assert_close(found, wanted)
    assert found[0, -1, :28].eq(0).all()


@BOTH
def test_a_mask_that_is_given_is_passed_on_beside_positions(backend):
    model, (ids, _) = tiny_model("llama"), prompt()
    positions = torch.arange(ids.shape[1]).expand_as(ids).clone()
    tracer = ft.wrap(model, layers=SOME_LAYERS, backend=backend, preset="paper")
    with torch.no_grad():
        reported = eager_twin("llama")(
            ids, attention_mask=torch.ones_like(ids), position_ids=positions * 1,
            output_attentions=True, use_cache=False,
        ).attentions  # fmt: skip
    wanted = torch.stack([reported[layer].mean(1) for layer in SOME_LAYERS]).mean(0)
    given = {"position_ids": positions}
    assert_close(tracer.attention(ids, torch.ones_like(ids), model_inputs=given), wanted)
    positions[:, ids.shape[1] // 2 :] = torch.arange(ids.shape[1] - ids.shape[1] // 2)
    packed = tracer.attention(ids, model_inputs=given)
    assert packed[:, ids.shape[1] // 2 :, : ids.shape[1] // 2].eq(0).all()
    with pytest.raises(ValueError, match="leave attention_mask out, and the padding"):
        tracer.attention(ids, torch.ones_like(ids), model_inputs=given)


def test_positions_of_padding_do_not_count_as_restarts():
    ids, mask = prompt("left")
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    tracer = ft.wrap(tiny_model("llama"), layers=SOME_LAYERS, preset="paper")
    found = tracer.attention(ids, mask.long(), model_inputs={"position_ids": positions})
    assert_close(found, tracer.attention(ids, mask.long()))


# --- models of another build ---


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_an_encoder_beside_the_decoder_is_refused(kind):
    sizes = {"d_model": 32, "vocab_size": 64, "pad_token_id": 0, "decoder_start_token_id": 1}
    with quiet_transformers():
        model = (
            BartForConditionalGeneration(BartConfig(**sizes, encoder_layers=1, decoder_layers=1))
            if kind == "bart"
            else T5ForConditionalGeneration(T5Config(**sizes, num_layers=1, d_ff=32))
        )
    with pytest.raises(UnsupportedArchitectureError, match=r"encodes one text and decodes another"):
        ft.wrap(model, preset="paper")


@BOTH
def test_a_model_without_a_head_is_read(backend):
    model = tiny_model("llama")
    ids, mask = prompt("left")
    wanted = ft.wrap(model, layers=SOME_LAYERS, preset="paper").attention(ids, mask)
    body = ft.wrap(model.model, layers=SOME_LAYERS, backend=backend, preset="paper")
    assert_close(body.attention(ids, mask), wanted)
    bare = AutoModel.from_config(model.config).eval()
    assert ft.wrap(bare, backend=backend, preset="paper").attention(ids).shape == (
        len(ids),
        *ids.shape[1:] * 2,
    )


class PlainConfig(PreTrainedConfig):
    model_type = "plain"


class PlainAttention(nn.Module):
    """Attention through PyTorch's function."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_idx, self.project = number, nn.Linear(32, 96)

    def forward(self, states: Tensor) -> Tensor:
        parts = self.project(states).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        seen = torch.ones(states.shape[1], states.shape[1], dtype=torch.bool).tril()
        mixed = nn.functional.scaled_dot_product_attention(*parts, attn_mask=seen)
        return states + mixed.transpose(1, 2).flatten(2)


class OwnAttention(PlainAttention):
    def forward(self, states: Tensor) -> Tensor:
        query, key, value = self.project(states).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        seen = torch.ones(states.shape[1], states.shape[1], dtype=torch.bool).tril()
        scores = (query @ key.mT / 8**0.5).masked_fill(~seen, -torch.inf)
        weights = torch.softmax(scores, dim=-1)
        mixed = torch.matmul(weights, value)
        return states + mixed.transpose(1, 2).flatten(2)


class PlainForCausalLM(PreTrainedModel):
    config_class = PlainConfig

    def __init__(self, config: PlainConfig, kinds: list[type[PlainAttention]]) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.ModuleList(kind(number) for number, kind in enumerate(kinds))
        self.head = nn.Linear(32, 64)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        states = self.embed(input_ids)
        for layer in self.layers:
            states = layer(states)
        return CausalLMOutput(logits=self.head(states))


@pytest.mark.parametrize("kind", [PlainAttention, OwnAttention])
def test_a_model_that_takes_ids_only_is_read_one_text_at_a_time(kind):
    model = PlainForCausalLM(PlainConfig(), [kind] * 2).eval()
    ids = torch.arange(3, 20)[None]
    found = ft.wrap(model, preset="paper").attention(ids)
    assert_close(found.sum(-1), torch.ones(1, 17))
    assert not found.triu(1).any()
    tracer, mask = ft.wrap(model, verify=False, preset="paper"), torch.ones_like(ids)
    mask[0, :2] = 0  # nobody sees the padding of a single text, which is cut off
    assert_close(tracer.attention(ids, mask)[:, 2:, 2:], tracer.attention(ids[:, 2:]))
    two, masks = ids.repeat(2, 1), torch.cat([mask, torch.ones_like(mask)])
    with pytest.raises(ValueError, match=r"takes no attention_mask.* one text at a time"):
        tracer.attention(two, masks)


class MatmulAdapter(AttentionAdapter):
    """Looks for another product than that of `OwnAttention`."""

    name = "matmul"

    def matches(self, model: nn.Module) -> bool:
        return True

    def sites(self, model: nn.Module) -> tuple[AttentionSite, ...]:
        return (AttentionSite(layer=0, module="layers.0", function="torch.bmm"),)

    def read(self, module: nn.Module, args: Any, kwargs: Any) -> AttentionCall:
        raise NotImplementedError


def test_a_call_that_is_not_made_is_answered_with_the_names_to_write():
    model = PlainForCausalLM(PlainConfig(), [OwnAttention]).eval()
    with pytest.raises(AdapterMismatchError) as caught:
        ft.wrap(model, adapter=MatmulAdapter(), preset="paper").attention(torch.arange(3, 20)[None])
    said = str(caught.value)
    assert said.startswith("the adapter 'matmul' looks for a call of 'torch.bmm' in layers.0")
    assert "self.project, " in said
    assert "torch.softmax, torch.matmul, " in said
    assert "_0" not in said
    assert " mixed," not in said  # an assignment
    assert "masked_fill, " in said


def test_two_ways_of_attending_in_one_model_are_named():
    model = PlainForCausalLM(PlainConfig(), [PlainAttention, OwnAttention]).eval()
    with pytest.raises(
        UnsupportedArchitectureError, match=r"two ways.*only 'weights' finds layers.1"
    ):
        ft.wrap(model, preset="paper")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_context_shorter_than_the_check_is_no_obstacle(backend):
    model = redrawn(GPT2Config(n_positions=12, n_embd=32, n_layer=2, n_head=2, vocab_size=64))
    assert ft.wrap(model, backend=backend, preset="paper").attention(
        torch.arange(3, 15)[None]
    ).shape == (1, 12, 12)


def test_a_context_without_a_limit_has_none():
    config = XLNetConfig(
        vocab_size=128, d_model=64, n_layer=2, n_head=4, d_inner=64, attn_type="uni"
    )
    assert ft.wrap(redrawn(config), preset="paper").attention(torch.arange(3, 40)[None]).shape == (
        1,
        37,
        37,
    )


@BOTH
def test_the_result_is_float32_whatever_the_default(backend):
    model, (ids, mask) = tiny_model("llama"), prompt("left")
    wanted = ft.wrap(model, layers=SOME_LAYERS, preset="paper").attention(ids, mask)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = ft.wrap(model, layers=SOME_LAYERS, backend=backend, preset="paper").attention(
            ids, mask
        )
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


# --- refused inputs ---


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("ids", "mask", "kind", "message"),
    [
        ([[3, 4, 5]], None, TypeError, "input_ids must be a torch tensor, got a list"),
        (np.array([[3, 4, 5]]), None, TypeError, "input_ids must be a torch tensor, got a ndarray"),
        (torch.ones(1, 3), None, TypeError, "input_ids must be whole numbers, got torch.float32"),
        (torch.ones(1, 3).long(), [[1, 1, 1]], TypeError, "attention_mask must be a torch tensor"),
        (
            torch.ones(1, 3).long(),
            torch.tensor([[0.0, -1e9, 0.0]]),
            ValueError,
            "must be 1 on tokens",
        ),
        (torch.ones(3).long(), None, ValueError, r"must both be \[batch, token\]"),
    ],
)
def test_inputs_that_are_no_batch_of_ids_are_refused(ids, mask, kind, message):
    with pytest.raises(kind, match=message):
        ft.wrap(tiny_model("llama"), preset="paper").attention(ids, mask)
