import json

import pandas
import pytest

from flowtracer_plugin.bulk.examples import Columns
from flowtracer_plugin.bulk.rows import JsonLines, open_rows, read_row, survey, windows


def write(path, content):
    path.write_bytes(content)
    return path


def test_lines_are_read_by_number(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": 2}\r\n{"a": 3}')
    rows = JsonLines(path)
    assert [rows[2], rows[0], rows[1]] == [{"a": 3}, {"a": 1}, {"a": 2}]
    assert len(JsonLines(path, 2)) == len(open_rows(path, limit=2)) == 2


def test_a_bad_line_is_an_error_of_its_row_alone(tmp_path):
    rows = JsonLines(write(tmp_path / "a.jsonl", b'{"a": 1}\n\nno\n[2]\n{"a": 4}\n'))
    found = [read_row(rows, number) for number in range(4)]
    assert found[0] == {"a": 1}
    assert found[3] == {"a": 4}
    assert "line 3 of" in str(found[1])
    assert "is not JSON" in str(found[1])
    assert "line 4 of" in str(found[2])
    assert "is not an object" in str(found[2])


@pytest.mark.parametrize(
    ("data", "kind", "said"),
    [
        ("nothing.jsonl", ValueError, "there is no file"),
        ("nothing.parquet", ValueError, "there is no file"),
        ([], ValueError, "there are no rows"),
        ({"train": []}, TypeError, "one split of a data set, got a dict"),
        (7, TypeError, "wanted rows"),
    ],
)
def test_data_that_are_none_are_refused(data, kind, said):
    with pytest.raises(kind, match=said):
        open_rows(data)


def test_files_and_data_sets_are_rows(tmp_path):
    from datasets import Dataset

    held = Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])
    held.to_parquet(tmp_path / "a.parquet")
    assert open_rows(held, limit=1)[0] == open_rows(str(tmp_path / "a.parquet"))[0]
    assert len(open_rows(held, limit=1)) == 1
    assert len(open_rows(row for row in held)) == 2


def test_a_configuration_of_a_data_set_is_chosen_by_its_name(tmp_path):
    for name in ("main", "socratic"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"prompt": name}).encode())
    card = "".join(
        f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("main", "socratic")
    )
    write(tmp_path / "README.md", f"---\nconfigs:\n{card}---\n".encode())
    assert list(open_rows(tmp_path, config="socratic")) == [{"prompt": "socratic"}]
    with pytest.raises(ValueError, match=r"\['main', 'socratic'\]; name one with --dataset-config"):
        open_rows(tmp_path)
    with pytest.raises(ValueError, match="'other' not found"):
        open_rows(tmp_path, config="other")


def test_the_digest_is_the_same_for_equal_objects_at_other_addresses():
    class Thing:
        pass

    first, second = Thing(), Thing()
    assert str(first) != str(second)
    rows = ([{"prompt": "a", "thing": thing}] for thing in (first, second))
    assert len({survey(one, Columns()).digest for one in rows}) == 1


def test_a_survey_finds_columns_and_their_kinds():
    rows = [
        7,
        {
            "question": "q",
            "answer": 1,
            "n": 1,
            "x": 1,
            "b": True,
            "t": "a",
            "mixed": 1,
            "big": 2**70,
        },
        {"question": "r", "n": None, "x": 0.5, "mixed": "a", "list": [1], "none": None},
    ]
    found = survey(rows, Columns())
    assert (found.columns.prompt, found.columns.answer) == ("question", "answer")
    assert found.kinds == {
        "n": "integer",
        "x": "number",
        "b": "boolean",
        "t": "text",
        "mixed": "json",
        "big": "json",
        "list": "json",
        "none": "text",
    }
    assert survey(json.loads(json.dumps(rows)), Columns()) == found
    assert survey([*rows[:2], {**rows[2], "x": 0.6}], Columns()).digest != found.digest


def test_missing_columns_and_unreadable_data_are_named():
    with pytest.raises(ValueError, match="no column 'prompt' or 'question' or 'messages', it has"):
        survey([{"a": 1}], Columns())
    with pytest.raises(ValueError, match=r"no row of the data can be read: row 0 .* not an object"):
        survey([1, 2], Columns())


def test_a_damaged_line_does_not_end_an_iteration(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": \n{"prompt": "b"}\n')
    (part,) = windows(open_rows(path), 64)
    assert [type(row).__name__ for _, row in part] == ["dict", "ValueError", "dict"]
    elsewhere = tmp_path / "other.jsonl"
    elsewhere.write_bytes(path.read_bytes())
    digests = {survey(open_rows(one), Columns()).digest for one in (path, elsewhere)}
    assert len(digests) == 1


def test_a_data_frame_has_rows():
    frame = pandas.DataFrame([{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}])
    assert open_rows(frame) == [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]


def test_a_system_prompt_needs_a_chat_template():
    with pytest.raises(ValueError, match="a system prompt needs a chat template"):
        Columns(system="Be kind.")
