"""Every way in which a model may be loaded, wrapped or run, on both backends."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import accelerate
import nnsight
import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import AttentionInterface

import flowtracer_plugin as ft
from flowtracer_plugin.attention import UnsupportedArchitectureError
from flowtracer_plugin.model.causal_lm import unwrapped
from flowtracer_plugin.reading.reader import AttentionReader
from flowtracer_plugin.reading.runner import BACKENDS
from tests.attention.reference_attention import eager_head_mean
from tests.families import LAYERS, tiny_model
from tests.reading.comparison import SOME_LAYERS, assert_close, count_calls, eager_twin, prompt

pytestmark = [
    pytest.mark.parametrize("backend", BACKENDS),
    pytest.mark.filterwarnings(
        r"ignore:`\w*gradient_checkpointing\w*` is deprecated:FutureWarning"
    ),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    # torch's own modules for compiling
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning"),
    # transformers 5.23 asks for compiled block masks in the way of older versions of torch
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning"),
]


def wanted(family: str = "llama", padding: str = "left") -> Tensor:
    return eager_head_mean(eager_twin(family), *prompt(padding), SOME_LAYERS)


def check(model: nn.Module, backend: str, expected: Tensor, atol: float = 1e-5) -> None:
    """The model is read right, twice, and passes its self-check."""
    reader = AttentionReader(model, backend=backend)
    reader.verify()
    for _ in range(2):
        assert_close(reader.read(*prompt("left"), SOME_LAYERS), expected, atol)


# --- implementations that keep their mask to themselves ---


@pytest.fixture
def _uncompiled_flex() -> Iterator[None]:
    # Compiled, flex attention takes half a minute a shape, and computes the same.
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.usefixtures("_uncompiled_flex")
@pytest.mark.parametrize(
    ("family", "padding"),
    [
        ("llama", "left"),
        ("mistral", "left"),
        *(("gemma3_text", padding) for padding in ("none", "left", "right")),
    ],
)
def test_flex_attention(family, padding, backend):
    model = tiny_model(family)
    model.set_attn_implementation("flex_attention")
    reader = AttentionReader(model, backend=backend)
    reader.verify()
    assert_close(reader.read(*prompt(padding), SOME_LAYERS), wanted(family, padding))
    assert model.config._attn_implementation == "flex_attention"


def slow_flash(module, query, key, value, mask, scaling=None, sliding_window=None, **kwargs):
    """Flash attention by its documentation: padding is taken out, each packed text is by itself."""
    output = torch.zeros(*query.shape[:3], value.shape[-1])
    positions = kwargs.get("position_ids")
    for row in range(len(query)):
        seen = torch.ones(key.shape[2], dtype=torch.bool) if mask is None else mask[row].bool()
        texts = [seen.nonzero()[:, 0]]
        if mask is None and positions is not None and len(query) == 1:
            starts = (positions[0] == 0).nonzero()[:, 0].tolist()
            texts = torch.arange(key.shape[2]).tensor_split(starts[1:])
        for text in texts:
            distance = torch.arange(len(text))[:, None] - torch.arange(len(text))
            window = sliding_window if sliding_window is not None else len(text)
            output[row, :, text] = scaled_dot_product_attention(
                query[row, :, text], key[row, :, text], value[row, :, text],
                attn_mask=(distance >= 0) & (distance < window), scale=scaling, enable_gqa=True,
            )  # fmt: skip
    return output.transpose(1, 2), None


@pytest.fixture
def _flash() -> Iterator[None]:
    """An implementation that transformers takes for flash attention, which needs a GPU."""
    AttentionInterface.register("flash_by_hand", slow_flash)
    AttentionMaskInterface.register("flash_by_hand", flash_attention_mask)
    yield
    del AttentionInterface._global_mapping["flash_by_hand"]
    del AttentionMaskInterface._global_mapping["flash_by_hand"]


def flash_model(family: str) -> PreTrainedModel:
    model = tiny_model(family)
    model.config._attn_implementation = "flash_by_hand"
    return model


@pytest.mark.usefixtures("_flash")
@pytest.mark.parametrize(
    ("family", "padding"),
    [
        ("llama", "left"),
        ("mistral", "left"),
        *(("gemma3_text", padding) for padding in ("none", "left", "right")),
    ],
)
def test_masks_that_flash_attention_keeps_to_itself_are_rebuilt(family, padding, backend):
    reader = AttentionReader(flash_model(family), backend=backend)
    reader.verify()
    assert_close(reader.read(*prompt(padding), SOME_LAYERS), wanted(family, padding))


@pytest.mark.cuda
def test_flash_attention_on_a_gpu(backend):
    pytest.importorskip("flash_attn", reason="the package flash_attn is not installed")
    model = tiny_model("mistral").to(torch.bfloat16).cuda()
    model.set_attn_implementation("flash_attention_2")
    reader = AttentionReader(model, backend=backend)
    reader.verify()
    ids, mask = prompt("left")
    found = reader.read(ids.cuda(), mask.cuda(), SOME_LAYERS)
    assert_close(found.cpu(), wanted("mistral"), atol=6 * 2**-9)


# --- packed texts, cached prefixes ---


def packed_positions() -> Tensor:
    return torch.cat([torch.arange(10), torch.arange(14)])[None]


def check_packed(model: nn.Module, backend: str) -> None:
    ids, mask = prompt()
    ids, mask = ids[:1], mask[:1]
    tracer = ft.wrap(model, layers=SOME_LAYERS, backend=backend, preset="paper")
    found = tracer.attention(ids, model_inputs={"position_ids": packed_positions()})
    plain = AttentionReader(tiny_model("mistral"))
    for text in (slice(0, 10), slice(10, 24)):
        alone = plain.read(ids[:, text], mask[:, text], SOME_LAYERS)
        assert_close(found[:, text, text], alone)
    assert not found[:, 10:, :10].any()


def test_packed_texts_do_not_see_each_other(backend):
    check_packed(tiny_model("mistral"), backend)


@pytest.mark.usefixtures("_flash")
def test_packed_texts_under_flash_attention(backend):
    check_packed(flash_model("mistral"), backend)


@pytest.mark.usefixtures("_uncompiled_flex")
def test_packed_texts_under_flex_attention(backend):
    model = tiny_model("mistral")
    model.set_attn_implementation("flex_attention")
    check_packed(model, backend)


def cache_of(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> DynamicCache:
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        output = model(
            input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=True
        )
    return output.past_key_values


@pytest.mark.parametrize("new", [1, 9])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_a_cached_prefix_gives_the_rows_of_the_new_tokens(family, new, backend):
    (ids, mask), model = prompt("left"), tiny_model(family)
    old = ids.shape[1] - new
    tracer = ft.wrap(model, layers=SOME_LAYERS, backend=backend, preset="paper")
    cache = cache_of(model, ids[:, :old], mask[:, :old])
    for _ in range(2):
        found = tracer.attention(ids[:, old:], mask, model_inputs={"past_key_values": cache})
        assert cache.get_seq_length() == old
        assert_close(found, wanted(family)[:, old:])


def test_a_mask_must_cover_the_cached_tokens_too(backend):
    (ids, mask), model = prompt(), tiny_model("llama")
    cache = cache_of(model, ids[:, :20], mask[:, :20])
    tracer = ft.wrap(model, backend=backend, preset="paper")
    with pytest.raises(ValueError, match="must cover the 20 cached tokens too"):
        tracer.attention(ids[:, 20:], mask[:, 20:], model_inputs={"past_key_values": cache})


# --- dtypes and quantisation ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, backend):
    model = tiny_model("llama").to(dtype)
    twin = eager_twin("llama").to(dtype)
    # Half precision keeps 8 or 11 bits of scores of size 5, eager also of probabilities.
    check(model, backend, eager_head_mean(twin, *prompt("left"), SOME_LAYERS), atol=6 * 2**-9)


def test_autocast_around_a_read_lowers_the_models_precision_only(backend):
    (ids, mask), model = prompt("left"), tiny_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        expected = eager_head_mean(eager_twin("llama"), ids, mask, SOME_LAYERS)
        check(model, backend, expected, atol=6 * 2**-9)
        found = AttentionReader(model, backend=backend).read(ids, mask, SOME_LAYERS)
    assert found.dtype == torch.float32
    assert_close(found.sum(-1), mask.double())


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_linear_layers_in_int8(backend):
    def quantised(model: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it names its successor, which needs a package more
            return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)

    # Activations are rounded by the range of the batch, padding included, so that only the same
    # implementation on the same batch rounds alike; the self-check holds for any.
    model = quantised(eager_twin("llama"))
    expected = eager_head_mean(model, *prompt(), SOME_LAYERS)
    assert_close(AttentionReader(model, backend=backend).read(*prompt(), SOME_LAYERS), expected)
    assert (expected - wanted(padding="none")).abs().max() > 1e-3
    AttentionReader(quantised(tiny_model("llama")), backend=backend).verify()


# --- where the weights are ---


OFFLOADED = {
    "to memory": lambda model, _: accelerate.cpu_offload(model, torch.device("cpu")),
    "to disk": lambda model, folder: accelerate.disk_offload(model, folder, torch.device("cpu")),
}


@pytest.mark.parametrize("where", OFFLOADED)
def test_offloaded_weights(where, backend, tmp_path):
    model = OFFLOADED[where](tiny_model("llama"), tmp_path)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    check(model, backend, wanted())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert (
        ft.wrap(model, backend=backend, preset="paper").attention(prompt()[0]).device.type == "cpu"
    )


def test_a_device_map_with_parts_on_disk(backend, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    places = {f"model.layers.{n}": "disk" if n % 2 else "cpu" for n in range(LAYERS)}
    outside = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map={**places, **outside, "lm_head": "disk"},
        offload_folder=tmp_path / "weights",
    )
    check(model, backend, wanted())


# --- wrappers ---


def test_virtual_tokens_are_refused(backend):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(UnsupportedArchitectureError, match="PROMPT_TUNING puts virtual tokens"):
        ft.wrap(get_peft_model(tiny_model("llama"), config), backend=backend, preset="paper")


def test_a_model_inside_nnsight(backend):
    model = tiny_model("llama")
    check(nnsight.NNsight(model), backend, wanted())
    assert ft.wrap(nnsight.NNsight(model), backend=backend, preset="paper").model is model


@pytest.fixture
def _process_group() -> Iterator[None]:
    port = str(20_000 + os.getpid() % 20_000)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    distributed.init_process_group("gloo", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_process_group")
def test_data_parallel_wrappers_are_taken_off(backend):
    model = tiny_model("llama")
    for wrapper in (nn.parallel.DistributedDataParallel(model), nn.DataParallel(model)):
        assert unwrapped(wrapper) is model
        check(wrapper, backend, wanted())


@pytest.mark.usefixtures("_process_group")
def test_a_sharded_model_finishes_its_forward_pass_and_still_trains(backend):
    model = tiny_model("llama")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    counts = count_calls(model)
    check(model, backend, wanted())
    assert counts["lm_head"] > 0
    ids, _ = prompt()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
