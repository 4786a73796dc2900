"""A tracer that the tests of this room share; the package is imported late, as in `evaluation`."""

import pytest


@pytest.fixture(scope="session")
def tiny():
    import flowtracer_plugin as ft
    from tests.tiny import tiny_llama, tiny_tokenizer

    return ft.wrap(tiny_llama(), tiny_tokenizer(), mode="dense", preset="paper")
