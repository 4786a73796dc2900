import inspect
import json
import sys

import pytest
from typer.main import get_command

import flowtracer_plugin as ft
from flowtracer_plugin.cli import commands as cli
from tests.bulk.stories import stories
from tests.cli.command_line import EVERYTHING, assert_failed, in_a_process

PAPER = ("--preset", "paper", "--shard-size", 2)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in stories(5)))
    return path


def test_a_data_set_is_traced_and_continued(flowtracer, plain_model, data, tmp_path):
    call = ("trace-data", plain_model, data, "--output", tmp_path / "out", *PAPER, "--pages", 1)
    ran = flowtracer(*call, "--scores", "entropy,recency", "--save-traces", "--shard", "2/2")
    assert ran.code == 0, ran.err
    assert "shard 1 (of 1): 2 rows, 0 with errors" in ran.err
    assert ran.out == "2 of 2 rows are traced; 1 of 2 answers are right\n"
    ran = flowtracer(*call, "--scores", "entropy,recency", "--save-traces", "--json")
    assert json.loads(ran.out) == {
        "output": str(tmp_path / "out"),
        "rows": 5,
        "traced": 5,
        "errors": 0,
        "known": 5,
        "right": 2,
        "generated": 0,
        "truncated": 0,
    }
    found = ft.read_results(tmp_path / "out")
    assert found.answers["row"].to_pylist() == [0, 1, 2, 3, 4]
    assert found.tokens.column_names[-2:] == ["score_entropy", "score_recency"]
    assert len(list((tmp_path / "out" / "traces").iterdir())) == 5
    assert len(list((tmp_path / "out" / "pages").iterdir())) == 1


def test_ctrl_c_says_what_is_kept_and_the_same_command_goes_on(
    flowtracer, plain_model, data, tmp_path, monkeypatch
):
    from flowtracer_plugin.bulk import shards

    real, done = shards.do_shard, []

    def stopped(*arguments):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return real(*arguments)

    call = ("trace-data", plain_model, data, "--output", tmp_path / "out", *PAPER)
    with monkeypatch.context() as patched:
        patched.setattr(shards, "do_shard", stopped)
        ran = flowtracer(*call)
    assert (ran.code, ran.out) == (130, "")
    assert f"stopped: 2 rows are kept in {tmp_path / 'out'}; the same command goes on" in ran.said
    ran = flowtracer(*call)
    assert ran.code == 0
    assert "2 of 5 rows have been traced before, and are kept\n" in ran.err


def test_the_most_different_rollouts_get_pages(flowtracer, plain_model, data, tmp_path):
    call = ("trace-data", plain_model, data, "--output", tmp_path / "out", *PAPER)
    call += ("--pages", 2, "--pages-of", "different")
    ran = flowtracer(*call, "--shard", "1/2")
    assert "note: there are no pages yet" in ran.err
    ran = flowtracer(*call, "--shard", "2/2")
    assert (ran.code, "note:" in ran.err) == (0, False)
    assert len(list((tmp_path / "out" / "pages").iterdir())) == 2


def test_options_reach_the_rows(flowtracer, chat_model, data, tmp_path):
    call = ("trace-data", chat_model, data, "--output", tmp_path / "out", *PAPER)
    ran = flowtracer(
        *call,
        *("--limit", 2, "--prompt-column", "id", "--answer-column", "level"),
        *("--system-prompt", "Be brief.", "--answer", EVERYTHING, "--response-column", "prompt"),
    )
    assert ran.code == 0, ran.err
    first = ft.read_results(tmp_path / "out").answers.slice(0, 1).to_pylist()[0]
    assert "Be brief." in first["prompt"]
    assert "story-0" in first["prompt"]
    assert first["response"] == first["answer"] == stories(1)[0]["prompt"]
    assert first["right_answer"] == "0"


def test_bad_rows_are_counted_and_the_first_is_named(flowtracer, plain_model, data, tmp_path):
    data.write_text(data.read_text() + "no\n")
    call = ("trace-data", plain_model, data, "--output", tmp_path / "out", *PAPER)
    ran = flowtracer(*call)
    assert (ran.code, ran.out.splitlines()[0]) == (
        0,
        "5 of 6 rows are traced; 2 of 5 answers are right",
    )
    assert "1 have an error; the first, row 5: line 6 of" in ran.out


def test_responses_of_the_model_are_counted_apart(flowtracer, plain_model, data, tmp_path):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    missing = [
        {"respons" if name == "response" else name: row[name] for name in row} for row in rows
    ]
    for given, said in (
        (missing, "5 responses are the model's own, as the data give none (--response-column)"),
        ([*missing[:2], *rows[2:]], "2 responses are the model's own, as their rows give none"),
    ):
        data.write_text("".join(json.dumps(row) + "\n" for row in given))
        call = ("trace-data", plain_model, data, "--output", tmp_path / str(len(said)), *PAPER)
        assert said in flowtracer(*call, "--max-new-tokens", 3).out


def test_a_run_that_traces_nothing_fails(flowtracer, plain_model, data, tmp_path):
    data.write_text('{"prompt": 3}\n')
    ran = flowtracer("trace-data", plain_model, data, "--output", tmp_path / "out", *PAPER)
    assert ran.code == 1
    assert ran.out.startswith("0 of 1 rows are traced\n")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "there are no rows in"),
        (b'{"text": "x"}\n', "no column 'prompt' or 'question' or 'messages', it has 'text'"),
        (b"[1]\nno\n", "no row of the data can be read: line 1 of"),
        ('{"prompt": "é"}'.encode("utf-16"), "save the file as UTF-8"),
    ],
)
def test_bad_data_end_in_a_sentence_before_the_model_is_loaded(
    flowtracer, plain_model, data, tmp_path, monkeypatch, content, said
):
    monkeypatch.setattr("flowtracer_plugin.cli.trace_data.load_tracer", None)
    data.write_bytes(content)
    ran = flowtracer("trace-data", plain_model, data, "--output", tmp_path / "out")
    assert_failed(ran, 1, said)
    assert not (tmp_path / "out").exists()


def test_another_folder_is_wanted_before_the_model_is_loaded(
    flowtracer, plain_model, data, tmp_path, monkeypatch
):
    monkeypatch.setattr("flowtracer_plugin.cli.trace_data.load_tracer", None)
    ran = flowtracer("trace-data", plain_model, data, "--output", tmp_path)
    assert_failed(ran, 1, "holds other files and no settings.json")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--shard", "9/8"), "wanted such as 3/8, the third of eight parts, found '9/8'"),
        (("--shard", "x"), "wanted such as 3/8"),
        (("--scores", "nonsense"), "nonsense"),
        (("--output", "/dev/null/out"), "cannot write to the folder"),
        (("--workers", "0"), "greater than or equal to 1"),
        (("--engine", "spark"), "'processes', 'ray'"),
        (("--gpus-per-worker", "1"), "--gpus-per-worker and --address are for --engine ray"),
        (("--address", "auto"), "--gpus-per-worker and --address are for --engine ray"),
    ],
)
def test_wrong_options_are_usage_errors(flowtracer, tmp_path, arguments, said):
    ran = flowtracer("trace-data", "M", "d.jsonl", "--output", tmp_path / "out", *arguments)
    assert_failed(ran, 2, said)


def test_the_engine_gets_its_options(flowtracer, plain_model, data, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr("flowtracer_plugin.cli.trace_data._deliver", lambda *_, **__: None)
    monkeypatch.setattr(
        "flowtracer_plugin.bulk.data_set.trace_dataset", lambda *_, **options: given.update(options)
    )
    call = ("trace-data", plain_model, data, "--output", tmp_path / "out", "--engine", "ray")
    ran = flowtracer(*call, "--workers", 8, "--gpus-per-worker", 0.5, "--address", "auto")
    assert ran.code == 0, ran.err
    chosen = {"engine": "ray", "workers": 8, "gpus_per_worker": 0.5, "address": "auto"}
    assert chosen.items() <= given.items()


def test_a_missing_ray_is_named_before_the_model_is_loaded(
    flowtracer, plain_model, data, tmp_path, monkeypatch
):
    from flowtracer_plugin.bulk import ray_actors

    monkeypatch.setattr("flowtracer_plugin.cli.trace_data.load_tokenizer", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, ray_actors.__name__)
    monkeypatch.delattr("flowtracer_plugin.bulk.ray_actors")
    call = ("trace-data", plain_model, data, "--output", tmp_path / "out", "--engine", "ray")
    ran = flowtracer(*call)
    assert_failed(ran, 1, "the engine ray needs ray; run: pip install 'flowtracer-plugin[ray]'")


def test_options_have_the_defaults_of_python():
    options = {one.name: one.default for one in get_command(cli.app).commands["trace-data"].params}
    python = inspect.signature(ft.trace_dataset).parameters.values()
    other = {"columns", "scores", "shard", "progress", "say"}
    for one in python:
        if one.kind is one.KEYWORD_ONLY and one.name not in other:
            assert options[one.name] == one.default, one.name


@pytest.mark.slow
def test_two_workers_in_a_process_of_their_own(plain_model, data, tmp_path):
    call = ("trace-data", plain_model, data, "--output", tmp_path / "out", *PAPER)
    ran = in_a_process(*call, "--workers", 2, "--no-verify", OMP_NUM_THREADS="1")
    assert ran.code == 0, ran.err
    assert ran.out == "5 of 5 rows are traced; 2 of 5 answers are right\n"
    assert "Traceback" not in ran.err
