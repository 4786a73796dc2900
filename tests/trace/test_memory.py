"""Memory: what a trace takes, what is free, and which mode is chosen."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import flowtracer_plugin as ft
from flowtracer_plugin.attention import AttentionCall, UnsupportedArchitectureError
from flowtracer_plugin.trace import memory
from flowtracer_plugin.trace.memory import MemoryEstimate, TooLittleMemoryError, longest, readable
from tests.families import quiet_transformers, tiny_model
from tests.tiny import PROMPT, RESPONSE, tiny_llama, tiny_tokenizer

TOKENS = len(tiny_tokenizer()(PROMPT + RESPONSE)["input_ids"])


@pytest.fixture
def room(monkeypatch):
    """A machine with so much free memory, on which everything counts as large."""

    def with_free(size):
        monkeypatch.setattr(memory, "SMALL", 0)
        monkeypatch.setattr(memory, "free_memory", lambda _: size)

    return with_free


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def wrap(model, **options):
    return ft.wrap(model, tiny_tokenizer(), **{"preset": "paper", **options})


def just_enough(size):
    return int(size / memory.SPARE) + 1


def test_dense_grows_with_the_square_and_streamed_with_the_text(model):
    tracer = wrap(model)
    short, long = tracer.estimate(50_000), tracer.estimate(100_000)
    assert long.dense / short.dense == pytest.approx(4, rel=0.1)
    assert long.streamed / short.streamed == pytest.approx(2, rel=0.1)
    assert short.dense > 50_000**2 * 4
    many = tracer.estimate(1000, batch=8)
    one = tracer.estimate(1000)
    assert many.dense == pytest.approx(8 * one.dense, rel=1e-3)
    assert many.streamed == pytest.approx(8 * one.streamed, rel=1e-2)


def test_estimates_know_the_queries_and_keys_of_the_layers_that_are_read(model):
    two, all_ = wrap(model), wrap(model, layers="all")
    kept = 2 * (4 + 2) * 16 * 4  # layers, heads and key heads, width, bytes
    assert two._solver.budget._footprint().kept == kept
    assert all_._solver.budget._footprint().kept == 3 * kept
    halves = tiny_llama().to(torch.bfloat16)
    assert wrap(halves)._solver.budget._footprint().kept == kept / 2


def test_eager_attention_and_the_dropped_first_token_take_more():
    model = tiny_llama()
    plain = wrap(model).estimate(20_000)
    assert wrap(model, first_token="drop").estimate(20_000).dense > 2 * plain.dense
    shifted = wrap(model, rows="decision").estimate(20_000).dense - plain.dense
    assert 0.7 * 20_000**2 * 4 < shifted <= 20_000**2 * 4
    model.set_attn_implementation("eager")
    eager = wrap(model).estimate(20_000)
    assert eager.streamed > 20_000**2 * 4 * 4  # the forward pass itself makes a map for each head
    windowed = tiny_model("mistral")
    assert wrap(windowed, verify=False).estimate(20_000).streamed > 20_000**2


def test_masks_and_biases_are_counted_as_often_as_they_are_kept():
    shared, own = torch.ones(1, 1, 17, 17).bool(), torch.zeros(1, 2, 17, 17)
    parts = {"query": torch.zeros(1, 2, 17, 4), "key": torch.zeros(1, 2, 17, 4), "scaling": 1.0}
    calls = tuple(
        AttentionCall(**parts, mask=shared, bias=None if bias is None else bias.clone())
        for bias in (None, own, own)
    )
    found = memory.footprint(tiny_llama(), calls, block=64, copies=0)
    assert found.masks == 1 + 2 * 2 * 4  # of [1, 17, 17] booleans, and twice [2, 17, 17] floats
    assert found.streamed(50_000, 1) > found.masks * 50_000**2


def test_a_model_without_queries_and_keys_has_a_dense_estimate_only(room):
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=len(tiny_tokenizer()), hidden_size=32, n_layer=3, n_head=4)
    with quiet_transformers():
        model = BloomForCausalLM(config).eval()
    estimate = wrap(model).estimate(1000)
    assert estimate.streamed is None
    assert "streamed not possible" in str(estimate)
    assert not estimate.fits("streamed")
    room(10**12)
    with pytest.raises(UnsupportedArchitectureError, match=r"nothing to stream from; .*'dense'"):
        wrap(model, mode="streamed").trace(PROMPT, RESPONSE)
    assert wrap(model, mode="dense").trace(PROMPT, RESPONSE).attention is not None


def test_the_width_comes_from_the_heads_if_the_configuration_has_none(model):
    tracer, wanted = wrap(model), wrap(model).estimate(9000)
    config = SimpleNamespace(intermediate_size=96, _attn_implementation="sdpa")
    model.config.get_text_config, kept = lambda: config, model.config.get_text_config
    try:
        assert tracer.estimate(9000).dense == wanted.dense
    finally:
        model.config.get_text_config = kept


def test_dense_is_chosen_where_it_fits_and_streamed_where_only_that_does(model, room):
    wanted = wrap(model).trace(PROMPT, RESPONSE)
    estimate = wrap(model).estimate(TOKENS)
    # On texts as short as these a block is as large as the map, so that streaming takes more.
    assert estimate.streamed > estimate.dense
    room(just_enough(estimate.dense))
    assert wrap(model).trace(PROMPT, RESPONSE).attention is not None
    room(just_enough(estimate.streamed))
    streamed = wrap(model, mode="streamed").trace(PROMPT, RESPONSE)
    assert streamed.attention is None
    np.testing.assert_allclose(streamed.throughput, wanted.throughput, atol=1e-6)

    def made(dense, streamed):
        return MemoryEstimate(tokens=9, batch=1, dense=dense, streamed=streamed, free=100)

    long = made(90, 40)
    assert long.mode == "streamed"
    assert made(50, 40).mode == made(85, 86).mode == made(85, None).mode == "dense"
    assert made(51, 40).mode == made(85, 85).mode == "streamed"
    neither = made(90, 86)
    assert neither.mode is None
    assert [neither.fits(mode) for mode in memory.MODES] == [False] * 3
    assert [long.fits(mode) for mode in memory.MODES] == [True, False, True]


def test_auto_streams_long_texts_for_which_there_is_no_map(room):
    model = tiny_llama(max_position_embeddings=8192)
    tracer = wrap(model)
    text = PROMPT * 300
    tokens = len(tiny_tokenizer()(text + RESPONSE)["input_ids"])
    estimate = tracer.estimate(tokens)
    assert estimate.streamed < estimate.dense
    room(just_enough(estimate.streamed))
    trace = tracer.trace(text, RESPONSE)
    assert trace.attention is None
    room(2 * estimate.dense)
    dense = tracer.trace(text, RESPONSE)
    assert dense.attention is not None
    np.testing.assert_allclose(trace.throughput, dense.throughput, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(trace.reach, dense.reach, rtol=1e-4, atol=1e-7)
    room(just_enough(estimate.streamed) - 1000)
    with pytest.raises(TooLittleMemoryError) as refused:
        tracer.trace(text, RESPONSE)
    assert re.fullmatch(
        rf"tracing {tokens:,} tokens would take \d+ MB dense or \d+ MB streamed beside the model, "
        rf"but at most 85% of the \d+ MB that are free are used; what fits: layers='middle:1' or "
        rf"up to [\d,]+ tokens",
        str(refused.value),
    )
    remedy = re.search(r"layers='(.*?)'", str(refused.value))[1]
    assert wrap(model, layers=remedy).trace(text, RESPONSE).attention is None
    most = int(re.search(r"up to ([\d,]+) tokens", str(refused.value))[1].replace(",", ""))
    assert tracer.estimate(most).mode == "streamed"
    assert tracer.estimate(most + 1).mode is None


def test_what_does_not_fit_is_refused_before_the_model_runs(model, room):
    tracer = wrap(model, mode="dense")
    tracer.reader.verify()
    room(1000)
    model_ran = []
    hook = model.register_forward_pre_hook(lambda *_: model_ran.append(1))
    tracer._solver.budget._footprint()
    model_ran.clear()
    with pytest.raises(MemoryError, match=r"would take \d+ kB dense beside .* up to 1? ?\d* token"):
        tracer.trace(PROMPT, RESPONSE)
    ids = torch.ones(4, 8, dtype=torch.long)
    with pytest.raises(MemoryError, match=r"4 texts of 8 tokens .* what fits: up to \d+ tokens$"):
        tracer.attention(ids)  # which has neither modes nor parts of batches
    with pytest.raises(MemoryError, match=r"tracing 4 texts of 16 tokens would take"):
        tracer.trace_ids(ids, ids, ids, ids)
    hook.remove()
    assert not model_ran


def test_a_smaller_batch_is_a_remedy(model, room):
    tracer = wrap(model, mode="dense")
    ids = torch.ones(4, 8, dtype=torch.long)
    room(just_enough(tracer.estimate(16, batch=2).dense))
    with pytest.raises(MemoryError, match=r"what fits: batch_size=2 or") as refused:
        tracer.trace_ids(ids, ids, ids, ids)
    size = int(re.search(r"batch_size=(\d+)", str(refused.value))[1])
    assert len(tracer.trace_ids(ids, ids, ids, ids, batch_size=size).answers) == 4


def test_padding_takes_a_mask(model):
    estimate, padded = (
        wrap(model)._solver.budget.estimate(4096, 2, padded=padded) for padded in (False, True)
    )
    assert padded.streamed - estimate.streamed >= 2 * 4096**2
    assert padded.dense - estimate.dense >= 2 * 4096**2


def test_padded_rollouts_are_estimated_as_such(model, monkeypatch):
    monkeypatch.setattr(memory, "SMALL", 0)
    asked = []
    real = memory.Budget.estimate

    def estimate(self, tokens, batch=1, *, padded=False):
        asked.append((tokens, batch, padded))
        return real(self, tokens, batch, padded=padded)

    monkeypatch.setattr(memory.Budget, "estimate", estimate)
    ids, mask = torch.ones(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long)
    wrap(model).trace_ids(ids, ids, mask, mask)
    mask[0, -1] = 0
    wrap(model).trace_ids(ids, ids, torch.ones_like(ids), mask)
    assert asked == [(16, 2, False), (16, 2, True)]


def test_dense_is_a_remedy_for_streaming_short_texts(model, room):
    tracer = wrap(model, mode="streamed")
    room(just_enough(tracer.estimate(TOKENS).dense))
    with pytest.raises(MemoryError, match=r"what fits: mode='dense' or"):
        tracer.trace(PROMPT, RESPONSE)


def test_the_model_runs_as_often_for_long_texts_as_for_short_ones(monkeypatch):
    """Where processes share a model, each must make the same forward passes."""
    runs = []
    for small in (0, 2**24):
        monkeypatch.setattr(memory, "SMALL", small)
        model = tiny_llama()
        tracer = wrap(model)
        counted = []
        model.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        tracer.trace(PROMPT, RESPONSE)
        runs.append(len(counted))
    assert runs[0] == runs[1]


def test_streaming_is_a_remedy_for_dense(room):
    model = tiny_llama(max_position_embeddings=8192)
    tracer, text = wrap(model, mode="dense"), PROMPT * 300
    tokens = len(tiny_tokenizer()(text + RESPONSE)["input_ids"])
    room(just_enough(tracer.estimate(tokens).streamed))
    with pytest.raises(MemoryError, match=r"what fits: mode='streamed' or up to"):
        tracer.trace(text, RESPONSE)


def test_a_preset_without_a_backward_pass_is_a_remedy_for_the_default(room):
    model = tiny_llama(max_position_embeddings=8192)
    text = PROMPT * 300
    tokens = len(tiny_tokenizer()(text + RESPONSE)["input_ids"])
    room(just_enough(wrap(model, preset="decided").estimate(tokens).streamed))
    with pytest.raises(MemoryError, match=r"what fits: preset='decided' or .*up to"):
        wrap(model, preset="derivation").trace(text, RESPONSE)
    assert wrap(model, preset="decided").trace(text, RESPONSE).throughput.any()


@pytest.fixture(scope="module")
def taken():
    """Estimated and taken MiB of each model and mode.

    They are measured in a process of its own, whose allocator gives back what is freed.
    """
    code = """
import torch
from benchmarks.harness import peak_of
from benchmarks.models import SMALL, build, number_tokenizer
from tests.families import tiny_model
import flowtracer_plugin as ft

# All layers of the second see a window, through a mask of all pairs of tokens.
window = {"max_position_embeddings": 2500, "sliding_window": 2000}
models = {"small": build(SMALL), "window": tiny_model("mistral", vocab_size=1000, **window)}
for name, model in models.items():
    ids = torch.randint(3, 1000, (1000 if name == "small" else 2500,)).tolist()
    for mode in ("dense", "streamed"):
        named = {"mode": mode, "answer": "last_number", "preset": "paper"}
        tracer = ft.wrap(model, number_tokenizer(), **named)
        estimated = getattr(tracer.estimate(len(ids)), mode) / 2**20
        print(name, mode, estimated, peak_of(lambda: tracer.trace_tokens(ids[:300], ids[300:])))
for tokens in (350, 900):
    tracer = ft.wrap(models["small"], number_tokenizer(), preset="derivation", answer="last_number")
    ids, estimated = torch.randint(3, 1000, (tokens,)).tolist(), tracer.estimate(tokens).dense
    peak = peak_of(lambda: tracer.trace_tokens(ids[:100], ids[100:]))
    print("gradients", tokens, estimated / 2**20, peak)
"""
    quiet = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **quiet, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = map(str.split, ran.stdout.splitlines())
    return {(model, mode): (float(one), float(other)) for model, mode, one, other in lines}


@pytest.mark.parametrize(
    ("model", "mode"),
    [
        *((model, mode) for model in ("small", "window") for mode in ("dense", "streamed")),
        ("gradients", "350"),
        ("gradients", "900"),
    ],
)
def test_estimates_are_a_little_above_what_is_taken(taken, model, mode):
    estimated, measured = taken[model, mode]
    assert 0.6 * estimated < measured < 1.05 * estimated, (estimated, measured)


def test_the_graph_of_a_backward_pass_grows_with_layers_words_and_masks():
    def graph(tokens, **options):
        model = tiny_llama(max_position_embeddings=8192, **options)
        tracer = ft.wrap(model, preset="derivation", verify=False)
        budget, plain = (
            tracer._solver.budget,
            ft.wrap(model, layers="all", verify=False, preset="paper"),
        )
        assert budget.estimate(tokens).dense > plain.estimate(tokens).dense
        return [budget.estimate(tokens, padded=padded).dense for padded in (False, True)]

    one, padded = graph(500)
    assert graph(1000)[0] == 2 * one
    # Each of six layers keeps a mask of numbers.
    assert padded - one >= 6 * 500**2 * 4
    deeper, _ = graph(500, num_hidden_layers=12)
    assert 1.5 * one < deeper < 2 * one
    wider, _ = graph(500, vocab_size=5000)
    assert wider - one > 4 * 4 * 4000 * 500


def test_short_texts_do_not_ask_for_free_memory(model, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda _: pytest.fail("asked"))
    assert wrap(model).trace(PROMPT, RESPONSE).attention is not None


@pytest.mark.parametrize("bad", [{"tokens": 0}, {"tokens": 5, "batch": 0}])
def test_estimates_need_a_token_and_a_text(model, bad):
    with pytest.raises(ValueError, match="tokens and batch must be at least 1, got"):
        wrap(model).estimate(**bad)


def test_an_estimate_prints_as_one_readable_line():
    estimate = MemoryEstimate(
        tokens=32_768, batch=2, dense=9_640_000_000, streamed=870_000_000, free=4_000_000_000
    )
    assert str(estimate) == (
        "2 × 32,768 tokens: dense 9.6 GB, streamed 870 MB; 4.0 GB free → streamed"
    )
    nothing = MemoryEstimate(tokens=9, batch=1, dense=5, streamed=5, free=5)
    assert str(nothing) == "9 tokens: dense 5 bytes, streamed 5 bytes; 5 bytes free → neither fits"


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (54_321, "54 kB"), (7e13, "70,000 GB")],
)
def test_sizes_in_words(size, words):
    assert readable(size) == words


@given(st.integers(0, 10_000), st.integers(1, 50))
def test_the_longest_text_is_the_last_that_fits(room, factor):
    most = longest(room, lambda tokens: factor * tokens * tokens)
    assert factor * most * most <= room < factor * (most + 1) ** 2


def test_processes_that_share_heads_decide_alike(monkeypatch):
    from flowtracer_plugin.model import parallel

    model = tiny_llama()
    assert parallel.smallest(model, 7) == 7
    asked = []

    def all_reduce(tensor, *, op, group):
        asked.append((op, group))
        tensor.fill_(3)

    tracer = wrap(model)
    tracer.estimate(100)
    monkeypatch.setattr(parallel, "tensor_parallel_group", lambda _: "group")
    monkeypatch.setattr(parallel.distributed, "all_reduce", all_reduce)
    assert parallel.smallest(model, 7) == 3
    assert asked == [(parallel.distributed.ReduceOp.MIN, "group")]
    assert tracer.estimate(100).free == 3
