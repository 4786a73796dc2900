"""Edges weighed by the influence of heads and rows on what was sampled."""

import warnings
from copy import deepcopy

import accelerate
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

import flowtracer_plugin as ft
from flowtracer_plugin.attention import UnsupportedArchitectureError
from flowtracer_plugin.model.causal_lm import unwrapped
from flowtracer_plugin.model.parallel import is_compiled
from flowtracer_plugin.reading.edges import EdgeChoice
from flowtracer_plugin.reading.influence import log_odds
from flowtracer_plugin.reading.reader import AttentionReader
from flowtracer_plugin.reading.runner import BACKENDS
from tests.families import FAMILIES, tiny_model
from tests.reading.test_edges import LAYERS, projection_by_name, texts
from tests.tiny import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

START = 6


def decided_tokens(ids, mask=None):
    said = torch.arange(ids.shape[1]).expand_as(ids) >= START
    return said if mask is None else said & mask


def sum_of_log_odds(model, ids, said, temperature=1.0):
    """By the probabilities themselves, in float64."""
    chances = (model(input_ids=ids).logits.double() / temperature).softmax(-1)
    total = 0.0
    for text, token in said.nonzero().tolist():
        chance = chances[text, token - 1, ids[text, token]]
        total = total + chance.log() - (1 - chance).log()
    return total


def gradients_by_hand(model, ids, said, temperature=1.0):
    """The gradient of the log-odds by a number that is added to each attention output."""
    found = []
    for site in AttentionReader(model).sites:
        if site.layer not in LAYERS:
            continue
        projection = projection_by_name(model, site)
        width = projection.weight.shape[1 if isinstance(projection, torch.nn.Linear) else 0]
        moved = torch.zeros(*ids.shape, width, dtype=model.dtype, requires_grad=True)
        hook = projection.register_forward_pre_hook(
            lambda _module, args, moved=moved: (args[0] + moved,)
        )
        (gradient,) = torch.autograd.grad(sum_of_log_odds(model, ids, said, temperature), moved)
        hook.remove()
        found.append(gradient)
    return found


def influence_by_hand(model, ids, mask, temperature=1.0, heads=4):
    """For each layer `[batch, head, token]`; each text alone and unpadded, at eager attention."""
    model.set_attn_implementation("eager")
    found = [torch.zeros(len(ids), heads, ids.shape[1]) for _ in LAYERS]
    for text, seen in enumerate(mask):
        alone, said = ids[text : text + 1, seen], decided_tokens(ids[text : text + 1])[:, seen]
        gradients = gradients_by_hand(model, alone, said, temperature)
        for layer, gradient in enumerate(gradients):
            each = gradient.reshape(alone.shape[1], heads, -1).norm(dim=-1)
            found[layer][text, :, seen] = each.T.float()
    return found


def padded(batch=2):
    """Texts of which the last has padding on the left."""
    ids = texts(batch)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[-1, :3] = False
    return ids.masked_fill(~mask, 0), mask


@pytest.mark.parametrize("family", FAMILIES)
def test_influence_is_the_gradient_of_the_log_odds(family):
    (ids, mask), model, twin = padded(), tiny_model(family), tiny_model(family)
    if family not in ("qwen3_moe", "gpt_oss"):  # whose experts multiply no doubles
        model, twin = model.double(), twin.double()
    found = AttentionReader(model).influences(ids, mask, decided_tokens(ids, mask), LAYERS)
    for sizes, wanted in zip(found, influence_by_hand(twin, ids, mask), strict=True):
        assert_close(sizes, wanted, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_both_backends_read_the_same_edges(family):
    ids, mask = padded()
    said, none = decided_tokens(ids, mask), torch.zeros_like(mask)
    choice = EdgeChoice(heads="all", edges="influence", target=said, reasoning=none, decided=said)
    readers = [AttentionReader(tiny_model(family), backend=one) for one in BACKENDS]
    one, other = (reader.read(ids, mask, LAYERS, choice=choice) for reader in readers)
    assert one.any()
    assert_close(one, other)


def adapted(model):
    config = LoraConfig(
        r=4, target_modules=["o_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False
    )
    torch.manual_seed(0)
    return get_peft_model(model, config).train()


def test_influence_of_adapted_half_and_eager_models():
    ids, mask = padded()
    said = decided_tokens(ids, mask)
    lora = adapted(tiny_model("llama"))
    # Numbers of 8 bits: each of some 20 steps to the logits and back rounds by up to 2**-9.
    cases = [("eager", tiny_model("llama"), 1e-4), ("sdpa", lora, 1e-4)]
    cases += [("sdpa", tiny_model(family).bfloat16(), 0.08) for family in ("llama", "mistral")]
    for implementation, model, tolerance in cases:
        inner = unwrapped(model.get_base_model() if model is lora else model)
        inner.set_attn_implementation(implementation)
        reader = AttentionReader(model)
        found = reader.influences(ids, mask, said, LAYERS)
        twin = deepcopy(model).float().eval()
        plain = twin.merge_and_unload() if model is lora else twin
        for sizes, wanted in zip(found, influence_by_hand(plain, ids, mask), strict=True):
            assert (sizes - wanted).norm() <= tolerance * wanted.norm()
    assert lora.training


# The graph of a pass that somebody else makes


def chances_of(model, ids, mask, temperature=1.0):
    """The log-probabilities of the tokens from `START` on, with their graph."""
    logits = model(input_ids=ids, attention_mask=mask.long()).logits / temperature
    chances = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    return chances[:, START - 1 :, 0]


def heard(model, ids, mask, temperature=1.0):
    """Influence by the graph of a pass over each text, and the log-probabilities."""
    outputs = AttentionReader(model, backend="interface").outputs(LAYERS)
    with outputs.listening():
        each = zip(ids[:, None], mask[:, None], strict=True)
        chances = torch.cat([chances_of(model, *text, temperature) for text in each])
    return outputs.influences(chances, mask, mask), chances


def test_the_graph_of_another_pass_gives_influence_and_stays_as_it_is():
    temperature = 0.6
    ids, mask = padded()
    model, twin, plain = (tiny_model("llama") for _ in range(3))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    found, chances = heard(model, ids, mask, temperature)
    wanted = influence_by_hand(twin, ids, mask, temperature)
    for sizes, size in zip(found, wanted, strict=True):
        assert_close(sizes, size, rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())
    chances.sum().backward()
    each = zip(ids[:, None], mask[:, None], strict=True)
    torch.cat([chances_of(plain, *text, temperature) for text in each]).sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_rows_before_the_first_decision_skip_the_head():
    model, seen = tiny_llama().eval(), []
    model.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    made = AttentionReader(model)
    ids = torch.randint(3, 20, (2, 12))
    visible = torch.ones_like(ids, dtype=torch.bool)
    visible[1, :2] = False
    decided = visible.clone()
    decided[:, :8] = False
    layers = [site.layer for site in made.sites]
    found = made.influences(ids, visible, decided, layers)
    # The second text begins two columns earlier once its padding is behind.
    assert seen[-1] == 5 + 2
    for layer in made.influences(ids, visible, torch.zeros_like(decided), layers):
        assert not layer.any()
    assert all(layer.isfinite().all() and layer.any() for layer in found)


def test_influence_of_certain_tokens_is_finite_and_hidden_tokens_have_none():
    ids, mask = padded()
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight *= 30
        for place in range(START, ids.shape[1]):
            ids[0, place] = model(input_ids=ids[:1, :place]).logits[0, -1].argmax()
    mask[1, -4:] = False
    found, chances = heard(model, ids, mask)
    assert (chances[0] == 0).any()  # p is 1
    for sizes in found:
        assert sizes.isfinite().all()
        assert not sizes[1, :, ~mask[1]].any()
        # Rows up to the last that decides a visible token have influence, and no other.
        assert sizes[1, :, START:-5].all()
        assert not sizes[1, :, -5:].any()


def test_a_graph_without_some_outputs_gives_no_influence():
    ids, mask = padded()
    model = tiny_model("llama").requires_grad_(False)
    model.model.layers[LAYERS[0]].mlp.requires_grad_(True)  # behind the attention of this layer
    assert heard(model, ids, mask)[0] is None
    with torch.no_grad():
        assert heard(tiny_model("llama"), ids, mask)[0] is None


class Overwriting(torch.autograd.Function):
    """A sine whose backward pass overwrites what it saved, as some fused kernels do."""

    @staticmethod
    def forward(ctx, numbers):
        ctx.save_for_backward(numbers)
        return numbers.sin()

    @staticmethod
    def backward(ctx, gradient):
        (saved,) = ctx.saved_tensors
        gradient = gradient * saved.cos()
        saved.data.copy_(gradient)
        return gradient


def test_graphs_that_serve_one_backward_pass_only_are_noticed():
    model = tiny_model("llama")
    assert AttentionReader(model, backend="interface").keeps_graph
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert not AttentionReader(model, backend="interface").keeps_graph
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert AttentionReader(model, backend="interface").keeps_graph
    model.model.layers[5].mlp.act_fn.forward = Overwriting.apply
    assert not AttentionReader(model, backend="interface").keeps_graph


def test_compiled_parts_are_noticed():
    whole, part = tiny_model("llama"), tiny_model("llama")
    assert not is_compiled(whole)
    assert is_compiled(torch.compile(whole, backend="eager"))
    part.model.layers[2].compile(backend="eager")
    assert is_compiled(part)
    whole.forward = torch.compile(whole.forward, backend="eager")
    assert is_compiled(whole)


# Edges


def test_edges_are_those_of_the_slow_definition():
    model, ids = tiny_llama(vocab_size=len(tiny_tokenizer())), texts(1)
    prompt, said = ids[0, :START].tolist(), ids[0, START:].tolist()
    options = {"answer": "last_word", "layers": LAYERS, "mode": "dense"}
    tracer = ft.wrap(model, tiny_tokenizer(), edges="influence", **options, preset="paper")
    trace = tracer.trace_tokens(prompt, said)
    eager = tiny_llama(vocab_size=len(tiny_tokenizer()))
    eager.set_attn_implementation("eager")
    reader = tracer.reader
    calls = reader.read_in_place(
        ids, torch.ones_like(ids, dtype=torch.bool), LAYERS, keep=True
    ).calls
    maps = eager(input_ids=ids, output_attentions=True).attentions
    end = int(trace.spans.answer.nonzero()[0][-1]) + 1
    before = decided_tokens(ids) & (torch.arange(ids.shape[1]) < end)
    gradients = gradients_by_hand(model, ids, before)
    tokens, total = ids.shape[1], np.zeros((ids.shape[1],) * 2)
    for layer, call, gradient in zip(LAYERS, calls, gradients, strict=True):
        heads = maps[layer].shape[1]
        moved = gradient.reshape(1, tokens, heads, -1)[0].norm(dim=-1)
        for head in range(heads):
            value = call.value[0, head * call.value.shape[1] // heads].norm(dim=-1)
            for row in range(tokens):
                for key in range(row + 1):
                    total[row, key] += (
                        maps[layer][0, head, row, key] * moved[row, head] * value[key]
                    ).item()
    for row in range(tokens):
        if total[row].sum() > 0:
            total[row] /= total[row].sum()
    np.testing.assert_allclose(trace.attention, total, atol=1e-5)


@given(st.integers(0, 6), st.integers(2, 3), st.sampled_from([None, 1, 2]), st.integers(1, 3))
@settings(max_examples=8)
def test_padding_and_batching_change_nothing(padding, batch, size, shorter):
    model, ids = tiny_model("qwen3"), texts(batch)
    reader = AttentionReader(model)
    left = torch.cat([torch.zeros(batch, padding, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(batch, padding), torch.ones_like(ids)], 1).bool()
    mask[0, : padding + shorter] = False  # one text is shorter than the others
    said = torch.cat([torch.zeros(batch, padding), decided_tokens(ids)], 1).bool()
    found = reader.influences(left.where(mask, 0), mask, said, LAYERS, batch_size=size)
    for text, seen in enumerate(mask):
        parts = [part[text : text + 1, seen] for part in (left, mask, said)]
        for one, other in zip(reader.influences(*parts, LAYERS), found, strict=True):
            assert_close(other[text : text + 1][..., seen], one, rtol=1e-4, atol=1e-6)
            assert not other[text][..., ~seen].any()


@pytest.mark.parametrize("backend", ["nnsight", "interface"])
def test_streamed_traces_are_equal_to_dense_ones(backend):
    model = tiny_llama(vocab_size=len(tiny_tokenizer())), tiny_tokenizer()
    ids, passes = texts(1)[0].tolist(), []
    options = {"preset": "derivation", "first_token": "drop", "answer": "last_word"}
    tracers = [
        ft.wrap(*model, mode=mode, block=5, backend=backend, **options)
        for mode in ("dense", "streamed")
    ]
    for tracer in tracers:  # the first trace also checks the model
        tracer.trace_tokens(ids[:START], ids[START:])
    model[0].model.layers[0].register_forward_pre_hook(lambda *_: passes.append(len(passes)))
    dense, streamed = (tracer.trace_tokens(ids[:START], ids[START:]) for tracer in tracers)
    assert len(passes) == 2  # queries and keys are those of the pass whose gradients are taken
    np.testing.assert_allclose(streamed.throughput, dense.throughput, atol=1e-5)
    np.testing.assert_allclose(streamed.reach, dense.reach, atol=1e-5)


def test_log_odds_of_a_certain_token_are_not_rounded():
    logits = torch.tensor([[100.0, 0.0, 0.0], [0.0, 1.0, 2.0]])
    found = log_odds(logits, torch.tensor([0, 2]))
    assert found[0].item() == pytest.approx(100 - np.log(2), rel=1e-6)
    chance = np.exp(2) / (1 + np.e + np.exp(2))
    assert found[1].item() == pytest.approx(np.log(chance / (1 - chance)), rel=1e-5)


def test_a_model_without_gradients_is_refused():
    with torch.inference_mode():
        model = tiny_llama(vocab_size=len(tiny_tokenizer()))
    tracer = ft.wrap(model, tiny_tokenizer(), preset="derivation", answer="last_word")
    ids = texts(1)[0].tolist()
    with pytest.raises(
        UnsupportedArchitectureError, match=r"use edges='value' \(preset='decided'\)"
    ):
        tracer.trace_tokens(ids[:START], ids[START:])


def in_parts(model, folder):
    outside = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu")
    places = {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu", **outside}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


def quantised(model, part):
    """The linear maps with this in their name in int8; their kernel has no gradient."""
    maps = {name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it names its successor, which needs a package more
        chosen = {name for name in maps if part in name}
        return torch.ao.quantization.quantize_dynamic(model, chosen, dtype=torch.qint8)


OFFLOADED = {
    "to memory": lambda model, _: accelerate.cpu_offload(model, torch.device("cpu")),
    "to disk": lambda model, folder: accelerate.disk_offload(model, folder, torch.device("cpu")),
    "in parts": in_parts,
}
QUANTISED = {
    "everywhere": "",
    "behind all attention": "lm_head",
    "in attention": "v_proj",
    "beside attention": "mlp",
}


def check_refused(model, preset, why):
    """The preset is refused with a sentence, and what this advises works."""
    ids = texts(1)[0].tolist()
    tracer = ft.wrap(model, tiny_tokenizer(), preset=preset, answer="last_word")
    advice = (
        rf"^edges='{tracer.options.edges}' needs .*{why}.*; use edges='value' \(preset='decided'"
    )
    with pytest.raises(UnsupportedArchitectureError, match=advice):
        tracer.trace_tokens(ids[:START], ids[START:])
    advised = ft.wrap(model, tiny_tokenizer(), preset="decided", answer="last_word")
    assert advised.trace_tokens(ids[:START], ids[START:]).throughput.any()
    with pytest.warns(UserWarning, match=f"traced by preset='paper', since .*{why}"):
        assert ft.wrap(model, tiny_tokenizer()).options.edges == "attention"


@pytest.mark.filterwarnings("ignore:.*offloaded")
@pytest.mark.parametrize("where", OFFLOADED)
def test_an_offloaded_model_is_refused(where, tmp_path):
    model = OFFLOADED[where](tiny_llama(num_hidden_layers=2), tmp_path)
    check_refused(model, "derivation", "a sharded or offloaded model cannot make")


@pytest.mark.filterwarnings("error:.*an autograd kernel was not registered")
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("where", QUANTISED)
def test_a_model_that_is_quantised_without_gradients_is_refused(where):
    model = quantised(tiny_llama(num_hidden_layers=2), QUANTISED[where])
    check_refused(model, "derivation", "quantized without gradients")
    if where == "behind all attention":
        check_refused(model, "causal", "quantized without gradients")


def test_a_graph_that_another_pass_has_made_is_not_used_if_it_lacks_a_gradient():
    model, ids = quantised(tiny_llama(num_hidden_layers=2), "mlp"), texts(2)
    mask = torch.ones_like(ids, dtype=torch.bool)
    outputs = AttentionReader(model).outputs([0, 1])
    with outputs.listening():
        logits = model(input_ids=ids).logits[:, :-1]
    chances = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert outputs.influences(chances, mask, mask) is None
