"""Rows of a data set, from files and folders, and the prompts that are made of them."""

import json
import os

import datasets
import pytest

from flowtracer_plugin.text.data_sets import TEMPLATES, load_rows, with_prompts

ROWS = [{"question": f"{n} plus {n} is", "solution": f"so #### {2 * n}"} for n in range(8)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets"
    )


@pytest.fixture
def data(tmp_path):
    return written(tmp_path / "data.jsonl")


def written(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_a_local_file_is_read(tmp_path, kind):
    path, rows = tmp_path / f"data.{kind}", datasets.Dataset.from_list(ROWS)
    write = {"csv": rows.to_csv, "parquet": rows.to_parquet}.get(kind, rows.to_json)
    write(path)
    assert load_rows(str(path), "train").to_list() == ROWS
    assert load_rows(str(path), "train[:2]").to_list() == ROWS[:2]
    assert list(load_rows(str(path), "train", streaming=True)) == ROWS


def test_a_folder_with_splits_is_read(tmp_path):
    (tmp_path / "own").mkdir()
    written(tmp_path / "own" / "train.jsonl")
    written(tmp_path / "own" / "test.jsonl", ROWS[:1])
    assert load_rows(str(tmp_path / "own"), "test").to_list() == ROWS[:1]
    assert len(load_rows(str(tmp_path / "own"), "train")) == 8


def test_errors_name_data_that_cannot_be_loaded(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"there is no file 'nowhere.jsonl'"):
        load_rows("nowhere.jsonl", "train")
    (tmp_path / "broken.jsonl").write_text('{"a": 1}\n{"a": ')
    with pytest.raises(ValueError, match=r"cannot load split 'train' of '.*broken.jsonl': "):
        load_rows(str(tmp_path / "broken.jsonl"), "train")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty.jsonl"):
        load_rows(str(tmp_path / "empty.jsonl"), "train")
    path = written(tmp_path / "data.jsonl")
    with pytest.raises(ValueError, match=r"cannot load split 'train\[:0\]' of .* no data"):
        load_rows(str(path), "train[:0]")
    (tmp_path / "heads.csv").write_text("question,answer\n")
    with pytest.raises(ValueError, match=r"cannot load split 'train' of '.*heads.csv': .* no data"):
        load_rows(str(tmp_path / "heads.csv"), "train")
    with pytest.raises(ValueError, match=r"cannot load split 'test' of .*Unknown split .*95%"):
        load_rows(str(path), "test")
    assert len(load_rows(str(path), "train[75%:]")) == 2


def test_a_byte_order_mark_is_skipped(tmp_path):
    mark = b"\xef\xbb\xbf"
    for kind in ("jsonl", "json", "csv"):
        path, rows = tmp_path / f"data.{kind}", datasets.Dataset.from_list(ROWS)
        if kind == "csv":
            rows.to_csv(path)
        else:
            rows.to_json(path, lines=kind == "jsonl")
        path.write_bytes(mark + path.read_bytes())
        assert load_rows(str(path), "train").to_list() == ROWS
        assert list(load_rows(str(path), "train", streaming=True)) == ROWS


ROW_OF_JSON = b'{"question": "q"}\n'


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (
            "a.jsonl",
            ROW_OF_JSON + b"nope\n",
            r"line 2 of '.*a\.jsonl' is not JSON: Expecting value",
        ),
        ("a.jsonl", ROW_OF_JSON + b"7\n", r"line 2 of '.*a\.jsonl' is not an object: 7"),
        ("a.jsonl", ROW_OF_JSON * 2 + b'{"question', "line 3 of .* is not JSON: Unterminated"),
        (
            "a.jsonl",
            b'{"a": "\xe9"}\n',
            "line 1 of .* in UTF-8, found the byte 0xe9; save the file",
        ),
        ("a.jsonl", ROW_OF_JSON.decode().encode("utf-16"), "found the byte 0xff; save the file as"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000, "line 1 of .* is not JSON: .* nested too deeply"),
        ("a.jsonl", b'{"a": 1' + b"0" * 5000 + b"}", "line 1 of .* is not JSON: Exceeds the limit"),
        ("a.json", b'[{"a": 1}', "line 1 of .* is not JSON: Expecting ',' delimiter"),
        ("a.json", b"7", "line 1 of .* is not an object: 7"),
        *(
            (f"a.{kind}", b"", "there are no rows in")
            for kind in ("jsonl", "json", "csv", "parquet")
        ),
        ("a.csv", b'a,b\n"c,d\n', "EOF inside string"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), "can't decode byte 0xff"),
        ("a.parquet", b"PAR1" + b"x" * 99, "[Pp]arquet"),
    ],
)
def test_damaged_files_are_named_with_the_place(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"'train' of '.*{name}': .*{problem}"):
        load_rows(str(tmp_path / name), "train")


def test_the_damaged_file_of_a_folder_is_named(tmp_path):
    (tmp_path / "own").mkdir()
    written(tmp_path / "own" / "a.jsonl")
    (tmp_path / "own" / "b.jsonl").write_bytes(ROW_OF_JSON + b"nope")
    with pytest.raises(ValueError, match=r"of '.*own': line 2 of '.*b\.jsonl' is not JSON"):
        load_rows(str(tmp_path / "own"), "train")


def test_a_name_may_be_no_text(tmp_path):
    path = written(tmp_path / os.fsdecode(b"\xff.jsonl"))
    assert load_rows(str(path), "train").to_list() == ROWS


ROW = {"question": "What is 3 + 4?", "solution": "7"}
TEXT = "What is 3 + 4?"
USER = {"role": "user", "content": TEXT}


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        ({}, TEXT),
        ({"chat": True}, [USER]),
        ({"chat": True, "system": "Be kind."}, [{"role": "system", "content": "Be kind."}, USER]),
        ({"template": "Q: {prompt} {in braces}\nA:"}, f"Q: {TEXT} {{in braces}}\nA:"),
        ({"template": "boxed"}, TEMPLATES["boxed"].replace("{prompt}", TEXT)),
        (
            {"template": "hash", "chat": True},
            [{"role": "user", "content": TEMPLATES["hash"].replace("{prompt}", TEXT)}],
        ),
    ],
)
def test_rows_get_prompts(options, prompt):
    rows = with_prompts(
        datasets.Dataset.from_list([ROW]),
        prompt_column="question",
        answer_column="solution",
        **options,
    )
    assert rows.to_list() == [ROW | {"answer": "7", "prompt": prompt}]


def test_a_column_of_that_name_is_replaced_and_messages_stay():
    rows = datasets.Dataset.from_list([{"prompt": "old", "answer": "old", "asked": [USER]}])
    made = with_prompts(rows, prompt_column="asked", answer_column="prompt", chat=True)
    assert made.to_list() == [{"prompt": [USER], "answer": "old", "asked": [USER]}]


def test_a_stream_gets_prompts(data):
    rows = with_prompts(load_rows(str(data), "train", streaming=True), prompt_column="question")
    assert next(iter(rows)) == {**ROWS[0], "prompt": ROWS[0]["question"]}
    with pytest.raises(ValueError, match=r"no column 'ask', .* they have 'question', 'solution'"):
        with_prompts(load_rows(str(data), "train", streaming=True), prompt_column="ask")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_column": "ask"}, "no column 'ask', which --prompt_column names; they have 'ques"),
        ({"answer_column": "ans"}, "no column 'ans', which --answer_column names; they have 'ques"),
        ({"template": "boxd"}, "must be hash, boxed or a text with {prompt} .* got 'boxd'"),
        ({"system": "Be kind."}, "--system_prompt needs chat messages"),
        ({"prompt_column": "n"}, "wanted a text or a list .* as each prompt, found 5 in a row"),
        ({"prompt_column": "said", "template": "boxed"}, "leave them out for chat messages"),
    ],
)
def test_errors_say_why_prompts_cannot_be_made(options, message):
    rows = datasets.Dataset.from_list([ROW | {"n": 5, "said": [USER]}])
    with pytest.raises(ValueError, match=message):
        with_prompts(rows, **({"prompt_column": "question"} | options))


# runs
