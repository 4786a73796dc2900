"""The Parquet table of a trace."""

import json
import sys

import numpy as np
import pandas
import pyarrow
import pytest
from pyarrow import parquet

import flowtracer_plugin as ft
from flowtracer_plugin.result.document import about
from tests.made_traces import as_streamed, hostile_trace, make_trace
from tests.pages import HOSTILE

TYPES = {
    "index": "int64",
    "id": "int64",
    "text": "string",
    "region": "string",
    "step": "int64",
    "question": "bool",
    "answer": "bool",
    "target": "bool",
    "throughput": "double",
    "reach": "double",
    "injected": "double",
    "absorbed": "double",
    "hub": "double",
    "checkpoint": "double",
}


@pytest.fixture(scope="module")
def trace():
    return make_trace(
        ("<s>", *["What", "is", "3", "+", "4", "?\n", "It", "is", "7"], "."), prompt=6
    )


@pytest.mark.parametrize("change", [lambda trace: trace, as_streamed], ids=["dense", "streamed"])
def test_a_table_read_back_is_the_trace(trace, change, tmp_path):
    trace = change(trace)
    path = trace.to_parquet(tmp_path / "new" / "a.parquet")
    assert path == tmp_path / "new" / "a.parquet"
    assert [file.name for file in path.parent.iterdir()] == ["a.parquet"]
    assert parquet.read_table(path).to_pylist() == trace.to_dict()["tokens"]
    frame = pandas.read_parquet(path)
    for name in ("throughput", "reach"):
        np.testing.assert_array_equal(frame[name], getattr(trace, name))
    assert frame.text.tolist() == list(trace.tokens)
    assert frame[frame.answer].index.tolist() == np.flatnonzero(trace.spans.answer).tolist()
    assert frame.injected.sum() == pytest.approx(1)


def test_columns_have_types_and_descriptions(trace, tmp_path):
    schema = parquet.read_schema(trace.to_parquet(tmp_path / "a.parquet"))
    assert {field.name: str(field.type) for field in schema} == TYPES
    described = ft.json_schema()["$defs"]["token"]["properties"]
    for field in schema:
        assert not field.nullable
        assert field.metadata[b"description"].decode() == described[field.name]["description"]


def test_the_metadata_describes_the_trace(tmp_path):
    trace = hostile_trace()
    path = trace.to_parquet(tmp_path / "a.parquet")
    found = json.loads(parquet.read_metadata(path).metadata[b"flowtracer.trace"])
    assert found == about(trace)
    assert found["answer"]["text"] == trace.spans.answer_text
    assert found["model"] == HOSTILE[0]
    assert {"schema", "layers", "options", "package_version", "prompt_length"} <= set(found)


def test_any_text_can_be_written(tmp_path):
    trace = hostile_trace()
    texts = pandas.read_parquet(trace.to_parquet(tmp_path / "a.parquet")).text
    for found, wanted in zip(texts, trace.tokens, strict=True):
        assert found == wanted.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert "\ufffd" in list(texts)
    assert "\ufffd\ufffd" in list(texts)


def test_tables_of_several_traces_are_one_table(trace, tmp_path):
    paths = [
        trace.to_parquet(tmp_path / "a.parquet"),
        hostile_trace().to_parquet(tmp_path / "b.parquet"),
    ]
    tables = [parquet.read_table(path) for path in paths]
    both = pyarrow.concat_tables(tables)
    assert both.to_pylist() == tables[0].to_pylist() + tables[1].to_pylist()
    frames = pandas.concat(map(pandas.read_parquet, paths), keys=["a", "b"], names=["trace"])
    assert frames.groupby("trace").absorbed.sum().tolist() == pytest.approx([1, 1])


def test_the_same_trace_gives_the_same_file(trace, tmp_path):
    first, second = (trace.to_parquet(tmp_path / name) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_without_pyarrow_the_extra_is_named(trace, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "flowtracer_plugin.result.parquet", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"to_parquet needs pyarrow; .*'flowtracer-plugin\[viz\]'"
    ):
        trace.to_parquet(tmp_path / "a.parquet")
    assert not list(tmp_path.iterdir())
