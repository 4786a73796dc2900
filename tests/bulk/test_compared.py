"""Groups of a traced data set, compared piece by piece."""

import json
import shutil

import numpy as np
import pyarrow
import pytest

import flowtracer_plugin as ft
from flowtracer_plugin.bulk import groups as grouping, tables
from flowtracer_plugin.bulk.compared import tenths
from flowtracer_plugin.bulk.groups import group_rollouts
from flowtracer_plugin.comparison import groups as measured
from flowtracer_plugin.comparison.groups import MEASURES
from flowtracer_plugin.comparison.traces import MEASURES as TRACE_MEASURES, compare
from tests.tiny import PROMPT, RESPONSE

ROWS = 14


def rollouts():
    """Right and wrong answers to seven prompts, one of them twice, and rows that do not count."""
    rows = [
        {
            "prompt": PROMPT + " Tom" * (row // 2),
            "response": RESPONSE.replace("3.", "3." + " one" * (row % 5)),
            "answer": "2" if row % 2 else "#### 7",
            "level": row % 4,
            "long": row % 4 > 1,
            "weight": row / 3,
        }
        for row in range(ROWS)
    ]
    return [*rows, rows[1], {**rows[0], "answer": None}, {**rows[2], "response": "\n"}]


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared") / "out"
    return ft.trace_dataset(tiny, rollouts(), folder, shard_size=4, save_traces=True, pages=3)


@pytest.fixture(scope="module")
def found(written):
    return ft.compare_results(written)


def saved(results):
    """The saved traces, and whether each is right."""
    answers = results.answers.filter(results.answers["correct"].is_valid()).to_pylist()
    paths = [results.folder / "traces" / f"{one['row']:08}.flow" for one in answers]
    return [ft.load(path) for path in paths], [one["correct"] for one in answers]


def test_numbers_are_those_of_the_saved_traces(written, found):
    traces, truths = saved(written)
    wanted = compare(traces, right=truths)
    assert found.names == wanted.names == ("right", "wrong")
    assert found.sizes == (len(wanted.sides.first), len(wanted.sides.second)) == (7, 7)
    mine = dict(zip(MEASURES, found.measures.columns(), strict=True))
    for name, theirs in zip(TRACE_MEASURES, wanted.measures.columns(), strict=True):
        own = mine.get(name) or mine[f"from_{name}"]
        for part in ("first", "second", "p"):
            assert own[part] == pytest.approx(theirs[part], rel=1e-9), (name, part)
    assert {word.text for word in found.words} == {word.text for word in wanted.words}
    for one, other in zip(found.words, wanted.words, strict=True):
        assert (one.text, one.texts, one.tokens) == (other.text, other.texts, other.tokens)
        for part in ("first", "second", "p", "p_corrected"):
            assert getattr(one, part) == pytest.approx(getattr(other, part), rel=1e-9)


def test_what_is_left_out_is_counted(found):
    assert (found.done, found.total) == (17, 17)
    assert found.left_out == {
        "not traced": 1,
        "without a value of correct": 1,
        "in other groups": 0,
        "equal to another": 1,
    }
    assert found.rows.tolist() == list(range(ROWS))


def test_parts_and_tenths_are_sums_over_tokens(written, found):
    tokens = written.to_dataframe("tokens")
    for at, row in enumerate(found.rows.tolist()):
        mine = tokens[tokens.rollout == row]
        own = dict(zip(MEASURES, found.values[at].tolist(), strict=True))
        for part in ("question", "prompt", "answer"):
            flow = mine.throughput[mine.part == part].sum()
            assert own[f"in_{part}"] == pytest.approx(flow, abs=1e-12)
        flow = mine.throughput[mine.part == "response"].to_numpy()
        slow = [0.0] * 10
        for place, one in enumerate(flow):
            slow[place * 10 // len(flow)] += one / flow.sum()
        assert [own[f"tenth_{n}"] for n in range(1, 11)] == pytest.approx(slow)
    assert tenths(np.zeros(0)).tolist() == tenths(np.zeros(3)).tolist() == [0.0] * 10


def test_the_tables_are_read_piece_by_piece(written, found, monkeypatch):
    """Few rows are in memory at once, and pieces that cut rollouts change nothing."""
    monkeypatch.setattr(tables, "BATCH_ROWS", 7)
    sizes = [len(batch) for batch in written.batches("tokens", ["rollout"])]
    assert max(sizes) == 7 < min(found.values[:, MEASURES.index("prompt_tokens")])
    monkeypatch.setattr(tables.Results, "read", None)
    monkeypatch.setattr(pyarrow, "concat_tables", None)
    again = ft.compare_results(written.folder)
    assert again.to_dict() == found.to_dict()
    np.testing.assert_array_equal(again.values, found.values)


def test_memory_does_not_hold_the_tokens(tmp_path):
    """18 MB of tokens take 4 MB where they are compared."""
    results = made_results(tmp_path, rollouts=200, tokens=1500)
    pool = pyarrow.proxy_memory_pool(pyarrow.default_memory_pool())
    before = pyarrow.default_memory_pool()
    whole = sum(len(batch) for batch in results.batches("tokens", ["text"]))
    assert whole == 200 * 1500
    pyarrow.set_memory_pool(pool)
    try:
        compared = ft.compare_results(results)
    finally:
        pyarrow.set_memory_pool(before)
    assert compared.sizes == (100, 100)
    assert pool.max_memory() < 6e6 < results.tokens.nbytes / 3


def made_results(folder, *, rollouts, tokens):
    """Tables with random numbers, in one shard."""
    rng = np.random.default_rng(0)
    answers = [
        {
            "id": str(row),
            "row": row,
            "prompt": f"prompt {row // 4}",
            "response": f"response {row}",
            "correct": row % 2 == 0,
            "prompt_tokens": tokens // 3,
            "response_tokens": tokens - tokens // 3,
            "question_reached": 3,
            "top_tokens": [],
            **{name: rng.random() for name in measured.FLOW_MEASURES},
        }
        for row in range(rollouts)
    ]
    parts = np.where(np.arange(tokens) < tokens // 3, "question", "response")
    parts[-1] = "answer"
    words = np.array([f" w{number}" for number in range(50)])
    columns = {
        "rollout": np.repeat(np.arange(rollouts), tokens),
        "index": np.tile(np.arange(tokens, dtype=np.int32), rollouts),
        "id": np.zeros(rollouts * tokens, np.int64),
        "text": words[rng.integers(0, 50, rollouts * tokens)],
        "part": np.tile(parts, rollouts),
        "throughput": rng.random(rollouts * tokens),
        "reach": np.zeros(rollouts * tokens),
        "rank": np.zeros(rollouts * tokens, np.int32),
    }
    told = tables.answer_schema({})
    for name, table in (
        ("answers", pyarrow.Table.from_pylist(answers, schema=told)),
        ("tokens", pyarrow.table(columns, schema=tables.token_schema([]))),
    ):
        (folder / name).mkdir()
        (folder / name / "00000000.parquet").write_bytes(tables.parquet_bytes(table))
    (folder / "settings.json").write_text('{"rows": 200}')
    return ft.read_results(folder)


def test_any_column_with_few_values_makes_groups(written):
    found = ft.compare_results(written, by="long")
    assert found.names == ("long true", "long false")
    assert sum(found.sizes) == 14  # two rows are copies of others, one is not traced
    chosen = ft.compare_results(written, by="level", groups=("3", "0"))
    assert chosen.names == ("level 3", "level 0")
    answers = written.to_dataframe()
    levels = answers.set_index("row")["level"]
    for side, level in zip((chosen.sides.first, chosen.sides.second), (3, 0), strict=True):
        assert set(levels[chosen.rows[list(side)]]) == {level}
    assert chosen.left_out["in other groups"] == 8


def test_words_beyond_the_limit_are_chosen_by_their_flow_in_both_groups(
    written, found, monkeypatch
):
    monkeypatch.setattr("flowtracer_plugin.bulk.compared.MOST_WORDS", 3)
    fewer = ft.compare_results(written)
    assert (len(fewer.words), fewer.words_found) == (3, len(found.words))
    flow = {word.text: 7 * word.first + 7 * word.second for word in found.words}
    assert {word.text for word in fewer.words} == set(sorted(flow, key=flow.get)[-3:])
    known = {word.text: word for word in found.words}
    for word in fewer.words:
        assert (word.first, word.p) == pytest.approx((known[word.text].first, known[word.text].p))


def test_the_document_is_plain(found):
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["groups"] == [
        {"name": "right", "rollouts": 7},
        {"name": "wrong", "rollouts": 7},
    ]
    assert document["rows"] == {"done": 17, "total": 17}
    assert set(document["measures"]) == set(MEASURES)
    assert set(document["measures"]["stops"]) == {"first", "second", "p", "p_corrected", "effect"}
    assert document["assignments"] == 3432
    pairs = document["most_different"]["pairs"]
    assert pairs[0]["first"] % 2 == 1
    assert pairs[0]["first"] // 2 == pairs[0]["second"] // 2 or not pairs[0]["same_prompt"]


def test_pages_of_examples_are_known(found):
    pages = {one.row: one.page and one.page.name for pair in found.examples for one in pair}
    assert pages[1] == "00000001.html"
    assert pages[13] is None


def test_an_unfinished_data_set_is_compared_as_far_as_it_is(written, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(written.folder, folder)
    (folder / "answers" / "00000001.parquet").unlink()
    found = ft.compare_results(folder)
    assert (found.done, found.total) == (13, 17)
    assert not {4, 5, 6, 7} & set(found.rows.tolist())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"by": "nonsense"}, "no column 'nonsense'; there are 'id', 'row'"),
        (
            {"by": "weight"},
            "wanted texts, whole numbers or booleans in the column 'weight', found 0.0",
        ),
        ({"by": "level"}, r"found 4: 0 \(5\), 1 \(5\).*such as --groups 0,1"),
        ({"by": "generated"}, r"found 1: false \(16\); two groups are compared"),
        ({"by": "level", "groups": ("0", "7")}, "got '0' and '7'; there are 0"),
        ({"by": "level", "groups": ("1", "1")}, "wanted two different values"),
        ({"by": "error"}, "no traced rollout has a value in the column 'error'; name another"),
        ({"by": "top_tokens"}, "wanted texts, whole numbers or booleans"),
    ],
)
def test_columns_that_make_no_two_groups_are_refused(written, options, said):
    with pytest.raises(ValueError, match=said):
        ft.compare_results(written, **options)


def test_data_without_right_answers_say_what_to_do(tiny, tmp_path):
    rows = [{"prompt": PROMPT, "response": RESPONSE}] * 2
    written = ft.trace_dataset(tiny, rows, tmp_path / "out")
    with pytest.raises(ValueError, match="give right answers with --answer-column"):
        ft.compare_results(written)


def test_a_column_of_many_values_is_refused(written, monkeypatch):
    monkeypatch.setattr(grouping, "MOST_VALUES", 3)
    with pytest.raises(ValueError, match="'id' has more than 3 values"):
        group_rollouts(written, "id")


def test_folders_without_tables_or_settings_are_named(written, tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished shard in"):
        ft.compare_results(tmp_path)
    (tmp_path / "answers").symlink_to(written.folder / "answers")
    with pytest.raises(ValueError, match=r"wanted settings\.json beside the tables .*No such file"):
        ft.compare_results(tmp_path)


def test_tables_of_an_earlier_version_are_refused(written, monkeypatch):
    monkeypatch.setattr(tables.Results, "columns", lambda self, table: ["row", "correct"])
    with pytest.raises(ValueError, match="no column 'reasoning_share', which earlier versions"):
        ft.compare_results(written)
