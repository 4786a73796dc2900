"""The tutorial runs from start to end, and its outputs work without a kernel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.documents.snippets import ROOT

NOTEBOOK = ROOT / "examples" / "tutorial.ipynb"

# In another process: Jupyter's event loop and the browser's cannot share one.
EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[1])
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "reasoner").symlink_to(ROOT / "examples" / "reasoner")
    path = folder / "tutorial.ipynb"
    path.write_bytes(NOTEBOOK.read_bytes())
    own = {"IPYTHONDIR": folder, "JUPYTER_RUNTIME_DIR": folder, "TMPDIR": folder}
    ran = subprocess.run(
        [sys.executable, "-c", EXECUTE, path],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **{name: str(value) for name, value in own.items()}},
    )
    assert ran.returncode == 0, ran.stderr
    return path


@pytest.fixture(scope="module")
def outputs(executed) -> list[Any]:
    """The outputs of all cells, as the file stores them."""
    notebook = nbformat.read(executed, as_version=4)
    nbformat.validate(notebook)
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


@pytest.fixture(scope="module")
def frames(outputs) -> list[str]:
    data = [output["data"] for output in outputs if "data" in output]
    return [one["text/html"] for one in data if "text/html" in one]


def test_the_file_holds_no_results():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [(cell.outputs, cell.execution_count) for cell in code] == [([], None)] * len(code)


def test_links_of_the_tutorial_lead_somewhere():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    prose = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", prose)
    assert targets
    assert [one for one in targets if not (NOTEBOOK.parent / one).exists()] == []


@pytest.mark.slow
def test_every_cell_runs(outputs):
    assert {output["output_type"] for output in outputs} == {
        "display_data",
        "execute_result",
        "stream",
    }


@pytest.mark.slow
def test_traces_show_themselves_and_still_do_in_the_saved_file(frames):
    assert len(frames) == 4
    for frame in frames:
        assert re.fullmatch(r"<iframe [^>]*\bsandbox=[^>]*></iframe>", frame)
        assert "allow-same-origin" not in frame
        assert "boxed" in unescape(re.search(r'srcdoc="([^"]*)"', frame)[1])


@pytest.mark.slow
def test_traces_in_a_notebook_share_no_names(frames):
    for frame in frames:
        outside = re.sub(r' srcdoc="[^"]*"', "", frame)
        assert "srcdoc" in frame
        assert not re.search(r"\b(?:id|class|name)=|<style|<script", outside)


@pytest.mark.slow
def test_the_prose_matches_the_numbers(outputs):
    printed = "".join(one["text"] for one in outputs if one["output_type"] == "stream")
    for step, source in {
        "4 + 1 = 5": "<bos>Ann has 4 apples.",
        "5 + 3 = 8": "4 + 1 = 5",
        "8 + 6 = 14": "5 + 3 = 8",
        r"The answer is \boxed{14}<eos>": "8 + 6 = 14",
    }.items():
        assert f"{step!r:35} draws most on {source!r}," in printed
    assert "12.1 nats without ' 14', token 43, flow 26%" in printed  # the line before says it
    assert "0.0 nats without ' answer', token 46, flow 27%" in printed


@pytest.mark.slow
@pytest.mark.browser
def test_cells_show_their_tokens_in_a_browser(frames, visits):
    page = visits.open(f"<!doctype html><title>Tutorial</title>{''.join(frames)}")
    shown = [frame.locator("body").inner_text() for frame in page.frames[1:]]
    assert len(shown) == len(frames)
    for text in shown:
        assert "Ann gets" in text
        assert "boxed" in text
