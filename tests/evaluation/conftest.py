"""Tracers that the tests of this room share.

The package is imported in the fixtures, since the suite's type checker hooks in after the first
conftests are read.
"""

import re

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

REASONER = "examples/reasoner/model"


@pytest.fixture(scope="session")
def planted():
    import flowtracer_plugin as ft
    from tests.evaluation.planted import planted_model, planted_tokenizer

    answer = re.compile(r"=(.)$")
    return ft.wrap(
        planted_model(), planted_tokenizer(), answer=answer, mode="dense", preset="paper"
    )


@pytest.fixture(scope="session")
def tiny():
    import flowtracer_plugin as ft
    from tests.tiny import tiny_llama, tiny_tokenizer

    return ft.wrap(tiny_llama(), tiny_tokenizer(), mode="dense", preset="paper")


@pytest.fixture(scope="session")
def trace(tiny):
    from tests.tiny import PROMPT, RESPONSE

    return tiny.trace(PROMPT, RESPONSE)


@pytest.fixture(scope="session")
def reasoner():
    import flowtracer_plugin as ft

    model = AutoModelForCausalLM.from_pretrained(REASONER)
    return ft.wrap(model, AutoTokenizer.from_pretrained(REASONER), mode="dense", preset="paper")
