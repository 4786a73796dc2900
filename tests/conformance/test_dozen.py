"""A dozen types, each with something that the others lack, measured in every run of the tests."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowtracer_adapters import InterfaceAdapter
from flowtracer_adapters.interface import interface_call
from tests.conformance import compare, tiny_models
from tests.conformance.compare import BACKENDS, BOUND, measure, prompts
from tests.conformance.probed import Probe, probed_attention
from tests.conformance.reported import reported_attention
from tests.conformance.results import FORWARD
from tests.conformance.tiny_configs import tiny_config
from tests.conformance.tiny_models import tiny_pair

DOZEN = (
    "bart",  # a decoder by itself
    "bloom",  # ALiBi, weights in plain view
    "deepseek_v3",  # latent attention
    "deepseek_v4",  # compressed keys
    "falcon",  # PyTorch's function
    "gptj",  # weights in a method
    "granite_swa",  # sinks after the softmax
    "hrm_text",  # layers that run several times
    "jamba",  # a hybrid
    "opt",  # learned positions
    "qwen3_next",  # gated attention, linear attention
    "xlnet",  # two streams, one row at a time
    "zamba2",  # layers that share their attention
)


@pytest.mark.parametrize("model_type", DOZEN)
def test_the_reader_reads_what_the_model_reports(model_type):
    row = measure(model_type, BACKENDS[0])
    assert row.status == "passed", row.note
    assert float(row.difference) < BOUND


@pytest.mark.parametrize("model_type", DOZEN)
def test_the_interface_reads_the_same(model_type):
    row = measure(model_type, "interface")
    own_code = model_type in {"bloom", "falcon", "gptj", "xlnet"}
    assert row.status == ("refused" if own_code else "passed"), row.note


@pytest.mark.parametrize(
    "wrong",
    [
        lambda call: replace(call, scaling=1.01 * call.scaling),
        lambda call: replace(call, query=call.query.flip(1)),
        lambda call: replace(call, mask=None),
    ],
    ids=["scaling", "heads", "mask"],
)
def test_a_wrong_reading_does_not_pass(monkeypatch, wrong):
    read = lambda _self, module, args, kwargs: wrong(interface_call(module, args, kwargs))  # noqa: E731
    monkeypatch.setattr(InterfaceAdapter, "read", read)
    row = measure("mistral", BACKENDS[0])
    assert row.status == "failed"
    assert float(row.difference) > BOUND


def test_a_model_that_cannot_be_built_is_a_row(monkeypatch):
    def broken(model_type: str) -> None:
        raise ImportError("needs a package")

    monkeypatch.setattr(compare, "tiny_pair", broken)
    row = measure("llama", BACKENDS[0])
    assert (row.status, row.note, row.layers) == ("failed", "ImportError: needs a package", 0)


def test_attention_to_later_tokens_is_noticed(monkeypatch):
    config = tiny_config("xlm")
    config.causal = False
    monkeypatch.setattr(tiny_models, "tiny_config", lambda model_type: config)
    row = measure("xlm", BACKENDS[0])
    assert row.status == "refused", row.note
    assert row.note.startswith("UnsupportedArchitectureError: ")
    assert row.note.endswith(FORWARD)


def test_derivatives_by_the_values_are_the_attention_that_a_model_reports():
    probe = Probe(module="model.layers.{}.self_attn", value="v_proj", output="o_proj")
    _, twin = tiny_pair("qwen2")
    for prompt in prompts():
        wanted = reported_attention(twin, prompt.ids, prompt.mask)
        found = probed_attention(twin, prompt.ids, prompt.mask, probe)
        assert found.keys() == wanted.keys()
        for layer, map_ in wanted.items():
            rows = prompt.mask[:, None].expand(map_.shape[:3])
            torch.testing.assert_close(found[layer][rows], map_[rows], rtol=0, atol=1e-6)
