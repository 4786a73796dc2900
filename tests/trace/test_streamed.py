"""Streamed traces equal dense ones to rounding, for every model, block and dtype."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from rich.console import Console
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import flowtracer_plugin as ft
from flowtracer_plugin.attention import (
    AttentionCall,
    AttentionSite,
    AttentionWeights,
    UnsupportedArchitectureError,
)
from flowtracer_plugin.attention.head_mean import add_head_mean
from flowtracer_plugin.flow.backbone import Outline
from flowtracer_plugin.flow.streamed import stream_batch, stream_flow
from flowtracer_plugin.flow.substitution import kept_between
from flowtracer_plugin.reading.rows import AttentionRows, KeptCalls, check_causal
from flowtracer_plugin.trace import memory, solver
from tests.attention.test_head_mean import calls
from tests.device.gpu import on_gpu
from tests.families import FAMILIES, tiny_model
from tests.flow import reference
from tests.flow.strategies import batches, problems
from tests.tiny import PROMPT, RESPONSE, tiny_llama, tiny_tokenizer

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
OPTIONS = [
    {},
    {"question_weights": "reach", "boundary": "absorbing"},
    {"first_token": "drop", "target": "decision", "question_weights": "origins"},
]


def lower(call):
    """The call, allowed to look at earlier tokens and itself only."""
    queries = call.query.shape[2]
    key = call.key[:, :, :queries]
    seen = torch.ones(queries, queries).tril().bool()
    mask, bias = call.mask, call.bias
    if bias is not None:
        bias = bias[..., :queries]
    if mask is None:
        mask = None if call.causal else seen[None, None]
    elif mask.dtype == torch.bool:
        mask = mask[..., :queries] & seen
    else:
        mask = mask[..., :queries].masked_fill(~seen, -torch.inf)
    return replace(call, key=key, mask=mask, bias=bias)


@pytest.fixture(scope="module")
def nobody():
    """A model whose calls are not read: it only shows that it is not spread over processes."""
    return tiny_llama()


@settings(deadline=None, max_examples=150)
@given(calls().map(lower), st.integers(1, 10), st.integers(1, 4), st.data())
def test_rows_are_those_of_the_whole_map(nobody, call, rows, block, data):
    batch, _, tokens, _ = call.query.shape
    whole = torch.zeros(batch, tokens, tokens)
    for one in (call, call):
        add_head_mean(one, whole, weight=0.5)
    visible = torch.tensor(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    whole = whole.masked_fill(~visible[:, None], 0).masked_fill(~visible, 0)
    part = AttentionRows(nobody, [call, call], visible.expand(batch, tokens), block=block)
    for start in range(0, tokens, rows):
        stop = min(start + rows, tokens)
        found = part(start, stop)
        assert found.shape == (batch, stop - start, stop)
        np.testing.assert_allclose(found, whole[:, start:stop, :stop], **CLOSE)


@settings(deadline=None, max_examples=60)
@given(problems(max_tokens=12), st.integers(1, 5), st.sampled_from(OPTIONS[:2]))
def test_each_block_is_asked_for_twice_and_none_after_the_answer(problem, block, options):
    attention, question, target = map(torch.from_numpy, problem.parts)
    asked = []

    def rows(start, stop):
        asked.append((start, stop))
        return attention[start:stop, :stop]

    length = len(target)
    outline = Outline(prompt_length=1, bounds=[(0, length)])
    nodes, _ = stream_flow(
        rows, question, target, outline, dtype=torch.float64, block=block, **options
    )
    wanted = reference.flow(*problem.parts, *options.values())
    np.testing.assert_allclose(nodes.throughput, wanted["throughput"], rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(nodes.reach, wanted["reach"], rtol=1e-9, atol=1e-15)
    ends = int(target.nonzero().max()) + 1
    once = [(start, min(start + block, ends)) for start in range(0, ends, block)]
    assert asked == once[::-1] + once


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 4000))
def test_rows_that_fit_are_computed_once(length, block, room):
    matrix, asked = torch.rand(1, length, length), []

    def rows(start, stop):
        asked.append((start, stop))
        return matrix[:, start:stop, :stop]

    kept = kept_between(rows, room)
    blocks = [(start, min(start + block, length)) for start in range(0, length, block)]
    for start, stop in blocks[::-1] + blocks:
        assert torch.equal(kept(start, stop), matrix[:, start:stop, :stop])
    # Blocks from the beginning are computed once, as many as fit; all others are computed twice.
    sizes = np.cumsum([4 * (stop - start) * stop for start, stop in blocks])
    once = int((sizes <= room).sum())
    assert [asked.count(one) for one in blocks] == [1] * once + [2] * (len(blocks) - once)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_a_trace_is_the_same_whatever_it_keeps_of_its_rows(monkeypatch, options, share):
    length = len(tiny_tokenizer()(PROMPT * 3 + RESPONSE * 2)["input_ids"])
    asked = []
    whole = AttentionRows.__call__

    def counted(self, start, stop):
        asked.append((start, stop))
        return whole(self, start, stop)

    monkeypatch.setattr(AttentionRows, "__call__", counted)
    monkeypatch.setattr(memory.Footprint, "room", lambda *_: int(share * 4 * length**2))
    monkeypatch.setattr(solver, "stream_flow", partial(stream_flow, block=16))
    dense, streamed = both(tiny_llama(), **options)
    assert_same(dense, streamed)
    often = Counter(asked)
    if share == 1:
        assert set(often.values()) == {1}
    elif share == 0:
        assert set(often.values()) == {2}
    else:
        assert set(often.values()) == {1, 2}


@settings(deadline=None, max_examples=40)
@given(batches(), st.integers(1, 5), st.sampled_from(OPTIONS[:2]), st.data())
def test_a_batch_is_its_rows(drawn, block, options, data):
    attention, question, target = (
        torch.from_numpy(np.stack(part))
        for part in zip(*(problem.parts for problem in drawn[2]), strict=True)
    )
    attention = attention.float()
    border = data.draw(st.integers(1, attention.shape[1]))
    prompt = (torch.arange(attention.shape[1]) < border).expand_as(question)
    target[0] = False  # nothing was answered
    nodes, entered = stream_batch(
        lambda start, stop: attention[:, start:stop, :stop],
        question,
        target,
        prompt,
        block=block,
        **options,
    )
    assert nodes.throughput[0].abs().max() == nodes.reach[0].abs().max() == entered[0].max() == 0
    for row in range(1, len(attention)):
        wanted = reference.flow(
            *(p[row].double() for p in (attention, question, target)), *options.values()
        )
        np.testing.assert_allclose(nodes.throughput[row], wanted["throughput"], **CLOSE)
        np.testing.assert_allclose(entered[row], wanted["edge_flow"][:, :border].sum(1), **CLOSE)


def both(model, **options):
    tokenizer = tiny_tokenizer()
    made = [
        ft.wrap(model, tokenizer, mode=mode, **options, preset="paper")
        for mode in ("dense", "streamed")
    ]
    return [tracer.trace(PROMPT * 3, RESPONSE * 2) for tracer in made]


def assert_same(dense, streamed, **close):
    close = {**CLOSE, **close}
    assert streamed.attention is None
    assert dense.attention is not None
    for name in ("throughput", "reach"):
        np.testing.assert_allclose(getattr(streamed, name), getattr(dense, name), **close)
    ours, theirs = streamed.backbone, dense.backbone
    for name in ("source", "sink", "hubs", "checkpoints", "prompt_inflow", "steps", "bins"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), **close)
    for name in ("sources", "targets"):
        found, wanted = getattr(ours, name), getattr(theirs, name)
        np.testing.assert_allclose(found.flow, wanted.flow, **close)
    found, wanted = ([path.probability for path in one.paths] for one in (ours, theirs))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert streamed.reasoning_share == pytest.approx(dense.reasoning_share, abs=1e-5)
    assert ours.question_reached == theirs.question_reached


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_streams(family, options):
    model = tiny_model(family, vocab_size=len(tiny_tokenizer()), max_position_embeddings=192)
    assert_same(*both(model, block=7, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_streams(dtype):
    assert_same(*both(tiny_llama().to(dtype)))


@pytest.mark.parametrize("backend", ["nnsight", "interface"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_way_of_reading_streams(backend, implementation):
    model = tiny_llama()
    model.set_attn_implementation(implementation)
    assert_same(*both(model, backend=backend, layers="all"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_streams_what_the_host_reads(dtype):
    model = tiny_llama().to(dtype)
    close = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.02}
    wanted = both(model)[0]
    with on_gpu() as place:
        dense, streamed = both(place(model))
        assert_same(dense, streamed, rtol=1e-4, atol=1e-5)  # other shapes round otherwise
    np.testing.assert_allclose(streamed.throughput, wanted.throughput, **close)


@pytest.mark.parametrize("options", OPTIONS)
def test_padded_rollouts_stream(options):
    tokenizer = tiny_tokenizer()
    prompts = [PROMPT, "How many? " * 9, PROMPT, ""]
    said = [RESPONSE, "It is 5.", "no number", RESPONSE]
    encoded = (
        [tokenizer(text)["input_ids"] for text in prompts],
        [tokenizer(text)["input_ids"] for text in said],
    )
    ids, masks = [], []
    for side, texts in zip(("left", "right"), encoded, strict=True):
        longest = max(map(len, texts))
        rows = [([0] * (longest - len(t)), t) for t in texts]
        ids.append(torch.tensor([pad + t if side == "left" else t + pad for pad, t in rows]))
        marks = [([0] * len(pad), [1] * len(t)) for pad, t in rows]
        masks.append(torch.tensor([a + b if side == "left" else b + a for a, b in marks]))
    found = {}
    for mode in ("dense", "streamed"):
        tracer = ft.wrap(tiny_llama(), tokenizer, mode=mode, **options, preset="paper")
        found[mode] = tracer.trace_ids(*ids, *masks, batch_size=3)
    dense, streamed = found["dense"], found["streamed"]
    assert dense.found.tolist() == [True, True, False, False]
    for name in ("throughput", "reach", "reasoning_share", "target", "found", "reasoning"):
        wanted = getattr(dense, name)
        torch.testing.assert_close(getattr(streamed, name), wanted, rtol=1e-5, atol=1e-6)
    assert streamed.answers == dense.answers


def test_a_model_that_returns_probabilities_has_nothing_to_stream():
    model = tiny_llama()
    kept = KeptCalls(model, ft.wrap(model, preset="paper").reader.adapter)
    weights = AttentionWeights(weights=torch.rand(1, 2, 3, 3))
    kept._adapter = type("Adapter", (), {"read": lambda *_: weights})()
    site = AttentionSite(layer=0, module="model.layers.0.self_attn", function="f")
    kept.receive(site, (), {}, None)
    kept.receive(site, (), {}, None)  # the first error is the one that is reported
    with pytest.raises(UnsupportedArchitectureError, match=r"nothing to stream from; wrap.*dense"):
        kept.calls()


@pytest.mark.parametrize(
    ("mask", "causal"),
    [
        (None, False),
        (torch.ones(1, 1, 5, 5).bool(), True),
        (torch.zeros(1, 1, 5, 5), True),
        (torch.ones(1, 1, 5, 5).tril(1).bool(), True),
    ],
)
def test_calls_that_look_ahead_are_refused(nobody, mask, causal):
    call = AttentionCall(
        query=torch.rand(1, 2, 5, 3),
        key=torch.rand(1, 2, 5, 3),
        scaling=1.0,
        mask=mask,
        causal=causal,
    )
    with pytest.raises(UnsupportedArchitectureError, match="looks at later tokens"):
        check_causal([call])


def test_heads_on_other_processes_are_averaged_in_every_block(nobody, monkeypatch):
    call = AttentionCall(query=torch.rand(1, 2, 5, 3), key=torch.rand(1, 2, 5, 3), scaling=1.0)
    rows = AttentionRows(nobody, [call], torch.ones(1, 5).bool(), block=2)
    own = rows(2, 5)
    monkeypatch.setattr(
        "flowtracer_plugin.reading.rows.average_heads", lambda model, total: total.mul_(0.5)
    )
    torch.testing.assert_close(rows(2, 5), own / 2)


def test_only_queries_and_keys_are_kept():
    fused = torch.rand(1, 4, 6, 24)
    query, key, value = fused.split(8, dim=-1)
    call = AttentionCall(query=query, key=key.contiguous(), value=value, scaling=1.0)
    model = tiny_llama()
    kept = KeptCalls(model, ft.wrap(model, preset="paper").reader.adapter)
    kept._adapter = type("Adapter", (), {"read": lambda *_: call})()
    site = AttentionSite(layer=0, module="model.layers.0.self_attn", function="f")
    kept.receive(site, (), {}, None)
    (slim,) = kept.calls()
    assert slim.value is None
    assert torch.equal(slim.query, query)
    assert slim.query.untyped_storage().nbytes() == query.numel() * 4  # not all of the product
    assert slim.key.data_ptr() == call.key.data_ptr()  # not copied


# Uses of a streamed trace


@pytest.fixture(scope="module")
def pair():
    return both(tiny_llama())


def test_a_streamed_trace_is_saved_and_loaded_bit_for_bit(pair, tmp_path):
    trace = pair[1]
    loaded = ft.load(trace.save(tmp_path / "a.flow"))
    assert loaded.attention is None
    assert loaded.to_json() == trace.to_json()
    for name in ("source", "sink", "hubs", "checkpoints", "prompt_inflow", "steps", "bins"):
        found, wanted = getattr(loaded.backbone, name), getattr(trace.backbone, name)
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)
    for name in ("sources", "targets"):
        found, wanted = getattr(loaded.backbone, name), getattr(trace.backbone, name)
        np.testing.assert_array_equal(found.flow, wanted.flow)
        np.testing.assert_array_equal(found.token, wanted.token)
    assert loaded.backbone.paths == trace.backbone.paths


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("hubs", lambda array: array[:-1], "wanted hubs of the shape"),
        ("steps", lambda array: array[1:], "wanted steps of the shape"),
        ("bins", lambda array: array[1:], "wanted bins of the shape"),
        ("sources.token", lambda array: array + 1, "edges are not those of its tokens"),
        ("targets.token", lambda array: array - 99, "edges are not those of its tokens"),
        ("sources.flow", lambda array: array[:, :-1], "wanted sources.flow of the shape"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*no checksum")
def test_a_damaged_backbone_is_refused(pair, tmp_path, name, change, message):
    path = pair[1].save(tmp_path / "a.flow")
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    del metadata["sha256"]  # as in a file of an earlier version
    arrays = load_file(path)
    arrays[name] = np.ascontiguousarray(change(arrays[name]))
    save_file(arrays, path, metadata)
    with pytest.raises(ValueError, match=message):
        ft.load(path)


def test_a_format_that_was_never_released_is_refused(pair, tmp_path):
    path = pair[1].save(tmp_path / "a.flow")
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata | {"version": "2"})
    with pytest.raises(ValueError, match="format version 2 was never released; trace the text"):
        ft.load(path)


def test_its_page_and_document_are_those_of_the_dense_trace(pair, tmp_path):
    dense, streamed = pair
    found, wanted = streamed.to_dict(), dense.to_dict()
    for name in ("text", "answer", "question_reached", "model", "layers", "options"):
        assert found[name] == wanted[name]
    assert [token["index"] for token in found["hubs"]] == [t["index"] for t in wanted["hubs"]]
    page = streamed.to_html(tmp_path / "page.html").read_text("utf-8")
    assert len(page) == pytest.approx(len(dense.to_html(tmp_path / "b.html").read_text()), rel=0.01)
    assert "<iframe" in streamed._repr_html_()
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(streamed)
    assert "much flow that many later tokens draw on" in console.export_text()


def test_its_graph_holds_the_strongest_edges(pair):
    dense, streamed = (trace.to_networkx() for trace in pair)
    flow = pair[0].flow.edge_flow()
    assert 0 < streamed.number_of_edges() < dense.number_of_edges()
    for earlier, later, amount in streamed.edges(data="flow"):
        assert amount == pytest.approx(flow[later, earlier], rel=1e-5)
    assert list(streamed.nodes) == list(dense.nodes)
    strong = pair[1].to_networkx(minimum=0.01)
    assert 0 < strong.number_of_edges() < streamed.number_of_edges()


def test_what_needs_the_matrix_says_so(pair):
    for wish in (lambda: pair[1].flow, lambda: pair[1].paths(11)):
        with pytest.raises(ValueError, match=r"was streamed and does not have .*mode='dense'"):
            wish()
    assert len(pair[1].paths(10)) == 10
    tracer = ft.wrap(tiny_llama(), mode="streamed", preset="paper")
    with pytest.raises(ValueError, match=r"mode='streamed' avoids; wrap.*dense"):
        tracer.attention(torch.tensor([[3, 4]]))


def test_a_long_text_shows_how_far_it_is(capfd):
    tokenizer = tiny_tokenizer()
    tracer = ft.wrap(tiny_llama(), tokenizer, mode="streamed", preset="paper")
    ids = [tokenizer(text)["input_ids"] for text in (PROMPT, RESPONSE)]
    trace = tracer.trace_tokens(*ids, progress=True)
    rows = 2 * (int(np.flatnonzero(trace.spans.target).max()) + 1)
    assert f"streaming: 100%|██████████| {rows}/{rows}" in capfd.readouterr().err
    tracer.trace_tokens(*ids)
    assert not capfd.readouterr().err


def test_paths_are_known_where_reach_is_less_than_the_dtype_holds():
    length = 12
    attention = torch.diag(torch.full((length - 1,), 1e-5), -1)
    ends = torch.arange(length)
    nodes, backbone = stream_flow(
        lambda start, stop: attention[start:stop, :stop],
        ends == 0,
        ends == length - 1,
        Outline(prompt_length=1, bounds=[(0, length)]),
    )
    assert nodes.reach[0] == 0  # 1e-55
    assert nodes.throughput[0] == pytest.approx(1)
    (path,) = backbone.paths
    assert path.tokens == tuple(range(length))
    assert path.probability == pytest.approx(1, rel=1e-4)


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="mode must be one of auto, dense, streamed, got 'lazy'"):
        ft.wrap(tiny_llama(), mode="lazy", preset="paper")
