"""Tracers that are shared by the tests of this room."""

import re

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import flowtracer_plugin as ft
from tests.evaluation.planted import planted_model, planted_tokenizer
from tests.tiny import PROMPT, RESPONSE, tiny_llama, tiny_tokenizer

REASONER = "examples/reasoner/model"


@pytest.fixture(scope="session")
def planted():
    answer = re.compile(r"=(.)$")
    return ft.wrap(planted_model(), planted_tokenizer(), answer=answer, mode="dense")


@pytest.fixture(scope="session")
def tiny():
    return ft.wrap(tiny_llama(), tiny_tokenizer(), mode="dense")


@pytest.fixture(scope="session")
def trace(tiny):
    return tiny.trace(PROMPT, RESPONSE)


@pytest.fixture(scope="session")
def reasoner():
    model = AutoModelForCausalLM.from_pretrained(REASONER)
    return ft.wrap(model, AutoTokenizer.from_pretrained(REASONER), mode="dense")
