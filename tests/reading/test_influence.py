"""Edges weighed by the influence of heads and rows on what was sampled."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import flowtracer_plugin as ft
from flowtracer_plugin.attention import UnsupportedArchitectureError
from flowtracer_plugin.reading.influence import log_odds
from flowtracer_plugin.reading.reader import AttentionReader
from tests.families import FAMILIES, tiny_model
from tests.reading.test_edges import LAYERS, projection_by_name, texts
from tests.tiny import tiny_llama, tiny_tokenizer

START = 6


def decided_tokens(ids, mask=None):
    said = torch.arange(ids.shape[1]).expand_as(ids) >= START
    return said if mask is None else said & mask


def sum_of_log_odds(model, ids, said):
    """By the probabilities themselves, in float64."""
    chances = model(input_ids=ids).logits.double().softmax(-1)
    total = 0.0
    for text, token in said.nonzero().tolist():
        chance = chances[text, token - 1, ids[text, token]]
        total = total + chance.log() - (1 - chance).log()
    return total


def lengths_by_hand(model, reader, ids, said):
    """The gradient by differences: each coordinate of a head's output is moved on its own."""
    found = []
    for site in reader.sites:
        if site.layer not in LAYERS:
            continue
        projection = projection_by_name(model, site)
        width = projection.weight.shape[1 if isinstance(projection, torch.nn.Linear) else 0]
        moved = torch.zeros(*ids.shape, width, dtype=model.dtype, requires_grad=True)
        hook = projection.register_forward_pre_hook(
            lambda _module, args, moved=moved: (args[0] + moved,)
        )
        (gradient,) = torch.autograd.grad(sum_of_log_odds(model, ids, said), moved)
        hook.remove()
        found.append(gradient)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_influence_is_the_gradient_of_the_log_odds(family):
    model, ids = tiny_model(family), texts()
    if family not in ("qwen3_moe", "gpt_oss"):  # whose experts multiply no doubles
        model = model.double()
    reader = AttentionReader(model)
    said = decided_tokens(ids)
    found = reader.influences(ids, torch.ones_like(said), said, LAYERS)
    wanted = lengths_by_hand(model, reader, ids, said)
    for sizes, gradient in zip(found, wanted, strict=True):
        heads = gradient.reshape(*ids.shape, sizes.shape[1], -1).norm(dim=-1)
        assert_close(sizes, heads.transpose(1, 2).float(), rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_edges_are_those_of_the_slow_definition():
    model, ids = tiny_llama(vocab_size=len(tiny_tokenizer())), texts(1)
    prompt, said = ids[0, :START].tolist(), ids[0, START:].tolist()
    options = {"answer": "last_word", "layers": LAYERS, "mode": "dense"}
    tracer = ft.wrap(model, tiny_tokenizer(), edges="influence", **options)
    trace = tracer.trace_tokens(prompt, said)
    eager = tiny_llama(vocab_size=len(tiny_tokenizer()))
    eager.set_attn_implementation("eager")
    reader = tracer.reader
    calls = reader.read_in_place(
        ids, torch.ones_like(ids, dtype=torch.bool), LAYERS, keep=True
    ).calls
    maps = eager(input_ids=ids, output_attentions=True).attentions
    gradients = lengths_by_hand(model, reader, ids, decided_tokens(ids))
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


def test_padding_and_batching_change_nothing():
    model, ids = tiny_model("qwen3"), texts(2)
    reader = AttentionReader(model)
    said, every = decided_tokens(ids), torch.ones_like(ids, dtype=torch.bool)
    alone = reader.influences(ids[:1], every[:1], said[:1], LAYERS)
    left = torch.cat([torch.zeros(2, 4, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(2, 4, dtype=torch.bool), every], 1)
    shifted = torch.cat([torch.zeros(2, 4, dtype=torch.bool), said], 1)
    for size in (None, 1):
        found = reader.influences(left, mask, shifted, LAYERS, batch_size=size)
        for one, other in zip(alone, found, strict=True):
            assert_close(other[:1, :, 4:], one, rtol=1e-4, atol=1e-6)
            assert not other[..., :4].any()


@pytest.mark.parametrize("first_token", ["keep", "drop"])
def test_streamed_traces_are_equal_to_dense_ones(first_token):
    model = tiny_llama(vocab_size=len(tiny_tokenizer())), tiny_tokenizer()
    ids = texts(1)[0].tolist()
    options = {"preset": "derivation", "first_token": first_token, "answer": "last_word"}
    dense, streamed = (
        ft.wrap(*model, mode=mode, block=5, **options).trace_tokens(ids[:START], ids[START:])
        for mode in ("dense", "streamed")
    )
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
