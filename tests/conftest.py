"""Settings of the whole suite, shared fixtures, and skips for what a machine does not have."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import beartype  # noqa: F401 - before nnsight, which adds a method to `object` that it cannot take
import hypothesis
import pytest
import torch

torch.set_num_threads(1)  # the models are tiny, and test machines share their cores
hypothesis.settings.register_profile("suite", deadline=None)  # no test asserts a time
hypothesis.settings.load_profile("suite")


def _folder(variable: str) -> bool:
    return Path(os.environ.get(variable) or "/nonexistent").exists()


MISSING = {
    "cuda": None if torch.cuda.is_available() else "no CUDA device",
    "real_model": None if _folder("FLOWTRACER_MODELS") else "FLOWTRACER_MODELS names no folder",
    "compiler": None if shutil.which("g++") else "no g++, with which torch compiles",
    "deepspeed": None if _folder("FLOWTRACER_DEEPSPEED") else "no FLOWTRACER_DEEPSPEED",
    "app": None if _folder("FLOWTRACER_APP") else "no FLOWTRACER_APP",
    "browser": None if _folder("FLOWTRACER_CHROMIUM") else "FLOWTRACER_CHROMIUM names no file",
}
"""For each marker, why its tests cannot run here; None if they can."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that hold the longest tests, so that no worker ends long after all."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    """Take what is imported out of garbage collection, which every training run asks for."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that cannot run here, or fail them if FLOWTRACER_REQUIRE lists their marker."""
    required = os.environ.get("FLOWTRACER_REQUIRE", "").split()
    for marker, reason in MISSING.items():
        if reason and item.get_closest_marker(marker):
            if marker in required:
                pytest.fail(f"FLOWTRACER_REQUIRE lists {marker!r}, but there is {reason}")
            pytest.skip(reason)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model with a chat template."""
    from tests.families import quiet_transformers
    from tests.tiny import tiny_llama, tiny_tokenizer

    folder = tmp_path_factory.mktemp("models") / "chat"
    with quiet_transformers():
        tiny_llama().save_pretrained(folder)
    tiny_tokenizer(chat=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plain_model(chat_model: Path) -> Path:
    """The folder of the same model without a chat template."""
    from tests.tiny import tiny_tokenizer

    folder = chat_model.parent / "plain"
    shutil.copytree(chat_model, folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the suite's type checker, which refuses some values before our own code does."""
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def flowtracer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """A function that runs the command `flowtracer` in this process."""
    from tests.cli.command_line import run_here

    return partial(run_here, monkeypatch, capsys)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One browser per module; a browser for all tests would leave its event loop running."""
    from tests.browsing import open_chromium

    with open_chromium() as browser:
        yield browser


@pytest.fixture
def visits(chromium: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens pages; the test fails if one writes to its console or requests another address."""
    from tests.browsing import Visits

    visits = Visits(chromium, tmp_path)
    yield visits
    for context in chromium.contexts:
        context.close()
    assert visits.said == []
    assert visits.requested == []
