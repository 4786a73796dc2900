"""Edges of some heads, weighed by what these move: the `sharp` preset."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

import flowtracer_plugin as ft
from flowtracer_plugin.attention import UnsupportedArchitectureError
from flowtracer_plugin.attention.head_choice import most_attentive, named_heads
from flowtracer_plugin.options import PRESETS, FlowOptions, flow_options
from flowtracer_plugin.reading.edges import EdgeChoice, reasoning_mask
from flowtracer_plugin.reading.reader import AttentionReader
from flowtracer_plugin.text.spans import target_mask
from tests.attention.reference_attention import eager_attentions
from tests.families import FAMILIES, tiny_model
from tests.flow import reference
from tests.reading.reference_edges import edges_by_hand, lengths_by_hand
from tests.tiny import tiny_llama, tiny_tokenizer

LAYERS = (2, 3)
OTHERS = ("gpt2", "gpt_oss", "mistral")
PROJECTIONS = ("o_proj", "c_proj", "dense")


def projection_by_name(model, site):
    module = model.get_submodule(site.module)
    return next(getattr(module, name) for name in PROJECTIONS if hasattr(module, name))


def with_tokenizer(family, **overrides):
    """A model of this family, and a tokenizer whose tokens it embeds."""
    tokenizer = tiny_tokenizer()
    return tiny_model(family, vocab_size=len(tokenizer), **overrides), tokenizer


def texts(batch=2, tokens=21, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (batch, tokens), generator=drawn)


def parts(tokens=21, prompt=6, answer=(18, 20)):
    place = np.arange(tokens)
    said = (place >= answer[0]) & (place < answer[1])
    return target_mask(said, "decision"), (place >= prompt) & (place < answer[0] - 5)


def read_by_hand(family, ids, mask, share, *, by_value=True):
    """The edges of each text, by transformers' own eager attention."""
    model = tiny_model(family, attn_implementation="eager")
    reader = AttentionReader(model)
    reported = [eager_attentions(model, ids, mask)[layer].double().numpy() for layer in LAYERS]
    calls = reader.read_in_place(ids, mask, LAYERS, keep=True).calls
    sites = [site for site in reader.sites if site.layer in LAYERS]
    lengths = [
        lengths_by_hand(projection_by_name(model, site), call.value, call.query.shape[1])
        for site, call in zip(sites, calls, strict=True)
    ]
    target, reasoning = parts(ids.shape[1])
    return [
        edges_by_hand(
            [layer[text] for layer in reported],
            [layer[text] for layer in lengths] if by_value else None,
            target,
            reasoning & mask[text].numpy(),
            share,
        )
        for text in range(len(ids))
    ]


def choice(batch, heads, *, by_value=True, tokens=21):
    target, reasoning = (torch.tensor(part).expand(batch, -1) for part in parts(tokens))
    edges, response = "value" if by_value else "attention", torch.ones_like(target)
    return EdgeChoice(
        heads=heads, edges=edges, target=target, reasoning=reasoning, decided=response
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_edges_are_those_of_the_slow_definition(family):
    ids = texts()
    mask = torch.ones_like(ids, dtype=torch.bool)
    model = tiny_model(family)
    found, rows = AttentionReader(model).read_edges(ids, mask, LAYERS, choice(2, 0.3))
    for text, (wanted, heads) in enumerate(read_by_hand(family, ids, mask, 0.3)):
        assert_close(found[text].double().numpy(), wanted, atol=2e-6, rtol=1e-4)
        chosen = [h.tolist() for h in rows.heads[text]]
        assert [(layer, h) for layer, part in enumerate(chosen) for h in part] == list(heads)


@pytest.mark.parametrize("by_value", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_shares_of_heads(share, by_value):
    ids = texts(1, seed=3)
    mask = torch.ones_like(ids, dtype=torch.bool)
    reader = AttentionReader(tiny_model("qwen3"))
    found, _ = reader.read_edges(ids, mask, LAYERS, choice(1, share, by_value=by_value))
    ((wanted, _),) = read_by_hand("qwen3", ids, mask, share, by_value=by_value)
    assert_close(found[0].double().numpy(), wanted, atol=2e-6, rtol=1e-4)


def test_weighed_edges_of_all_heads_are_added_up_call_by_call():
    ids = texts()
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :4] = False
    for family in ("llama", "gpt_oss", "gemma2", "phi3"):
        reader = AttentionReader(tiny_model(family), block=8, backend="interface")
        found = reader.read(ids, mask, LAYERS, choice=choice(2, "all"))
        for text, (wanted, _) in enumerate(read_by_hand(family, ids, mask, 1.0)):
            wanted = wanted * mask[text, :, None].numpy() * mask[text].numpy()
            assert_close(found[text].double().numpy(), wanted, atol=2e-6, rtol=1e-4)
        reading = reader.read_in_place(ids, mask, LAYERS, edges="value")
        assert reading.calls == reading.lengths == ()
        # The same numbers as from calls that are kept.
        rows, _ = reader.read_rows(ids[:1], mask[:1], LAYERS, choice=choice(1, "all"))
        assert_close(found[:1], rows.whole(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2"])
def test_rows_keep_their_sums(family):
    ids = texts()
    mask = torch.ones_like(ids, dtype=torch.bool)
    reader = AttentionReader(tiny_model(family))
    heads = tuple((layer, head) for layer in LAYERS for head in (0, 3))
    sums = [
        reader.read_edges(ids, mask, LAYERS, choice(2, heads, by_value=by_value))[0].sum(-1)
        for by_value in (True, False)
    ]
    assert_close(*sums)


def test_all_heads_by_attention_are_the_plain_mean():
    ids = texts()
    mask = torch.ones_like(ids, dtype=torch.bool)
    reader = AttentionReader(tiny_model("llama"))
    found, rows = reader.read_edges(ids, mask, LAYERS, choice(2, "all", by_value=False))
    assert rows.heads is None
    assert_close(found, reader.read(ids, mask, LAYERS))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
def test_named_heads_are_averaged_over_all_layers_together(family):
    ids = texts()
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, -5:] = False
    model = tiny_model(family, attn_implementation="eager")
    pairs = ((2, 1), (3, 0), (3, 2))
    found, _ = AttentionReader(model).read_edges(
        ids, mask, LAYERS, choice(2, pairs, by_value=False)
    )
    maps = eager_attentions(model, ids, mask)
    wanted = torch.stack([maps[layer][:, head] for layer, head in pairs]).mean(0)
    assert_close(found, wanted * mask[:, :, None] * mask[:, None, :])


# Modes, padding and batches


@pytest.mark.parametrize(
    ("family", "preset"),
    [
        # "causal" cannot be streamed.
        *(("llama", preset) for preset in sorted(PRESETS) if preset != "causal"),
        *((f, "sharp") for f in OTHERS),
    ],
)
def test_streamed_traces_equal_dense_ones(family, preset):
    model, tokenizer = with_tokenizer(family)
    traces = [
        ft.wrap(model, tokenizer, preset=preset, mode=mode, block=7).trace(
            "one two three four\n", "five six seven eight. The answer is 9"
        )
        for mode in ("dense", "streamed")
    ]
    dense, streamed = traces
    assert_close(streamed.throughput, dense.throughput, atol=1e-6, rtol=1e-4)
    assert_close(streamed.reach, dense.reach, atol=1e-6, rtol=1e-4)
    assert dense.heads == streamed.heads
    assert bool(dense.heads) == (preset == "sharp")


@pytest.mark.parametrize("mode", ["dense", "streamed"])
@pytest.mark.parametrize("backend", ["nnsight", "interface"])
def test_rollouts_of_a_batch_are_traced_as_alone(mode, backend):
    model, tokenizer = with_tokenizer("llama")
    tracer = ft.wrap(model, tokenizer, preset="sharp", mode=mode, backend=backend)
    prompts = ["one two three four five\n", "six seven\n"]
    responses = ["eight nine. The answer is 7", "two two three four six. The answer is 12"]
    alone = [tracer.trace(*pair) for pair in zip(prompts, responses, strict=True)]
    width = max(len(t.token_ids) for t in alone)
    ids, mask = torch.zeros(2, 2 * width, dtype=torch.long), torch.zeros(2, 2 * width).bool()
    for row, trace in enumerate(alone):
        start, size = width - trace.spans.prompt_length, len(trace.token_ids)
        ids[row, start : start + size] = torch.tensor(trace.token_ids)
        mask[row, start : start + size] = True
    found = tracer.trace_ids(ids[:, :width], ids[:, width:], mask[:, :width], mask[:, width:])
    for row, trace in enumerate(alone):
        assert_close(
            found.throughput[row, mask[row]].numpy(), trace.throughput, atol=1e-5, rtol=1e-4
        )
        assert found.throughput[row, ~mask[row]].abs().max() == 0


def test_a_trace_is_the_flow_along_its_edges():
    trace = ft.wrap(*with_tokenizer("qwen2"), preset="sharp").trace(
        "one two three\n", "four. The answer is 5"
    )
    spans = trace.spans
    assert np.array_equal(spans.target, target_mask(spans.answer, "decision"))
    wanted = reference.flow(trace.attention, spans.question, spans.target, "reach")
    assert_close(trace.throughput.astype(float), wanted["throughput"], atol=1e-5, rtol=1e-3)


def test_chosen_heads_are_kept_in_files_and_documents(tmp_path):
    tracer = ft.wrap(*with_tokenizer("llama"), preset="sharp")
    trace = tracer.trace("one two three\n", "four. The answer is 5")
    again = ft.load(trace.save(tmp_path / "a.flow"))
    assert again.heads == trace.heads
    assert len(trace.heads) == 3  # 30 % of 2 layers with 4 heads, rounded up
    assert again.options == trace.options == flow_options("sharp", question="prompt")
    assert trace.to_dict()["heads"] == [list(pair) for pair in trace.heads]


def test_tokens_where_flow_ends_are_no_hubs_or_checkpoints():
    tracer = ft.wrap(*with_tokenizer("llama"), preset="sharp")
    trace = tracer.trace("one two three\n", "four. The answer is 5")
    ends = set(np.flatnonzero(trace.spans.target).tolist())
    for ranked in (trace.hubs(50), trace.checkpoints(50)):
        assert ranked
        assert not ends & {token.index for token in ranked}


# Lengths of values


def adapted(model):
    config = LoraConfig(r=4, target_modules=["o_proj"], lora_dropout=0.5, init_lora_weights=False)
    return get_peft_model(model, config).train()


def test_adapters_of_the_projection_count():
    plain = tiny_llama()
    model = adapted(deepcopy(plain))
    ids = torch.arange(3, 14)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    lengths = []
    for one in (plain, model):
        reader = AttentionReader(one)
        before = torch.get_rng_state()
        found = reader.read_in_place(ids, mask, (1,), keep=True, edges="value")
        assert torch.equal(torch.get_rng_state(), before)
        site = next(site for site in reader.sites if site.layer == 1)
        module = reader.model.get_submodule(site.module).o_proj
        wanted = lengths_by_hand(deepcopy(module).eval(), found.calls[0].value, 4)
        assert_close(found.lengths[0].double().numpy(), wanted, atol=1e-5, rtol=1e-4)
        lengths.append(found.lengths[0])
    assert (lengths[0] - lengths[1]).abs().max() > 0.1
    assert model.training


def test_a_gate_after_attention_is_refused_by_value_and_read_by_attention():
    model = tiny_llama()
    for layer in model.model.layers:
        inner = layer.self_attn.o_proj
        layer.self_attn.o_proj = nn.Sequential(nn.Softsign(), inner)
    with pytest.raises(UnsupportedArchitectureError, match="takes the unchanged attention output"):
        ft.wrap(model, tiny_tokenizer(), preset="sharp").trace("one two\n", "The answer is 5")
    trace = ft.wrap(model, tiny_tokenizer(), preset="sharp", edges="attention").trace(
        "one two\n", "The answer is 5"
    )
    assert trace.heads


# Options and mistakes


def test_presets_set_what_is_left_out():
    assert flow_options() == FlowOptions()
    sharp = flow_options("sharp")
    assert (sharp.target, sharp.question_weights) == ("decision", "reach")
    assert (sharp.heads, sharp.edges) == (0.3, "value")
    assert flow_options("sharp", heads="all").heads == "all"
    assert ft.wrap(tiny_llama(), preset="decision").options.target == "decision"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"preset": "blunt"},
            r"preset must be one of paper, .*, decided, derivation, causal, got 'blunt'",
        ),
        ({"heads": 0.0}, r"heads must be 'all', a share"),
        ({"heads": 1.5}, r"heads must be 'all', a share"),
        ({"heads": "most"}, r"heads must be 'all', a share"),
        ({"heads": ()}, r"heads must be 'all', a share"),
        (
            {"edges": "gradient"},
            r"edges must be one of \('attention', 'value', 'influence', 'causal'\)",
        ),
    ],
)
def test_wrong_options_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        ft.wrap(tiny_llama(), **{"preset": "paper", **wrong})


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([(0, 1)], r"heads names \(0, 1\), but layer 0 is not among the layers .*\[1, 2\]"),
        ([(1, 9)], r"heads names \(1, 9\), but layer 1 has the heads 0 to 3"),
    ],
)
def test_heads_that_the_layers_do_not_have_are_refused(pairs, said):
    tracer = ft.wrap(tiny_llama(), tiny_tokenizer(), heads=pairs, layers=[1, 2], preset="paper")
    with pytest.raises(ValueError, match=said):
        tracer.trace("one two\n", "The answer is 5")


def test_a_text_in_which_no_head_looks_at_the_reasoning_keeps_all():
    paid = [torch.tensor([[0.0, 0.0], [0.1, 0.3]]), torch.tensor([[0.0, 0.0], [0.3, 0.0]])]
    chosen = most_attentive(paid, 0.5)
    assert [heads.tolist() for heads in chosen[0]] == [[0, 1], [0, 1]]
    assert [heads.tolist() for heads in chosen[1]] == [[1], [0]]  # of equal ones the earlier


def test_named_heads_are_those_of_every_text():
    named = named_heads([(3, 1), (2, 0)], [2, 3], [4, 4], texts=2)
    assert named[0] is named[1]
    assert [heads.tolist() for heads in named[0]] == [[0], [1]]


def test_reasoning_ends_five_tokens_before_the_answer():
    response = torch.tensor([[False] * 2 + [True] * 10] * 2)
    answer = torch.zeros_like(response)
    answer[0, 9:11] = True
    assert reasoning_mask(response, answer)[0].nonzero()[:, 0].tolist() == [2, 3]
    assert not reasoning_mask(response, answer)[1].any()


def test_tensor_parallel_models_have_no_process_with_all_heads(monkeypatch):
    monkeypatch.setattr(
        "flowtracer_plugin.reading.reader.tensor_parallel_group", lambda model: object()
    )
    tracer = ft.wrap(*with_tokenizer("llama"), preset="sharp")
    with pytest.raises(UnsupportedArchitectureError, match="use heads='all' and edges='attention'"):
        tracer.trace("one two\n", "The answer is 5")
