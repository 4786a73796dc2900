"""What a batch of rollouts reads for its scorers."""

import pytest
import torch

import flowtracer_plugin as ft
from flowtracer_plugin.credit.read_rollouts import ReadRollouts
from flowtracer_plugin.trace.rollouts import rollout_masks
from tests.tiny import PROMPT, RESPONSE, tiny_llama, tiny_tokenizer


@pytest.mark.parametrize("target", ["answer", "decision"])
def test_the_graph_of_a_training_pass_copies_nothing_to_the_host(target, monkeypatch):
    tokenizer = tiny_tokenizer()
    tracer = ft.wrap(tiny_llama(), tokenizer, target=target, preset="paper")
    start = len(tokenizer(PROMPT)["input_ids"])
    ids = tokenizer([PROMPT + RESPONSE], return_tensors="pt")["input_ids"]
    visible = torch.ones_like(ids, dtype=torch.bool)
    masks = rollout_masks(tokenizer, ids, visible, start, tracer.options, tracer.answer)
    reading = tracer.reader.read_in_place(ids, visible, tracer.layers)
    part = ReadRollouts(tracer, ids, visible, start, masks).part(slice(None), reading)

    def refuse(tensor, *_):
        raise AssertionError(f"{tuple(tensor.shape)} is copied to the host")

    with monkeypatch.context() as patch:
        for name in ("cpu", "numpy", "tolist"):
            patch.setattr(torch.Tensor, name, refuse)
        graph = part.graph(solved=False)
    assert graph.attention is reading.attention
    trace = tracer.trace(PROMPT, RESPONSE)
    assert graph.target[0].tolist() == trace.spans.target.tolist()
    assert part.graph().throughput[0].tolist() == pytest.approx(trace.throughput, abs=1e-6)
