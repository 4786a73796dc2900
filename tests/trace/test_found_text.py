"""Texts of several lengths, read together and one by one."""

import numpy as np
import pytest

from flowtracer_plugin import wrap
from flowtracer_plugin.trace.solver import Solver
from tests.bulk.stories import stories
from tests.tiny import tiny_llama, tiny_tokenizer


@pytest.mark.parametrize("preset", ["paper", "derivation", "decided", "sharp"])
@pytest.mark.parametrize("mode", ["dense", "streamed"])
def test_together_they_have_the_flow_that_each_has_alone(preset, mode):
    tracer = wrap(tiny_llama(), tiny_tokenizer(), preset=preset, mode=mode)
    rows = stories(5)
    tokenizer = tracer.tokenizer
    found = [
        tracer.find(tokenizer(row["prompt"]).input_ids, tokenizer(row["response"]).input_ids)
        for row in rows
    ]
    assert len({len(text.ids) for text in found}) > 1
    for text, together in zip(found, tracer.trace_found(found), strict=True):
        (alone,) = tracer.trace_found([text])
        np.testing.assert_allclose(together.throughput, alone.throughput, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(together.reach, alone.reach, rtol=1e-4, atol=1e-6)
        assert together.tokens == alone.tokens == text.tokens
        assert (together.attention is None) == (mode == "streamed")
        assert together.heads == alone.heads


def test_they_are_read_one_by_one_where_all_do_not_fit(monkeypatch):
    tracer = wrap(tiny_llama(), tiny_tokenizer(), preset="paper")
    tokenizer = tracer.tokenizer
    found = [
        tracer.find(tokenizer(row["prompt"]).input_ids, tokenizer(row["response"]).input_ids)
        for row in stories(3)
    ]
    real, batches = Solver._ready, []

    def ready(self, ids, mask):
        batches.append(len(ids))
        return "streamed" if len(ids) > 1 else real(self, ids, mask)

    monkeypatch.setattr(Solver, "_ready", ready)
    assert all(trace.attention is not None for trace in tracer.trace_found(found))
    assert batches == [3, 1, 1, 1]


def test_a_trace_holds_its_own_map_alone():
    tracer = wrap(tiny_llama(), tiny_tokenizer(), preset="decided")
    ids = tracer.tokenizer("Ann has 2 apples. The answer is 3.").input_ids
    texts = [tracer.find(ids[:5], ids[5:]) for _ in range(4)]
    for trace in tracer.trace_found(texts):
        held = trace.attention.base
        assert held.untyped_storage().nbytes() == trace.attention.nbytes
