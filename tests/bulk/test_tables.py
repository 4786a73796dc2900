import json
import re

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest

import flowtracer_plugin as ft
from flowtracer_plugin import trace_many
from flowtracer_plugin.bulk import to_dataframe
from flowtracer_plugin.bulk.tables import (
    answer_record,
    answer_schema,
    answer_table,
    carried_names,
    token_schema,
    token_table,
)
from flowtracer_plugin.bulk.traced_row import TracedRow
from tests.bulk.stories import stories
from tests.documents.snippets import ROOT

HALF = "\ud800"
KINDS = {"level": "integer", "row": "text", "extra": "json"}


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory):
    """A data set of seven rows in shards of three; the last shard has no trace."""
    folder = tmp_path_factory.mktemp("tables") / "out"
    rows = [*stories(6), {"prompt": "", "response": "x", "level": None}]
    ft.trace_dataset(tiny, rows, folder, shard_size=3, scores=["entropy"])
    return folder


def test_every_token_of_every_trace_is_in_its_table(tiny, written):
    tokens = ft.read_results(written).to_dataframe("tokens")
    for one in trace_many(tiny, stories(6)):
        mine = tokens[tokens.rollout == one.row]
        trace, start = one.trace, one.trace.spans.prompt_length
        assert mine["index"].tolist() == list(range(len(trace.tokens)))
        assert mine["id"].tolist() == trace.token_ids.tolist()
        assert mine["text"].tolist() == list(trace.tokens)
        assert mine["part"].tolist() == list(trace.spans.regions)
        np.testing.assert_allclose(mine["throughput"], trace.throughput, rtol=2e-5, atol=1e-7)
        np.testing.assert_allclose(mine["reach"], trace.reach, rtol=2e-5, atol=1e-7)
        assert mine["rank"][:start].isna().all()
        said = mine[start:]
        wanted = said["throughput"].rank(ascending=False, method="first")
        assert said["rank"].tolist() == wanted.tolist()
        assert (said["score_entropy"] >= 0).all()
        assert said["score_entropy"].sum() > 0


def test_every_answer_is_in_its_table(tiny, written):
    answers = ft.read_results(written).to_dataframe()
    assert answers["row"].tolist() == list(range(7))
    assert answers["id"].tolist() == [*(f"story-{row}" for row in range(6)), "6"]
    assert answers["correct"].tolist() == [False, True] * 3 + [None]
    assert answers["level"][:6].tolist() == [0, 1, 2, 3, 0, 1]
    assert answers["data_id"][:6].tolist() == [f"story-{row}" for row in range(6)]
    assert answers["error"][:6].isna().all()
    assert "the prompt is empty" in answers["error"][6]
    for one in trace_many(tiny, stories(6)):
        row = answers.loc[one.row]
        assert (row["answer"], row["rule"]) == (one.trace.spans.answer_text, one.trace.spans.rule)
        assert row["digest"] == one.digest
        assert row["prompt"] + row["response"] == one.trace.text
        assert row["question"] == one.trace.question_text == row["prompt"].strip()
        assert row["prompt_tokens"] + row["response_tokens"] == len(one.trace.tokens)
        assert row["reasoning_share"] == pytest.approx(one.trace.reasoning_share, rel=1e-5)
        assert row["question_reached"] == one.trace.backbone.question_reached
        assert [top["index"] for top in row["top_tokens"]] == list(one.top_tokens())


def test_all_shards_have_the_same_types_and_other_readers_read_them(written, tmp_path):
    from datasets import load_dataset

    for table in ("answers", "tokens"):
        files = sorted((written / table).glob("*.parquet"))
        assert len(files) == 3
        assert len({pyarrow.parquet.read_schema(file) for file in files}) == 1
        found = load_dataset(
            "parquet",
            data_files=str(written / table / "*.parquet"),
            split="train",
            cache_dir=str(tmp_path),
        )
        wanted = getattr(ft.read_results(written), table)
        assert found.column_names == wanted.column_names
        assert found[0] == wanted.slice(0, 1).to_pylist()[0]
        assert len(pandas.read_parquet(written / table)) == len(found) == len(wanted)


def test_columns_are_carried_through_as_their_kinds():
    columns = {"level": 3, "row": "mine", "extra": {"a": "é"}}
    record = answer_record(TracedRow(row=5, id="5", columns=columns), KINDS)
    (found,) = answer_table([record], KINDS).to_pylist()
    assert (found["level"], found["row"], found["data_row"]) == (3, 5, "mine")
    assert json.loads(found["extra"]) == {"a": "é"}
    nothing = answer_record(TracedRow(row=6, id="6"), KINDS)
    (found,) = answer_table([nothing], KINDS).to_pylist()
    assert [found[name] for name in ("level", "data_row", "extra")] == [None] * 3
    assert answer_schema({"x": "number"}).field("x").type == pyarrow.float64()


def test_half_a_character_is_replaced():
    result = TracedRow(
        row=0, id="\ud800", prompt="a\udc00", error="\ud800", columns={"t": "\ud800"}
    )
    (found,) = answer_table([answer_record(result, {"t": "text"})], {"t": "text"}).to_pylist()
    assert [found[name] for name in ("id", "prompt", "error", "t")] == ["�", "a�", "�", "�"]


def test_scores_that_failed_are_missing(tiny):
    (result,) = trace_many(tiny, stories(1))
    table = token_table(result, ["entropy"])
    assert table["score_entropy"].null_count == len(result.trace.tokens)


def test_results_and_traces_are_data_frames(tiny):
    results = list(trace_many(tiny, stories(3)))
    frame = to_dataframe(results)
    assert frame["id"].tolist() == ["story-0", "story-1", "story-2"]
    assert frame["level"].tolist() == [0, 1, 2]
    tokens = results[0].trace.to_dataframe()
    assert tokens["text"].tolist() == list(results[0].trace.tokens)
    np.testing.assert_array_equal(tokens["throughput"], results[0].trace.throughput)


def test_a_folder_without_results_and_a_wrong_table_are_named(written, tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished shard in"):
        ft.read_results(tmp_path)
    with pytest.raises(ValueError, match="wanted the table 'answers' or 'tokens', got 'x'"):
        ft.read_results(written).to_dataframe("x")


def test_a_page_lists_all_columns():
    text = (ROOT / "docs" / "data_sets.md").read_text("utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)
    assert listed == [*answer_schema({}).names, *token_schema([]).names]


def test_no_two_columns_have_one_name():
    names = ["row", "data_row", "id", "data_data_row", "level"]
    found = carried_names(names)
    assert list(found.values()) == sorted(set(found.values()), key=list(found.values()).index)
    assert found["data_row"] == "data_row"
    assert found["row"] == "data_data_data_row"
    assert (found["id"], found["level"]) == ("data_id", "level")
    schema = answer_schema(dict.fromkeys(names, "text"))
    assert len(set(schema.names)) == len(schema.names)
