"""A model cannot tell that it was read: weights, modes, gradients, threads, memory."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from copy import deepcopy

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from flowtracer_plugin.attention import AttentionCall
from flowtracer_plugin.model.causal_lm import language_model, vocabulary_size
from flowtracer_plugin.reading.reader import AttentionReader
from flowtracer_plugin.reading.runner import BACKENDS
from tests.attention.reference_attention import eager_attentions, eager_head_mean
from tests.families import LAYERS, VOCABULARY, tiny_model
from tests.reading.comparison import (
    SOME_LAYERS,
    Misreader,
    assert_close,
    count_calls,
    eager_twin,
    prompt,
)

pytestmark = [
    # PEFT 0.21 still uses what transformers 5.23 renamed, and so do we, for transformers 5.20.
    pytest.mark.filterwarnings(
        r"ignore:`\w*gradient_checkpointing\w*` is deprecated:FutureWarning"
    ),
]


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


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma2", "gpt_oss", "gpt2"])
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
    assert_close(found, eager_head_mean(eager_twin("llama"), *prompt(), SOME_LAYERS))


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lora_model_is_read_with_its_lora_merged_or_not_and_without_its_dropout(backend):
    ids, mask = prompt("left")
    model = with_lora(tiny_model("llama"))
    merged = deepcopy(model).merge_and_unload().eval()
    twin = deepcopy(merged)
    twin.set_attn_implementation("eager")
    wanted = eager_head_mean(twin, ids, mask, SOME_LAYERS)
    reader = AttentionReader(model.eval(), backend=backend)
    found = reader.read(ids, mask, SOME_LAYERS)
    assert_close(found, wanted)
    plain = AttentionReader(tiny_model("llama"), backend=backend).read(ids, mask, SOME_LAYERS)
    assert (plain - found).abs().max() > 0.01
    trained = AttentionReader(model.train(), backend=backend)
    assert torch.equal(trained.read(ids, mask, SOME_LAYERS), found)
    of_merged = AttentionReader(merged, backend=backend)
    assert_close(of_merged.read(ids, mask, SOME_LAYERS), wanted)
    for each in (reader, of_merged):
        each.verify()


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


# --- stopping, failing, sharing ---


def test_the_forward_pass_ends_at_the_last_layer_that_is_read():
    model = tiny_model("llama")
    counts = count_calls(model)
    AttentionReader(model).read(*prompt(), [0, 2])
    ran = [counts[f"model.layers.{layer}"] for layer in range(LAYERS)]
    assert ran == [1, 1, 1, 0, 0, 0]
    assert counts["model.layers.2.mlp"] == counts["model.norm"] == counts["lm_head"] == 0


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
        for _ in range(10):
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


def test_reads_leak_no_memory():
    reader = AttentionReader(tiny_model("llama"))
    ids, mask = prompt()
    for _ in range(20):
        reader.read(ids, mask, SOME_LAYERS)
    process = psutil.Process()
    tensors, resident = live_tensors(), process.memory_info().rss
    for _ in range(300):
        reader.read(ids, mask, SOME_LAYERS)
    # What other tests left behind may go meanwhile.
    assert live_tensors() <= tensors
    # The tensors of 300 forward passes would take 60 MB.
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
