"""The code, commands and numbers of the documentation: all run, and give what it shows."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from flowtracer_plugin.cli.commands import _for_trl, app
from flowtracer_plugin.credit.scorers import SCORERS
from flowtracer_plugin.grpo import FlowGRPOConfig
from flowtracer_plugin.grpo.script import parse
from flowtracer_plugin.options import PRESETS
from flowtracer_plugin.text.answers import FINDERS
from tests.documents.snippets import (
    REASONER,
    ROOT,
    blocks,
    commands,
    load_reasoner,
    names_at_hand,
    run,
)
from tests.flow import reference

PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [*PAGES, ROOT / "README.md", ROOT / "adapters/README.md", ROOT / "CONTRIBUTING.md"]
WITH_COMMANDS = [document for document in DOCUMENTS if list(commands(document))]

# Code on these pages assumes that the reader has a model, a trainer and a trace.
CONTINUED = {"credit", "exports", "long_texts", "rewards"}
WITH_CODE = {
    "data_sets",
    "method",
    "quickstart",
    "look",
    "train",
    "faithfulness",
    "audit",
    "own_scorers",
    *CONTINUED,
}

ASKING = {"app"}
"""Code that asks a running app; its own tests run it."""

FUTURE = pytest.mark.filterwarnings(
    "ignore:.*is deprecated and will be removed in v6:FutureWarning"
)


@pytest.fixture(autouse=True)
def clone(tmp_path, monkeypatch):
    """A working folder that looks like a clone, and takes the files that are written."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trl(monkeypatch):
    """Turn off the tests' type checks for TRL's fields, whose values do not match their types."""
    monkeypatch.setattr(FlowGRPOConfig, "__init__", inspect.unwrap(FlowGRPOConfig.__init__))


def test_these_pages_have_code():
    found = {page.stem for page in PAGES if any(b.language == "python" for b in blocks(page))}
    assert found == WITH_CODE | ASKING


@pytest.mark.slow
@FUTURE
@pytest.mark.parametrize("name", sorted(WITH_CODE))
def test_the_code_of_a_page_runs_and_prints_what_the_page_says(name, clone, trl):
    page = ROOT / "docs" / f"{name}.md"
    names = names_at_hand(*load_reasoner(), clone) if name in CONTINUED else {}
    for block in blocks(page):
        if block.language == "python":
            printed = run(block, names, str(page))
            assert block.printed is None or printed == block.printed, f"line {block.line}"


def substituted(words):
    """The command with the reasoner in place of any model from the hub."""
    model = re.compile(r"MODEL|[\w.-]+/[\w.-]+")
    return [
        str(REASONER) if model.fullmatch(word) and not (ROOT / word).exists() else word
        for word in words
    ]


def test_every_command_is_shown():
    shown = {words[0] for document in DOCUMENTS for words in commands(document)}
    assert shown == set(get_command(app).commands)


@FUTURE
@pytest.mark.parametrize(
    "document", WITH_COMMANDS, ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_the_commands_of_a_document_run_in_their_order(document, clone, trl):
    (clone / "run.yaml").write_text("output_dir: out")
    for words in commands(document):
        if words[0] == "train":  # would take hours and data of the hub: only parse its options
            parse(_for_trl(words[1:]))
            continue
        if words[0] == "app":  # would serve until Ctrl-C: only parse its options
            words = [*words, "--help"]
        result = CliRunner().invoke(app, substituted(words))
        assert result.exit_code == 0, f"{words}: {result.output}"


def table(page: Path, heading: str) -> list[list[str]]:
    """The rows of the table whose first column has this heading."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.read_text().partition(f"| {heading} |")[2].partition("\n\n")[0].split("\n")
    ]
    return rows[2:]


def test_the_example_of_the_method_is_right_by_definition(clone):
    page = ROOT / "docs/method.md"
    names = {}
    run(next(block for block in blocks(page) if block.language == "python"), names, str(page))
    wanted = reference.flow(names["attention"], names["question"], names["answer"])
    shares = reference.conditioned(
        names["attention"].T - np.diag(np.diag(names["attention"])), names["answer"]
    )
    reach = {int(row[0]): float(row[-1]) for row in table(page, "token")}
    assert [reach[token] for token in range(5)] == pytest.approx(wanted["reach"].tolist())
    flows = np.zeros((5, 5))
    for edge, share, flow in table(page, "edge"):
        earlier, later = map(int, edge.split("→"))
        fraction, value = share.split("=")
        above, below = map(float, fraction.split("/"))
        assert above / below == pytest.approx(float(value)) == pytest.approx(shares[earlier, later])
        flows[later, earlier] = float(flow)
    np.testing.assert_allclose(flows, wanted["edge_flow"])


def test_a_page_lists_all_finders():
    listed = [row[0].strip("`") for row in table(ROOT / "docs/look.md", "finder")]
    assert listed == list(FINDERS)


def test_a_page_lists_all_scorers():
    page = ROOT / "docs/credit.md"
    wanted = [[f"`{one.name}`", one.formula, one.source, one.cost] for one in SCORERS.values()]
    assert table(page, "scorer") == wanted
    text = re.sub(r"\s+", " ", page.read_text())
    graphs = [f"`{one.name}`" for one in SCORERS.values() if one.graph]
    assert f"{', '.join(graphs[:-1])} and {graphs[-1]} read" in text
    assert set(re.findall(r"`flow:(\w+)`", text)) == set(PRESETS)
