"""The options of the command line: those of the Python API, with examples and completion."""

import dataclasses
import inspect
import re
import shlex
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest
from typer.main import get_command

import flowtracer_plugin as ft
from flowtracer_plugin.bulk.examples import load_examples
from flowtracer_plugin.cli import commands as cli, options as cli_options, parsing
from flowtracer_plugin.cli.mistakes import EXTRAS
from flowtracer_plugin.evaluation import run as evaluation
from flowtracer_plugin.evaluation.ranked_tokens import KnockOutOptions
from flowtracer_plugin.options import CHOICES, PRESETS, flow_options
from flowtracer_plugin.reading import runner as running
from flowtracer_plugin.report.figures import figure
from flowtracer_plugin.text import answers
from flowtracer_plugin.trace import memory

ROOT = get_command(cli.app)


def leaves(group, path=()):
    """Every command, with the words that a user types for it."""
    for name, command in group.commands.items():
        yield (*path, name), command
        if hasattr(command, "commands"):
            yield from leaves(command, (*path, name))


COMMANDS = dict(leaves(ROOT))


def defaults(command):
    return {option.name: option.default for option in COMMANDS[command,].params}


def choices(name):
    """The values that an option takes."""
    parts = get_args(get_type_hints(cli_options.TracingOptions)[name])
    # An option that a preset may set is also None.
    return get_args(parts[0]) if parts[-1] is type(None) else parts


def keywords(function):
    parameters = inspect.signature(function).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def test_all_commands_are_there():
    wanted = ["trace", "generate", "report", "compare", "evaluate", "train"]
    wanted += ["adapters", "estimate", "demo"]
    assert set(wanted) <= {path[0] for path in COMMANDS}


@pytest.mark.parametrize("command", ["trace", "generate"])
def test_options_have_the_names_and_defaults_of_the_python_functions(command):
    options = defaults(command)
    for function, shown_otherwise in (
        (ft.wrap, set()),
        (ft.FlowTracer.generate, {"progress", "template_kwargs"}),
    ):
        for name, default in keywords(function).items():
            if name not in shown_otherwise and not (function != ft.wrap and name == "answer"):
                assert options[name] == default, name
    names = {field.name for field in dataclasses.fields(ft.FlowOptions)}
    assert flow_options(**{name: options[name] for name in names}) == ft.FlowOptions()


def test_tracing_has_no_options_that_python_lacks():
    fields = {field.name for field in dataclasses.fields(cli_options.TracingOptions)}
    assert fields == set(keywords(ft.wrap))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        *((name, set(values) - {"mask"}) for name, values in CHOICES.items()),
        ("mode", set(memory.MODES)),
        ("preset", set(PRESETS)),
        ("backend", set(running.BACKENDS)),
    ],
)
def test_options_take_the_values_that_python_takes(name, wanted):
    assert set(choices(name)) == wanted


def test_estimate_has_the_defaults_of_python_too():
    options = defaults("estimate")
    assert options["layers"] == keywords(ft.wrap)["layers"]
    assert options["batch"] == keywords(ft.FlowTracer.estimate)["batch"]


def test_evaluate_has_the_names_and_defaults_of_python_too():
    options = defaults("evaluate")
    python = keywords(evaluation.evaluate) | keywords(load_examples) | keywords(KnockOutOptions)
    renamed = {"prompt_template": "template", "system_prompt": "system"}
    renamed["template_arg"] = "template_kwargs"
    for ours, theirs in renamed.items():
        options[theirs] = options.pop(ours)
    # The command does not offer the first, uses the model's template by default, and compares all
    # scores.
    for name in python.keys() - {"matched", "chat", "scores"}:
        default = python[name]
        listed = ",".join(map(str, default)) if isinstance(default, tuple) else default
        assert options[name] == listed, name
    assert options["layers"] == keywords(ft.wrap)["layers"]
    assert options["answer"] == keywords(ft.wrap)["answer"]


@pytest.mark.parametrize("command", ["trace", "generate", "evaluate", "estimate"])
def test_every_command_that_loads_a_model_can_run_its_code(command):
    assert defaults(command)["trust_remote_code"] is False


def test_figures_have_the_kinds_and_the_default_of_python():
    hint = get_type_hints(cli_options.OutputOptions)["figure_kind"]
    assert get_args(hint) == figure.KINDS
    kind = inspect.signature(ft.FlowTrace.to_figure).parameters["kind"]
    assert defaults("report")["figure_kind"] == kind.default
    assert set(parsing.FIGURE_SUFFIXES) == set(figure._METADATA)


@pytest.mark.parametrize("command", ["trace", "generate", "report"])
def test_output_options_are_named_after_the_methods_of_a_trace(command):
    options = defaults(command)
    for name in ("json", "html", "parquet", "graphml", "figure"):
        assert name in options
    assert ("save" in options) == (command != "report")


def test_the_extras_install_the_optional_packages():
    import tomllib
    from pathlib import Path

    text = (Path(ft.__file__).parent.parent / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    brought = {
        re.split(r"[<>=\[]", need)[0].replace("-", "_"): extra
        for extra in ("trl", "math", "viz", "ray", "app")
        for need in extras[extra]
    }
    assert brought.items() <= EXTRAS.items()
    assert EXTRAS.keys() - brought.keys() == {"datasets"}  # TRL depends on it


# help


@pytest.mark.parametrize("path", [path for path in COMMANDS if path != ("train",)], ids=" ".join)
def test_help_shows_the_whole_names_of_options(path, flowtracer, monkeypatch):
    """In a terminal of usual width."""
    monkeypatch.setenv("COLUMNS", "80")
    shown = flowtracer(*path, "--help").out
    assert "-…" not in shown
    names = {name for option in COMMANDS[path].params for name in option.secondary_opts}
    assert all(name in shown for name in names)


def example(command):
    """The example in a command's help."""
    return " ".join(inspect.cleandoc(command.help).partition("For example:\n\n")[2].split())


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("width", ["60", "120"])
def test_the_help_of_every_command_shows_an_example(path, width, flowtracer, monkeypatch):
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("TERMINAL_WIDTH", width)
    ran = flowtracer(*path, "--help")
    assert ran.code == 0
    lines = [line.strip() for line in ran.out.splitlines()]
    assert "For example:" in lines
    begun = f"flowtracer {' '.join(path)}"
    assert any(line.startswith(begun) for line in lines[lines.index("For example:") :])


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_the_example_can_be_run(path):
    program, *words = shlex.split(example(COMMANDS[path]))
    assert program == "flowtracer"
    command, context = ROOT, None
    while hasattr(command, "commands"):
        context = command.make_context(command.name, list(words), parent=context)
        _, command, words = command.resolve_command(context, words)
    parsed = command.make_context(command.name, list(words), parent=context)
    assert parsed.params


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_the_example_of_training_can_be_parsed(monkeypatch):
    from flowtracer_plugin.grpo import FlowGRPOConfig
    from flowtracer_plugin.grpo.script import parse

    # TRL's own fields do not hold what they declare, which the type checks of the tests refuse.
    monkeypatch.setattr(FlowGRPOConfig, "__init__", inspect.unwrap(FlowGRPOConfig.__init__))
    words = shlex.split(example(COMMANDS["train",]))
    script, _, model = parse(cli._for_trl(words[2:]))
    assert (script.reward_funcs, model.model_name_or_path) == (["math_answer"], "Qwen/Qwen3-0.6B")
    for given in (["--model", "a"], ["--model=a"], ["--model_name_or_path", "a"]):
        found = parse(cli._for_trl(["--max_steps", "3", *given]))
        assert found[2].model_name_or_path == "a"


# completion


@pytest.fixture
def completed(flowtracer, monkeypatch):
    """The words that bash is offered for the last one."""

    def run(*words):
        typed = shlex.join(["flowtracer", *words]).replace("''", "")
        monkeypatch.setenv("_FLOWTRACER_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", typed)
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        ran = flowtracer()
        assert ran.err == ""
        return ran.out.split()

    return run


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["ge"], ["generate"]),
        (["trace", "--answer", "last"], ["last_number", "last_word"]),
        (["trace", "--layers", "m"], ["middle"]),
        (["trace", "--target", ""], ["answer", "decision"]),
        (["generate", "--device", "c"], ["cpu", "cuda"]),
        (["adapters", "c"], ["check"]),
        (["report", "--gr"], ["--graphml"]),
    ],
)
def test_words_are_completed(completed, words, wanted):
    assert completed(*words) == wanted


def test_completion_offers_all_answer_rules_and_only_layers_that_exist(completed):
    assert completed("trace", "--answer", "") == ["auto", *answers.FINDERS]
    for name in completed("trace", "--layers", ""):
        assert parsing.layer_selection(name) == name


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_a_completion_script_for_each_shell(flowtracer, monkeypatch, shell):
    monkeypatch.setenv("_FLOWTRACER_COMPLETE", f"source_{shell}")
    ran = flowtracer()
    assert (ran.code, ran.err) == (0, "")
    assert f"_FLOWTRACER_COMPLETE=complete_{shell}" in ran.out


def test_completion_loads_nothing_heavy():
    code = (
        "import os, sys, atexit; atexit.register(lambda: print(sorted({'torch', 'transformers'}"
        " & set(sys.modules)), file=sys.stderr)); from flowtracer_plugin.cli import main; main()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={
            "PYTHONPATH": ":".join(sys.path),
            "_FLOWTRACER_COMPLETE": "complete_bash",
            "COMP_WORDS": "flowtracer trace --answer l",
            "COMP_CWORD": "3",
        },
    )
    assert "last_word" in ran.stdout
    assert ran.stderr.splitlines()[-1] == "[]"
