"""What the documents promise."""

import contextlib
import inspect
import io
import re
from itertools import chain
from pathlib import Path

import pytest

import flowtracer_plugin as ft

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "adapters/README.md",
        "benchmarks/README.md",
        "docs/long_texts.md",
        "docs/rewards.md",
    )
]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def test_the_first_program_prints_what_the_readme_says(tmp_path, monkeypatch):
    (language, program), (_, printed) = BLOCKS[:2]
    assert language == "python"
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(program, "README.md", "exec"), {})
    assert output.getvalue() == printed
    assert "<html" in (tmp_path / "trace.html").read_text()


@pytest.fixture(scope="module")
def reasoner():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ROOT / "examples/reasoner/model"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def names_for_the_snippets(reasoner, folder):
    """What a reader of the later snippets has already."""
    from datasets import Dataset
    from trl import GRPOTrainer

    from examples.demo import accuracy_reward
    from flowtracer_adapters import InterfaceAdapter
    from flowtracer_plugin.grpo import FlowGRPOConfig

    model, tokenizer = reasoner
    data = Dataset.from_list([{"prompt": "Ann has 4 apples. How many apples?\n", "answer": 4}])
    config = FlowGRPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to=[])
    tracer = ft.wrap(model, tokenizer)
    trace = tracer.trace("Ann has 4 apples. How many apples?\n", r"The answer is \boxed{4}")
    return {
        "ft": ft,
        "model": model,
        "tokenizer": tokenizer,
        "tracer": tracer,
        "trace": trace,
        "attention": trace.attention,
        "question": trace.spans.question,
        "answer": trace.spans.answer,
        "accuracy": accuracy_reward,
        "config": config,
        "data": data,
        "GRPOTrainer": lambda *args, **named: GRPOTrainer(*args, args=config, **named),
        "your_trainer": GRPOTrainer(model, accuracy_reward, args=config, train_dataset=data),
        "MyAdapter": InterfaceAdapter,
    }


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_the_later_snippets_run(reasoner, tmp_path, monkeypatch):
    # TRL's own fields do not hold what they declare, which the type checks of the tests refuse.
    from flowtracer_plugin.grpo import FlowGRPOConfig

    monkeypatch.setattr(FlowGRPOConfig, "__init__", inspect.unwrap(FlowGRPOConfig.__init__))
    monkeypatch.chdir(tmp_path)
    names = names_for_the_snippets(reasoner, tmp_path)
    snippets = [text for language, text in BLOCKS if language == "python"][1:]
    assert len(snippets) == 3
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)


def test_the_readme_is_short_and_shows_its_output_early():
    lines = README.splitlines()
    assert len(lines) <= 120
    assert lines.index("```text") < 30
    assert README.index(BLOCKS[1][1]) < len("\n".join(lines[:30]))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.parent.name + "-" + path.stem)
def test_links_between_documents_lead_somewhere(document):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text())
    assert [target for target in targets if not (document.parent / target).exists()] == []


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

    from flowtracer_plugin.cli import app

    commands = (["generate", "--help"], ["trace", "--help"], ["train", "--help"])
    described = "".join(CliRunner().invoke(app, c, terminal_width=200).output for c in commands)
    inline = re.findall(r"`(flowtracer [^`]+)`", README)
    blocks = [text for language, text in BLOCKS if language == "bash"]
    shown = {flag for text in [*blocks, *inline] for flag in text.split()}
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
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().split()
    }
    assert names - pinned == set()
