"""`flowtracer compare` of a folder that `trace-data` wrote."""

import json
import shutil

import pytest

import flowtracer_plugin as ft
from flowtracer_plugin.report import render_group_comparison
from tests.bulk.stories import stories
from tests.cli.command_line import assert_failed
from tests.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "out"
    tracer = ft.wrap(tiny_llama(), tiny_tokenizer(), mode="dense", preset="paper")
    ft.trace_dataset(tracer, stories(9), folder, shard_size=3)
    return folder


def test_a_folder_gets_its_page_and_a_table_is_printed(flowtracer, traced):
    ran = flowtracer("compare", traced)
    page = traced / "comparison.html"
    assert (ran.code, ran.err) == (0, f"wrote {page}\n")
    compared = ft.compare_results(traced)
    assert page.read_text("utf-8") == render_group_comparison(compared, traced)
    title, heads, first, *_ = [line.split() for line in ran.out.splitlines() if line.strip()]
    assert title == ["4", "right", "against", "5", "wrong"]
    assert heads == ["measure", "right", "wrong", "difference", "in", "SD", "p", "p", "(corrected)"]
    assert first[:2] == ["reasoning", "share"]
    assert len(ran.out.splitlines()) == 3 + 21  # measures that are 0 in all rollouts have no row


def test_groups_of_another_column_as_json(flowtracer, traced, tmp_path):
    page = tmp_path / "x.html"
    call = ("compare", traced, "--by", "level", "--groups", "2, 0", "--json", "--html", page)
    ran = flowtracer(*call)
    assert (ran.code, ran.err) == (0, f"wrote {page}\n")
    wanted = ft.compare_results(traced, by="level", groups=("2", "0")).to_dict()
    assert json.loads(ran.out) == json.loads(json.dumps(wanted))
    assert "level 2 against level 0" in page.read_text("utf-8")


def test_rows_that_are_missing_are_counted(flowtracer, traced, tmp_path):
    shutil.copytree(traced, tmp_path / "out")
    (tmp_path / "out" / "answers" / "00000002.parquet").unlink()
    ran = flowtracer("compare", tmp_path / "out", "--json")
    assert ran.err == "note: 6 of 9 rows are traced so far; rerun trace-data to trace the others\n"
    assert json.loads(ran.out)["rows"] == {"done": 6, "total": 9}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("nowhere",), 2, "or a folder that trace-data wrote; 'nowhere' is not there"),
        ((".",), 1, "no finished shard in '.'"),
        (("OUT", "OUT"), 2, "wanted files of traces, or one folder alone, found 2 paths"),
        (("OUT", "--right", "3"), 2, "--label and --right are for files of traces"),
        (("OUT", "--label", "3"), 2, "--label and --right are for files of traces"),
        (("a.flow", "b.flow", "--by", "x"), 2, "--by and --groups are for a folder"),
        (("OUT", "--by", "x"), 1, "have no column 'x'; there are 'id', 'row'"),
        (("OUT", "--by", "level"), 1, "choose two of them with groups, such as --groups 0,1"),
        (("OUT", "--by", "level", "--groups", "0"), 2, "wanted two values such as a,b, found '0'"),
        (("OUT", "--html", "/dev/null/x.html"), 2, "x.html"),
    ],
)
def test_mistakes_end_in_a_sentence(
    flowtracer, traced, tmp_path, monkeypatch, arguments, code, said
):
    monkeypatch.chdir(tmp_path)
    given = [traced if one == "OUT" else one for one in arguments]
    assert_failed(flowtracer("compare", *given), code, said)
