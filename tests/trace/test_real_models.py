"""Pretrained models, from the folder that FLOWTRACER_MODELS names."""

import json
import os
from functools import cache
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flowtracer_plugin as ft
from tests.flow import reference
from tests.tiny import eager_attention

pytestmark = pytest.mark.real_model

STORIES = ["stories260K", "stories15M"]
CHAT = "SmolLM2-135M-Instruct"
MIDDLE = {"stories260K": (2,), "stories15M": (2, 3), CHAT: tuple(range(10, 20))}
PROMPT = "Tom had 3 apples."
RESPONSE = " He ate one. The answer is 2."


def folder(name):
    path = Path(os.environ["FLOWTRACER_MODELS"]) / name
    if not (path / "config.json").is_file():
        reason = f"FLOWTRACER_MODELS has no folder {name}"
        if "real_model" in os.environ.get("FLOWTRACER_REQUIRE", "").split():
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@cache
def loaded(name, dtype="float32"):
    path = folder(name)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    return model, AutoTokenizer.from_pretrained(path)


@pytest.fixture
def traced(flowtracer):
    """Runs `flowtracer trace --json` and returns its document."""

    def run(*arguments):
        ran = flowtracer("trace", "--json", *arguments)
        assert ran.code == 0, ran.err
        document = json.loads(ran.out)
        jsonschema.validate(document, ft.json_schema())
        return document

    return run


def throughput(document):
    return [token["throughput"] for token in document["tokens"]]


def asked(name):
    return PROMPT if name in STORIES else [{"role": "user", "content": PROMPT}]


@pytest.mark.parametrize("name", [*STORIES, CHAT])
def test_the_trace_follows_from_the_attention_that_eager_reports(name):
    model, tokenizer = loaded(name)
    trace = ft.wrap(model, tokenizer, preset="paper").trace(asked(name), RESPONSE)
    assert trace.spans.answer_text == "2"
    assert trace.layers == MIDDLE[name]
    eager = eager_attention(model, trace.token_ids.tolist(), trace.layers).numpy()
    np.testing.assert_allclose(trace.attention, eager, atol=1e-5)
    wanted = reference.flow(eager, trace.spans.question, trace.spans.target)
    np.testing.assert_allclose(trace.throughput, wanted["throughput"], atol=1e-5)
    assert trace.flow.sink_flow().sum() == pytest.approx(1, abs=1e-5)
    assert 0 < trace.reasoning_share < 1


@pytest.mark.parametrize("name", [*STORIES, CHAT])
def test_the_command_says_what_the_library_says(traced, name):
    path = folder(name)
    found = traced(
        *("--model", path, "--prompt", PROMPT, "--response", RESPONSE, "--dtype", "float32")
    )
    model, tokenizer = loaded(name)
    wanted = ft.wrap(model, tokenizer).trace(asked(name), RESPONSE)
    assert found["text"] == wanted.text
    assert throughput(found) == pytest.approx(wanted.throughput.tolist(), abs=1e-5)


@pytest.mark.parametrize("name", STORIES)
def test_a_story_is_told_and_traced(name):
    model, tokenizer = loaded(name)
    tracer = ft.wrap(model, tokenizer, answer="last_word", preset="paper")
    trace = tracer.generate("Once upon a time, there was a", max_new_tokens=30)
    assert trace.text.endswith(trace.tokens[-1])
    assert "little" in trace.text  # what each of them says next, so weights and tokenizer fit
    assert trace.flow.sink_flow().sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", STORIES)
def test_a_story_may_fill_the_context(name):
    model, tokenizer = loaded(name)
    context = model.config.max_position_embeddings
    tracer = ft.wrap(model, tokenizer, answer="last_word", preset="paper")
    trace = tracer.generate("Once upon a time", max_new_tokens=10 * context)
    assert len(trace.tokens) <= context


def test_the_chat_model_is_asked_through_its_template(traced):
    document = traced(
        "--model",
        folder(CHAT),
        "--prompt",
        "What is the capital of France?",
        "--answer",
        r"re:(Paris)",
        "--max-new-tokens",
        20,
        "--question",
        "user",
        "--dtype",
        "float32",
    )
    assert "<|im_start|>user\nWhat is the capital of France?<|im_end|>" in document["text"]
    assert document["answer"]["text"] == "Paris"
    words = [token["text"] for token in document["tokens"] if token["region"] == "question"]
    assert "".join(words) == "What is the capital of France?"


def test_bfloat16_is_read_as_well_as_eager_bfloat16_is_computed():
    """Rounding to 8 bits moves eager away from float32; our reading must not be further away."""
    (exact, tokenizer), (model, _) = loaded(CHAT), loaded(CHAT, "bfloat16")
    trace = ft.wrap(model, tokenizer, preset="paper").trace(asked(CHAT), RESPONSE)
    ids, layers = trace.token_ids.tolist(), trace.layers
    wanted = eager_attention(exact, ids, layers)

    def off(found):  # the misplaced share of attention, averaged over the rows
        return (found - wanted).abs().sum(-1).mean().item() / 2

    assert off(torch.tensor(trace.attention)) <= 1.5 * off(eager_attention(model, ids, layers))
    # a probability is rounded by 2^-9 of itself, and scores of about 10 by 2^-8 move it by 4 %
    assert off(torch.tensor(trace.attention)) < 0.05
