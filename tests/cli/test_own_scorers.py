"""Own scorers on the command line: they are found before a model is loaded, and used."""

import json
import sys

import pytest

import flowtracer_plugin as ft
from tests.bulk.stories import stories
from tests.cli.command_line import assert_failed

MODULE = """
from flowtracer_plugin.credit import needs

@needs("flow")
def twice(rollouts):
    return 2 * rollouts.throughput[:, rollouts.prompt_length:]
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current folder with a scorer and data."""
    (tmp_path / "twice_scorers.py").write_text(MODULE)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stories(2)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("twice_scorers", None)


@pytest.mark.parametrize(
    "command",
    [
        ("trace", "--prompt", "a", "--response", "b", "--html", "a.html", "--scores"),
        ("trace-data", "data.jsonl", "--output", "out", "--scores"),
        ("evaluate", "data.jsonl", "--scores"),
        ("audit", "data.jsonl", "--scorers"),
    ],
    ids=lambda command: command[0],
)
def test_a_scorer_is_looked_up_before_the_model(flowtracer, here, command):
    ran = flowtracer(command[0], "no/model", *command[1:], "twice_scorers:thrice")
    assert_failed(ran, 2, f"Invalid value for {command[-1]}", "cannot import the scorer")


def test_the_table_of_a_data_set_has_the_scores(flowtracer, here, plain_model):
    call = ("trace-data", plain_model, "data.jsonl", "--output", "out", "--preset", "paper")
    ran = flowtracer(*call, "--scores", "twice_scorers:twice,flow")
    assert ran.code == 0, ran.err
    tokens = ft.read_results("out").tokens
    mine, flow = (tokens[f"score_{name}"].to_pylist() for name in ("twice_scorers:twice", "flow"))
    assert any(mine)
    assert mine == pytest.approx([2 * one for one in flow])
    held = json.loads((here / "out" / "settings.json").read_text())
    assert list(held["own_scorers"]) == ["twice_scorers:twice"]
