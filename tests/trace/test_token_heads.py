"""What each head pays into a token, against the edges of the trace and a definition by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import flowtracer_plugin as ft
from flowtracer_plugin.result.token_heads import TokenHeads
from tests.tiny import PROMPT, RESPONSE, tiny_llama, tiny_tokenizer

LAYERS, HEADS = 6, 4


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def traced(model, **options):
    tracer = ft.wrap(model, tiny_tokenizer(), **options)
    return tracer, tracer.trace(PROMPT, RESPONSE)


def attention_by_hand(model, ids):
    """The attention of every layer and head, and its values at each key: eager, in float64."""
    values = []
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda *call: values.append(call[2][0]))
        for layer in model.model.layers
    ]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(torch.tensor(ids)[None], output_attentions=True).attentions
    model.set_attn_implementation(before)
    for hook in hooks:
        hook.remove()
    return np.stack([one[0].double().numpy() for one in maps]), values


def influence_by_hand(model, ids, prompt_length, end):
    """`‖∂ Σ λ / ∂ o‖` by layer, head and row, of the response tokens before `end`."""
    outputs = []

    def keep(_, given):
        given[0].retain_grad()
        outputs.append(given[0])

    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(keep) for layer in model.model.layers]
    chances = model(torch.tensor(ids)[None]).logits[0, :-1].double().log_softmax(-1)
    said = chances.gather(-1, torch.tensor(ids[1:])[:, None])[prompt_length - 1 : end - 1, 0]
    (said - torch.log1p(-said.exp())).sum().backward()
    model.zero_grad()
    for hook in hooks:
        hook.remove()
    return [
        one.grad[0].unflatten(-1, (HEADS, -1)).double().norm(dim=-1).T.numpy() for one in outputs
    ]


@pytest.mark.parametrize(
    ("preset", "first_token"), [("derivation", "keep"), ("derivation", "drop"), ("sharp", "keep")]
)
def test_the_heads_pay_the_edges_of_the_trace(model, preset, first_token):
    tracer, trace = traced(model, preset=preset, first_token=first_token)
    for token in (14, len(trace.tokens) - 3):
        found = tracer.heads(trace, token)
        np.testing.assert_allclose(
            found.edges.sum((0, 1)), trace.attention[token, :token], rtol=1e-4, atol=1e-7
        )
        np.testing.assert_allclose(
            found.flow.sum((0, 1)), trace.flow.edge_flow()[token, :token], rtol=1e-4, atol=1e-7
        )
    assert found.layers == trace.layers
    paying = {
        (layer, head)
        for row, layer in enumerate(found.layers)
        for head in np.flatnonzero(found.edges[row].any(-1)).tolist()
    }
    everyone = {(layer, head) for layer in trace.layers for head in range(HEADS)}
    assert paying == (set(trace.heads) or everyone)


def test_each_head_pays_its_attention_over_the_number_of_heads(model):
    tracer, trace = traced(model, preset="paper")
    maps, _ = attention_by_hand(model, trace.token_ids.tolist())
    found = tracer.heads(trace, 20)
    wanted = maps[list(trace.layers), :, 20, :20] / (len(trace.layers) * HEADS)
    np.testing.assert_allclose(found.edges, wanted, rtol=1e-4, atol=1e-8)


def test_each_head_pays_its_attention_by_values_and_influence(model):
    tracer, trace = traced(model, preset="derivation")
    ids, length = trace.token_ids.tolist(), trace.spans.prompt_length
    maps, values = attention_by_hand(model, ids)
    end = int(trace.spans.answer.nonzero()[0][-1]) + 1
    sizes = influence_by_hand(model, ids, length, end)
    row, wanted = 19, np.zeros((LAYERS, HEADS, 20))
    for layer, head in np.ndindex(LAYERS, HEADS):
        groups = values[layer].unflatten(-1, (model.config.num_key_value_heads, -1))
        lengths = groups[:, head * groups.shape[1] // HEADS].double().norm(dim=-1).numpy()
        wanted[layer, head] = maps[layer, head, row, :20] * lengths[:20] * sizes[layer][head, row]
    wanted *= 0.5 / wanted.sum()  # the rows of these maps sum to 1, and damping halves them
    np.testing.assert_allclose(tracer.heads(trace, 20).edges, wanted, rtol=1e-3, atol=1e-7)


def test_a_streamed_trace_has_the_same_heads(model):
    tracer, trace = traced(model, mode="dense")
    other, streamed = traced(model, mode="streamed")
    found, wanted = other.heads(streamed, 20), tracer.heads(trace, 20)
    np.testing.assert_allclose(found.flow, wanted.flow, rtol=1e-4, atol=1e-8)


def test_the_strongest_heads_come_first():
    flow = np.zeros((2, 3, 4))
    flow[0, 2] = [0.1, 0, 0.2, 0]
    flow[1, 0] = [0, 0.1, 0, 0]
    found = TokenHeads(token=4, layers=(5, 7), edges=flow, flow=flow)
    assert found.shares.sum() == pytest.approx(1)
    said = [(one.layer, one.head, one.source, round(one.share, 6)) for one in found.strongest()]
    assert said == [(5, 2, 2, 0.75), (7, 0, 1, 0.25)]
    assert found.strongest(1)[0].source_share == pytest.approx(2 / 3)
    nothing = replace(found, flow=0 * flow)
    assert (nothing.shares.sum(), nothing.strongest()) == (0, ())
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        found.strongest(0)


def test_what_no_head_pays_is_refused(model):
    tracer, trace = traced(model)
    with pytest.raises(ValueError, match=r"from 12 to 27, since the prompt was given, found 5"):
        tracer.heads(trace, 5)
    with pytest.raises(ValueError, match="found 28"):
        tracer.heads(trace, 28)
    paper, plain = traced(model, preset="paper")
    with pytest.raises(ValueError, match="from 1 to 27, found 0"):
        paper.heads(plain, 0)
    causal = replace(trace, options=replace(plain.options, edges="causal"))
    with pytest.raises(ValueError, match="no single head has a part of them"):
        tracer.heads(causal, 20)


def test_a_trace_of_another_model_is_noticed(model):
    tracer, trace = traced(model)
    edges = trace.attention.copy()
    edges[20, :20] = edges[20, :20][::-1]
    other = replace(trace, attention=edges)
    with pytest.raises(ValueError, match="another model, or other weights, made it"):
        tracer.heads(other, 20)
    assert tracer.heads(other, 21).token == 21
