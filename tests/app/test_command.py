"""`flowtracer app` and the Space, with a stand-in for the surface that needs Gradio."""

import runpy
import socket
import sys
from types import SimpleNamespace

import pytest
import yaml

from flowtracer_plugin.cli.tracing import DEMO_QUESTION, EXAMPLE_QUESTION
from tests.cli.command_line import assert_failed
from tests.documents.snippets import REASONER, ROOT

SPACE = ROOT / "examples" / "space"


@pytest.fixture
def served(monkeypatch):
    """What was built and served."""
    calls = []

    def build(tracer, *, prompt=""):
        calls.append((tracer.model.config.name_or_path, prompt))
        return "blocks"

    def serve(blocks, port, ready):
        calls.append((blocks, port))
        ready("http://127.0.0.1/")

    surface = SimpleNamespace(HOST="127.0.0.1", build=build, serve=serve)
    monkeypatch.setitem(sys.modules, "flowtracer_plugin.app.blocks", surface)
    return calls


@pytest.fixture
def taken():
    """A port that another program uses."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        yield one.getsockname()[1]


@pytest.mark.parametrize("words", [[REASONER], ["--model", REASONER]])
def test_the_app_serves_a_model(flowtracer, served, taken, words):
    ran = flowtracer("app", *words, "--port", "7999")
    assert (ran.code, ran.out) == (
        0,
        "the app is at http://127.0.0.1/ on this machine; Ctrl-C ends it\n",
    )
    assert served == [(str(REASONER), EXAMPLE_QUESTION), ("blocks", 7999)]


def test_without_a_model_it_serves_that_of_the_demo(flowtracer, served):
    assert flowtracer("app", "--port", "7999").code == 0
    assert served == [(str(REASONER), DEMO_QUESTION), ("blocks", 7999)]


def test_a_port_in_use_is_named_before_the_model_is_loaded(flowtracer, served, taken):
    ran = flowtracer("app", "no/such/model", "--port", taken)
    assert_failed(
        ran, 2, "--port", f"port {taken} cannot be used", f"name another, such as {taken + 1}"
    )
    assert served == []


def test_a_wrong_folder_is_named_before_anything_is_served(flowtracer, served):
    ran = flowtracer("app", "./nowhere", "--port", "7999")
    assert_failed(ran, 1, "there is no folder './nowhere'")
    assert served == []


def test_the_extra_is_named_if_gradio_is_missing(flowtracer, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "flowtracer_plugin.app.blocks", raising=False)
    ran = flowtracer("app", "no/such/model")
    wanted = "this needs gradio; run: pip install 'flowtracer-plugin[app]', or in a clone: pip "
    assert_failed(ran, 1, f"{wanted}install -c constraints-app.txt '.[app]'")


# the Space


def test_the_space_is_the_app_with_the_embedded_model(served):
    made = runpy.run_path(str(SPACE / "app.py"))
    assert made["demo"] == "blocks"
    assert served == [(str(REASONER), DEMO_QUESTION)]


def test_the_settings_of_the_space_fit_what_it_runs():
    settings = yaml.safe_load((SPACE / "README.md").read_text().split("---\n")[1])
    pins = (ROOT / "constraints-app.txt").read_text().split()
    assert settings["sdk"] == "gradio"
    assert f"gradio=={settings['sdk_version']}" in pins
    assert (SPACE / settings["app_file"]).exists()
    assert settings["python_version"] == "3.11"
    assert len(settings["short_description"]) <= 60  # the hub's limit
    assert (SPACE / "requirements.txt").read_text() == "flowtracer-plugin[app]\n"
