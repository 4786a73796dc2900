"""README.md: its programs, its length, its links, and the commands and options that it names."""

import inspect
import re
from itertools import chain

import pytest

from tests.documents.snippets import ROOT, blocks, load_reasoner, names_at_hand, run

README = (ROOT / "README.md").read_text()
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("*/README.md")),
    *ROOT.glob("docs/*.md"),
]
BLOCKS = blocks(ROOT / "README.md")


def test_the_first_program_prints_what_the_readme_says(tmp_path, monkeypatch):
    program = BLOCKS[0]
    assert program.language == "python"
    assert program.printed
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    assert run(program, {}, "README.md") == program.printed
    assert "<html" in (tmp_path / "trace.html").read_text()


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_the_later_snippets_run(tmp_path, monkeypatch):
    # The values of TRL's fields do not match their types, which the tests' type checks refuse.
    from flowtracer_plugin.grpo import FlowGRPOConfig

    monkeypatch.setattr(FlowGRPOConfig, "__init__", inspect.unwrap(FlowGRPOConfig.__init__))
    monkeypatch.chdir(tmp_path)
    names = names_at_hand(*load_reasoner(), tmp_path)
    snippets = [block for block in BLOCKS if block.language == "python"][1:]
    assert len(snippets) == 2
    for snippet in snippets:
        run(snippet, names, "README.md")


def test_the_readme_is_short_and_shows_its_output_early():
    lines = README.splitlines()
    assert len(lines) <= 120
    assert lines.index("```text") < 30
    assert README.index(BLOCKS[1].text) < len("\n".join(lines[:30]))


def test_links_between_documents_lead_somewhere():
    links = [
        document.parent / target
        for document in DOCUMENTS
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text())
    ]
    assert [link for link in links if not link.exists()] == []


def test_the_commands_that_the_documents_name_exist():
    makefile = (ROOT / "Makefile").read_text()
    for document in DOCUMENTS:
        for command in re.findall(
            r"^make ([a-z ]+?)(?:  .*)?$", document.read_text(), re.MULTILINE
        ):
            for target in command.split():
                assert f"\n{target}:" in makefile, target


def test_the_options_that_the_readme_shows_for_the_command_exist():
    from typer.testing import CliRunner

    from flowtracer_plugin.cli.commands import app

    names = ("generate", "trace", "trace-data", "audit", "train")
    commands = ([name, "--help"] for name in names)
    described = "".join(CliRunner().invoke(app, c, terminal_width=200).output for c in commands)
    inline = re.findall(r"`(flowtracer [^`]+)`", README)
    shell = [block.text for block in BLOCKS if block.language == "bash"]
    shown = {flag for text in [*shell, *inline] for flag in text.split()}
    for flag in {flag for flag in shown if flag.startswith("--")}:
        assert flag in described, flag


def test_the_pinned_versions_cover_what_the_package_needs():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [
        *project["dependencies"],
        *chain.from_iterable(project["optional-dependencies"].values()),
    ]
    names = {re.split(r"[<>=\[]", need)[0].lower() for need in needed} - {"flowtracer-plugin"}
    pinned = {
        line.split("==")[0].lower()
        for name in ("constraints.txt", "constraints-app.txt")
        for line in (ROOT / name).read_text().split()
    }
    assert names - pinned == set()
