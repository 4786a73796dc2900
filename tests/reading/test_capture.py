"""Reading attention through nnsight: right numbers, and a model that cannot tell it was read."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import ClassVar

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from flowtracer_adapters import InterfaceAdapter
from flowtracer_plugin.attention import (
    AdapterMismatchError,
    AttentionAdapter,
    AttentionCall,
)
from flowtracer_plugin.attention.head_mean import add_head_mean
from flowtracer_plugin.model.causal_lm import language_model, vocabulary_size
from flowtracer_plugin.reading.reader import AttentionReader
from tests.attention.reference_attention import eager_attentions, eager_head_mean
from tests.families import FAMILIES, LAYERS, VOCABULARY, WINDOW, redrawn, tiny_model

pytestmark = [
    # PEFT 0.21 still uses what transformers 5.23 renamed, and so do we, for transformers 5.20.
    pytest.mark.filterwarnings(
        r"ignore:`\w*gradient_checkpointing\w*` is deprecated:FutureWarning"
    ),
]

TOKENS = 24
SOME_LAYERS = (1, 2, 4)
SINKS = {"gpt_oss"}
SDPA = tuple(family for family in FAMILIES if family not in {"gemma2", "gpt_oss"})


def prompt(padding: str = "none", *, rows: int = 2) -> tuple[Tensor, Tensor]:
    """Random ids longer than any window, and which of them are visible."""
    ids = torch.randint(3, VOCABULARY, (rows, TOKENS), generator=torch.Generator().manual_seed(7))
    mask = torch.ones(rows, TOKENS, dtype=torch.bool)
    if padding == "left":
        mask[-1, :5] = False
    if padding == "right":
        mask[-1, -5:] = False
    return ids.masked_fill(~mask, 0), mask


def eager_twin(family: str, **overrides) -> PreTrainedModel:
    """The same weights, on the implementation that reports its attention."""
    model = tiny_model(family, **overrides)
    model.set_attn_implementation("eager")
    return model


def assert_close(found: Tensor, wanted: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=atol)


# --- the numbers ---


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tiny_models_attend_with_peaks(family):
    ids, mask = prompt()
    for attention in eager_attentions(eager_twin(family), ids, mask):
        assert attention[:, :, WINDOW:].amax(-1).mean() >= 0.15


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_mean_equals_the_attention_that_eager_reports(family, padding):
    ids, mask = prompt(padding)
    found = AttentionReader(tiny_model(family)).read(ids, mask, SOME_LAYERS)
    assert found.dtype == torch.float32
    assert_close(found, eager_head_mean(eager_twin(family), ids, mask, SOME_LAYERS))


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("family", SDPA)
def test_the_implementation_that_the_model_runs_on_does_not_matter(family, padding):
    ids, mask = prompt(padding)
    read = {}
    for implementation in ("sdpa", "eager"):
        model = tiny_model(family)
        model.set_attn_implementation(implementation)
        read[implementation] = AttentionReader(model).read(ids, mask, SOME_LAYERS)
        assert model.config._attn_implementation == implementation
    assert_close(read["sdpa"], read["eager"])


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_models_are_read_in_float32(family):
    # Eager rounds scores (of size 5) and probabilities to 8 bits, we do not: 6 * 2**-9 at most for
    # one probability of size 1, and less in a mean over heads and layers.
    ids, mask = prompt("left")
    twin = eager_twin(family).to(torch.bfloat16)
    found = AttentionReader(twin).read(ids, mask, SOME_LAYERS)
    assert_close(found, eager_head_mean(twin, ids, mask, SOME_LAYERS), atol=6 * 2**-9)
    if family not in SINKS:
        assert_close(found.sum(-1), mask.double(), atol=1e-5)


@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_the_block_size_does_not_matter(family, block):
    ids, mask = prompt("left")
    found = AttentionReader(tiny_model(family), block=block).read(ids, mask, SOME_LAYERS)
    assert_close(found, eager_head_mean(eager_twin(family), ids, mask, SOME_LAYERS))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_sum_to_one_unless_sinks_take_their_share(family):
    ids, mask = prompt("left")
    found = AttentionReader(tiny_model(family)).read(ids, mask, SOME_LAYERS)
    sums = found.sum(-1)
    assert torch.all(sums[~mask] == 0)
    if family in SINKS:
        assert torch.all((sums[mask] > 0) & (sums[mask] < 0.99))
    else:
        assert_close(sums[mask], torch.ones(int(mask.sum())))
    assert torch.all(found.triu(1) == 0)


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


# --- the model is left as it was ---


def snapshot(model: PreTrainedModel) -> dict:
    ids, mask = prompt("left")
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)  # some parts may be in training, with dropout
        logits = model(input_ids=ids, attention_mask=mask.long()).logits
    return {
        "logits": logits,
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "config": model.config.to_dict(),
        "implementation": model.config._attn_implementation,
        "modes": {name: module.training for name, module in model.named_modules()},
        "gradients": {name: p.requires_grad for name, p in model.named_parameters()},
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict, after: dict) -> None:
    assert list(before["weights"]) == list(after["weights"])
    for name, weight in before["weights"].items():
        assert torch.equal(weight, after["weights"][name]), name
    assert torch.equal(before["logits"], after["logits"])
    assert torch.equal(before["random"], after["random"])
    for part in ("config", "implementation", "modes", "gradients"):
        assert before[part] == after[part]


@pytest.mark.parametrize("family", FAMILIES)
def test_wrapping_reading_and_verifying_leave_no_trace_in_the_model(family):
    model = tiny_model(family)
    next(iter(model.modules())).training = True  # mixed: the model itself, but no part of it
    model.get_submodule(AttentionReader(tiny_model(family)).sites[2].module).train()
    model.get_input_embeddings().requires_grad_(requires_grad=False)
    torch.manual_seed(3)
    before = snapshot(model)
    reader = AttentionReader(model)
    assert_same(before, snapshot(model))
    reader.read(*prompt("left"), SOME_LAYERS)
    reader.verify()
    assert_same(before, snapshot(model))


def trained_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    ids, mask = prompt()
    torch.manual_seed(5)
    model(input_ids=ids, attention_mask=mask.long(), labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_training_step_between_reads_gives_the_gradients_of_an_unread_model(reentrant):
    read, unread = (tiny_model("llama", attention_dropout=0.3).train() for _ in range(2))
    for model in (read, unread):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    reader = AttentionReader(read)
    with torch.enable_grad():
        found = reader.read(*prompt(), SOME_LAYERS)
    assert not found.requires_grad
    assert all(parameter.grad is None for parameter in read.parameters())
    assert read.is_gradient_checkpointing
    wanted, gradients = trained_gradients(unread), trained_gradients(read)
    assert wanted.keys() == gradients.keys()
    assert all(torch.equal(wanted[name], gradients[name]) for name in wanted)
    assert torch.equal(reader.read(*prompt(), SOME_LAYERS), found)


def test_a_read_builds_no_graph_for_gradients():
    model = tiny_model("llama").train()
    seen: list[bool] = []
    model.model.layers[1].register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    with torch.enable_grad():
        AttentionReader(model).read(*prompt(), SOME_LAYERS)
        assert torch.is_grad_enabled()
    assert seen == [False]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
def test_a_model_in_training_is_read_without_dropout_and_without_random_numbers(family):
    dropout = (
        {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}
        if family == "gpt2"
        else {"attention_dropout": 0.5}
    )
    ids, mask = prompt("left")
    wanted = AttentionReader(tiny_model(family)).read(ids, mask, SOME_LAYERS)
    model = tiny_model(family, **dropout).train()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    found = AttentionReader(model).read(ids, mask, SOME_LAYERS)
    assert torch.equal(found, wanted)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())


def with_lora(model: PreTrainedModel) -> nn.Module:
    torch.manual_seed(2)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
    wrapped = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:  # starts at 0: the adapter would do nothing
                parameter.normal_(0, 0.5)
    return wrapped


def test_a_lora_model_is_read_with_its_lora_and_without_its_dropout():
    ids, mask = prompt("left")
    model = with_lora(tiny_model("llama"))
    twin = deepcopy(model).merge_and_unload().eval()
    twin.set_attn_implementation("eager")
    reader = AttentionReader(model.eval())
    found = reader.read(ids, mask, SOME_LAYERS)
    assert_close(found, eager_head_mean(twin, ids, mask, SOME_LAYERS))
    plain = AttentionReader(tiny_model("llama")).read(ids, mask, SOME_LAYERS)
    assert (plain - found).abs().max() > 0.01
    assert torch.equal(AttentionReader(model.train()).read(ids, mask, SOME_LAYERS), found)
    reader.verify()


class Outer(nn.Module):
    """A wrapper that is no transformers model, as DistributedDataParallel's is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_wrappers_may_be_nested_and_read_at_any_level():
    ids, mask = prompt("left")
    inner = with_lora(tiny_model("gpt_oss")).eval()
    outer = Outer(Outer(inner))
    readers = [AttentionReader(model) for model in (outer, inner, language_model(inner), outer)]
    wanted = readers[0].read(ids, mask, SOME_LAYERS)
    for reader in readers:
        reader.verify()
        assert torch.equal(reader.read(ids, mask, SOME_LAYERS), wanted)
    assert language_model(outer) is language_model(inner)
    assert vocabulary_size(outer) == VOCABULARY


def test_a_module_that_holds_no_transformers_model_is_named():
    with pytest.raises(TypeError, match="wanted a transformers model, found Linear"):
        language_model(nn.Linear(2, 2))


def test_autocast_around_a_read_lowers_the_models_precision_only():
    ids, mask = prompt("left")
    reader, twin = AttentionReader(tiny_model("llama")), eager_twin("llama")
    with torch.autocast("cpu", torch.bfloat16):
        found = reader.read(ids, mask, SOME_LAYERS)
        wanted = eager_head_mean(twin, ids, mask, SOME_LAYERS)
        reader.verify()
    assert found.dtype == torch.float32
    assert_close(found.sum(-1), mask.double())
    assert_close(found, wanted, atol=6 * 2**-9)


# --- stopping, failing, sharing ---


def count_calls(model: nn.Module) -> dict[str, int]:
    counts = dict.fromkeys((name for name, _ in model.named_modules()), 0)

    def counting(name: str) -> Callable[..., None]:
        def hook(*_) -> None:
            counts[name] += 1

        return hook

    for name, module in model.named_modules():
        module.register_forward_pre_hook(counting(name))
    return counts


def test_the_forward_pass_ends_at_the_last_layer_that_is_read():
    model = tiny_model("llama")
    counts = count_calls(model)
    AttentionReader(model).read(*prompt(), [0, 2])
    ran = [counts[f"model.layers.{layer}"] for layer in range(LAYERS)]
    assert ran == [1, 1, 1, 0, 0, 0]
    assert counts["model.layers.2.mlp"] == counts["model.norm"] == counts["lm_head"] == 0


class Misreader(AttentionAdapter):
    """The interface adapter, with a mistake."""

    name: ClassVar[str] = "misreader"
    interface: ClassVar[bool] = True

    def __init__(self, mistake: Callable[[AttentionCall], AttentionCall]) -> None:
        self.right, self.mistake = InterfaceAdapter(), mistake

    def matches(self, model):
        return True

    def sites(self, model):
        return self.right.sites(model)

    def read(self, module, args, kwargs):
        return self.mistake(self.right.read(module, args, kwargs))


class AdapterBugError(Exception):
    pass


def test_an_exception_in_an_adapter_reaches_the_caller_and_leaves_the_model_usable():
    def fail(call: AttentionCall) -> AttentionCall:
        raise AdapterBugError("in read()")

    model = tiny_model("llama").train()
    before = snapshot(model)
    with pytest.raises(AdapterBugError, match=re.escape("in read()")):
        AttentionReader(model, Misreader(fail)).read(*prompt(), SOME_LAYERS)
    assert_same(before, snapshot(model))
    wanted = AttentionReader(tiny_model("llama")).read(*prompt(), SOME_LAYERS)
    assert torch.equal(AttentionReader(model).read(*prompt(), SOME_LAYERS), wanted)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_rows_and_columns_of_padding_are_zero_whatever_the_model_makes_of_them(padding):
    ids, mask = prompt(padding)

    _, behind = prompt("right")  # where the reader puts all padding

    def careless(call: AttentionCall) -> AttentionCall:
        query = call.query.masked_fill(~behind[:, None, :, None], torch.nan)
        return replace(call, query=query, mask=None)

    found = AttentionReader(tiny_model("llama"), Misreader(careless)).read(ids, mask, [0])
    assert found[~mask].eq(0).all()
    assert found.mT[~mask].eq(0).all()
    assert found[mask].sum(-1).gt(0).all()


def test_an_exception_in_the_model_reaches_the_caller_and_leaves_the_model_usable():
    model = tiny_model("llama").train()
    reader = AttentionReader(model)
    ids, mask = prompt()
    wanted = reader.read(ids, mask, SOME_LAYERS)
    with pytest.raises(IndexError):
        reader.read(ids + VOCABULARY, mask, SOME_LAYERS)
    assert all(module.training for module in model.modules())
    assert torch.equal(reader.read(ids, mask, SOME_LAYERS), wanted)


def test_the_models_own_attention_output_still_works_after_an_early_stop():
    ids, mask = prompt()
    model = eager_twin("llama")
    before = eager_attentions(model, ids, mask)
    AttentionReader(model).read(ids, mask, [0])
    after = eager_attentions(model, ids, mask)
    assert len(after) == LAYERS
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize("sharing", ["one reader", "two readers", "reader and wrapper's reader"])
def test_threads_that_read_one_model_do_not_disturb_each_other(sharing):
    model = tiny_model("llama").train()
    first = AttentionReader(model)
    second = (
        first
        if sharing == "one reader"
        else AttentionReader(Outer(model) if sharing.endswith("wrapper's reader") else model)
    )
    jobs = [(first, prompt("left"), (0, 2)), (second, prompt("none", rows=3), (1, 5))]
    wanted = [reader.read(*inputs, layers) for reader, inputs, layers in jobs]
    wrong: list[object] = []

    def work(number: int) -> None:
        reader, inputs, layers = jobs[number]
        for _ in range(30):
            try:
                if not torch.equal(reader.read(*inputs, layers), wanted[number]):
                    wrong.append(number)
            except Exception as error:  # noqa: BLE001 - a thread's error is what the test looks for
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(number % 2,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert all(module.training for module in model.modules())


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def test_three_hundred_reads_leak_no_memory():
    reader = AttentionReader(tiny_model("llama"))
    ids, mask = prompt()
    for _ in range(30):
        reader.read(ids, mask, SOME_LAYERS)
    process = psutil.Process()
    tensors, resident = live_tensors(), process.memory_info().rss
    for _ in range(300):
        reader.read(ids, mask, SOME_LAYERS)
    assert live_tensors() == tensors
    # One leaked map of a read, 24 * 24 * 2 floats, would make 1.4 MB; a forward's tensors, 60 MB.
    assert process.memory_info().rss - resident < 8e6


def test_dropping_reader_and_model_frees_the_model():
    model = tiny_model("llama")
    reader = AttentionReader(model)
    reader.verify()
    reader.read(*prompt(), SOME_LAYERS)
    gone = weakref.ref(model)
    del reader, model
    gc.collect()
    assert gone() is None


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


# --- the self-check ---


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
def test_the_self_check_passes(family):
    AttentionReader(tiny_model(family)).verify()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_self_check_catches(mistake):
    family, break_it = MISTAKES[mistake]
    reader = AttentionReader(tiny_model(family), Misreader(break_it))
    with pytest.raises(AdapterMismatchError, match=r"'misreader' misreads \S*\.0\..*mend its read"):
        reader.verify()
    assert not reader.verified


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mistake", [name for name in MISTAKES if "tenth" not in name])
def test_the_self_check_catches_mistakes_in_half_precision(mistake, dtype):
    family, break_it = MISTAKES[mistake]
    reader = AttentionReader(tiny_model(family).to(dtype), Misreader(break_it))
    with pytest.raises(AdapterMismatchError, match="misreads"):
        reader.verify()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
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


# --- other devices ---


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_read_on_cuda_gives_the_numbers_of_the_cpu(family):
    ids, mask = prompt("left")
    reader = AttentionReader(tiny_model(family).cuda())
    reader.verify()
    found = reader.read(ids.cuda(), mask.cuda(), SOME_LAYERS)
    assert found.is_cuda
    wanted = AttentionReader(tiny_model(family)).read(ids, mask, SOME_LAYERS)
    assert_close(found.cpu(), wanted, atol=1e-3)


@pytest.mark.gpu
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
