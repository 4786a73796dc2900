import json

import pytest

from flowtracer_plugin.bulk.examples import Columns, Example, load_examples


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    return str(path)


def test_columns_are_found_or_named(tmp_path):
    data = write(
        tmp_path / "data.jsonl",
        {"question": "q", "answer": 7, "text": "t"},
        {"question": "r", "answer": None, "text": None},
    )
    first, second = load_examples(data)
    assert first == Example(row=0, prompt="q", answer="7", columns={"text": "t"})
    assert second == Example(row=1, prompt="r", columns={"text": None})
    assert first.digest != second.digest
    (named,) = load_examples(
        data, limit=1, prompt_column="text", response_column="question", answer_column="text"
    )
    assert named == Example(row=0, prompt="t", response="q", answer="t", columns={"answer": 7})


def test_prompts_get_a_template_and_become_messages(tmp_path):
    data = write(tmp_path / "data.jsonl", {"prompt": "2 + 2?", "response": "4"})
    (found,) = load_examples(data, template="boxed", system="Be brief.", chat=True)
    assert [said["role"] for said in found.prompt] == ["system", "user"]
    assert found.prompt[1]["content"].startswith("2 + 2?\nThink step by step.")
    assert found.response == "4"


def test_other_files_are_read_by_datasets(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("question,answer\nq,7\n")
    assert load_examples(str(path)) == (Example(row=0, prompt="q", answer="7"),)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "there are no rows in"),
        ('{"a": 1}\n', {}, "has no column 'prompt' or 'question' or 'messages', it has 'a'"),
        ('{"prompt": "q"}\n', {"answer_column": "x"}, "have no column 'x', they have 'prompt'"),
        ('{"prompt": null}\n', {}, "row 0 of the data has no 'prompt'"),
        ('{"prompt": "q"}\nnope\n', {}, "line 2 of .* is not JSON"),
        ("[1]\n", {}, "line 1 of .* is not an object"),
        ('{"prompt": "q"}\n{"prompt": ' + "[" * 100_000, {}, "line 2 of .* nested too deeply"),
        ('{"prompt": 3}\n', {}, r"cannot use '.*data\.jsonl': .*found 3 in a row"),
        ('{"prompt": "q", "response": [1]}\n', {}, "'response' of row 0 is not text"),
        ('{"prompt": "q"}\n', {"template": "x"}, "the template must be hash, boxed or a text with"),
    ],
)
def test_damaged_data_are_refused(tmp_path, text, options, message):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_examples(str(path), **options)


def test_a_byte_order_mark_is_skipped_and_another_encoding_named(tmp_path):
    path, text = tmp_path / "data.jsonl", '{"prompt": "é"}\n'
    path.write_text(text, "utf-8-sig")
    assert load_examples(str(path)) == (Example(row=0, prompt="é"),)
    for encoding, byte in (("latin-1", "0xe9"), ("utf-16", "0xff")):
        path.write_text(text, encoding)
        with pytest.raises(ValueError, match=rf"line 1 of .*data\.jsonl' .* found the byte {byte}"):
            load_examples(str(path))


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"there is no file 'nothing\.jsonl'; wanted a JSON L"):
        load_examples("nothing.jsonl")


# --- rollouts ---

TALK = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


def test_a_conversation_that_ends_with_the_assistant_is_prompt_and_response():
    row = {"messages": TALK, "level": 3}
    found = Columns().chosen(list(row)).example(row, 5)
    assert found == Example(row=5, prompt=TALK[:1], response="4", columns={"level": 3})
    given = {"messages": TALK, "response": "5"}
    assert Columns().chosen(list(given)).example(given, 0).prompt == TALK
    asked = {"messages": TALK[:1]}
    assert Columns().chosen(list(asked)).example(asked, 0).response is None


def test_sampled_ids_are_taken_where_the_data_have_both():
    row = {"prompt_ids": [1, 2], "completion_ids": [3], "answer": "x"}
    found = Columns().chosen(list(row)).example(row, 0)
    assert (found.prompt, found.prompt_ids, found.completion_ids) == ("", (1, 2), (3,))
    assert found.columns == {}
    other = Columns().chosen(list(row)).example({**row, "completion_ids": [4]}, 0)
    assert other.digest != found.digest
    half = {"prompt": "q", "prompt_ids": [1]}
    assert Columns().chosen(list(half)).example(half, 0).columns == {"prompt_ids": [1]}


@pytest.mark.parametrize("ids", [None, "12", [1.5], [[1], [2]], {"a": 1}])
def test_ids_that_are_none_are_named(ids):
    columns = Columns().chosen(["prompt_ids", "completion_ids"])
    with pytest.raises(ValueError, match="row 3"):
        columns.example({"prompt_ids": [1], "completion_ids": ids}, 3)


def test_the_right_answer_is_that_of_a_solution():
    assert Example(row=0, prompt="q", answer="1 + 1 = 2\n#### 2").right_answer == "2"
    assert Example(row=0, prompt="q", answer="").right_answer == ""
    assert Example(row=0, prompt="q").right_answer is None
