import json
import multiprocessing
import os
import random
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import flowtracer_plugin as ft
from flowtracer_plugin import trace_dataset, wrap
from flowtracer_plugin.bulk import (
    chosen_pages,
    data_set,
    fingerprint as fingerprints,
    index,
    shards,
    tracing,
)
from flowtracer_plugin.bulk.chosen_pages import different_rows
from flowtracer_plugin.bulk.examples import Columns
from tests.bulk.stories import stories
from tests.tiny import tiny_llama, tiny_tokenizer

KILLS = 20


def run(tracer, folder, count=24, **options):
    return trace_dataset(tracer, stories(count), folder, **{"shard_size": 3, **options})


def files(folder):
    """Every finished shard's files with what would change if they were written again."""
    done = {path.name for path in folder.glob("answers/*.parquet")}
    found = [path for path in folder.glob("*/*.parquet") if path.name in done]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def assert_same(one, other):
    assert one.answers.equals(other.answers)
    assert one.tokens.equals(other.tokens)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The results of a run that nothing interrupted."""
    return run(tiny, tmp_path_factory.mktemp("whole") / "out", save_traces=True, pages=2)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_killed_at_any_time_it_goes_on_and_gives_the_same_tables(tiny, whole, tmp_path):
    """`kill -9` at random times; a process that is forked has all libraries loaded."""
    chance, fork = random.Random(7), multiprocessing.get_context("fork")
    kills = rounds = 0
    pace = 0.1
    while kills < KILLS:
        folder = tmp_path / f"out-{rounds}"
        before = files(folder)
        began = time.monotonic()
        child = fork.Process(target=run, args=(tiny, folder), kwargs=OPTIONS)
        child.start()
        child.join(chance.uniform(0, 3 * pace))
        if child.is_alive():
            child.kill()
            kills += 1
        child.join()
        after = files(folder)
        assert before.items() <= after.items(), "a finished shard was touched"
        pace = max(pace, (time.monotonic() - began) / max(1, len(after) - len(before)) / 2)
        if child.exitcode == 0:
            assert_same(ft.read_results(folder), whole)
            rounds += 1
        else:
            assert child.exitcode == -9
    folder = tmp_path / f"out-{rounds}"
    assert_same(run(tiny, folder, **OPTIONS), whole)
    assert not [path for path in folder.rglob(".*") if path.is_file()]
    assert sorted(path.name for path in folder.iterdir()) == [
        "answers",
        "index.html",
        "pages",
        "settings.json",
        "tokens",
        "traces",
    ]


OPTIONS = {"save_traces": True, "pages": 2}


def test_a_finished_shard_is_never_touched_and_an_unfinished_one_is_done_again(
    tiny, whole, tmp_path
):
    run(tiny, tmp_path / "out", **OPTIONS)
    last = tmp_path / "out" / "answers" / "00000007.parquet"
    last.unlink()  # its tokens are there, as after a crash between the two
    (tmp_path / "out" / "tokens" / ".0123456789abcdef.part").write_bytes(b"PAR1")
    assert len(ft.read_results(tmp_path / "out").answers) == 21
    assert not {21, 22, 23} & set(ft.read_results(tmp_path / "out").tokens["rollout"].to_pylist())
    before = files(tmp_path / "out")
    assert_same(run(tiny, tmp_path / "out", **OPTIONS), whole)
    after = files(tmp_path / "out")
    changed = {path.stem for path in after if before.get(path) != after[path]}
    assert changed == {"00000007"}
    assert not list((tmp_path / "out").rglob(".*.part"))  # what the crash has left


def test_parts_make_up_the_whole_and_may_come_in_any_order(tiny, whole, tmp_path):
    for part in (3, 1, 2):
        found = run(tiny, tmp_path / "out", shard=(part, 3), **OPTIONS)
    assert_same(found, whole)


@pytest.mark.parametrize(("rows", "wanted"), [(3, 8), (160, 8), (161, 9), (10**6, 100)])
def test_shards_are_small_where_data_are_few(rows, wanted):
    assert data_set.default_shard_size(rows) == wanted


def test_several_workers_give_the_same_tables(plain_model, tmp_path):
    one = run(partial(make_tracer, plain_model), tmp_path / "one", count=12)
    two = run(partial(make_tracer, plain_model), tmp_path / "two", count=12, workers=2)
    assert_same(one, two)


def make_tracer(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return wrap(model, AutoTokenizer.from_pretrained(folder), preset="paper", verify=False)


def test_a_worker_that_dies_is_named(plain_model, tmp_path):
    with pytest.raises(RuntimeError, match="a worker process has died"):
        run(partial(die, plain_model), tmp_path / "out", workers=2)


def die(_folder):
    os._exit(9)


def test_a_tracer_is_no_function_for_several_workers(tiny, tmp_path):
    with pytest.raises(ValueError, match="pass a function that makes one"):
        run(tiny, tmp_path / "out", workers=2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scores": ["entropy"]}, r"scores is \[\] there and \['entropy'\] now"),
        ({"shard_size": 5}, "shard_size is 3 there and 5 now"),
        ({"count": 25}, "24 rows, and the data have 25 now"),
        ({"max_new_tokens": 3}, "max_new_tokens is 256 there and 3 now"),
    ],
)
def test_other_settings_are_refused_before_the_model_is_made(whole, change, said):
    before = files(whole.folder)

    def make():
        raise AssertionError("the model was made")

    with pytest.raises(ValueError, match=f"{said}.*write to another folder"):
        run(make, whole.folder, **{**OPTIONS, **change})
    assert files(whole.folder) == before


def test_other_weights_and_options_are_refused(tiny, whole):
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 7] += 1e-3
    other = wrap(model, tiny_tokenizer(), mode="dense", preset="paper")
    with pytest.raises(ValueError, match=r"weights is '.{32}' there and '.{32}' now"):
        run(other, whole.folder, **OPTIONS)
    other = wrap(tiny.model, tiny.tokenizer, mode="dense", preset="sharp")
    with pytest.raises(ValueError, match=r"flow.target is 'answer' there and 'decision' now"):
        run(other, whole.folder, **OPTIONS)


def test_the_digest_of_weights_is_that_of_their_numbers(tiny):
    assert fingerprints.weights_digest(tiny_llama()) == fingerprints.weights_digest(tiny.model)
    half = tiny_llama().half()
    assert fingerprints.weights_digest(half) != fingerprints.weights_digest(tiny.model)


def test_of_several_processes_one_writes_the_settings(tmp_path):
    fingerprints.claim(tmp_path / "out", {"a": 1})
    fingerprints.claim(tmp_path / "out", {"a": 1})
    with pytest.raises(ValueError, match="a is 1 there and 2 now"):
        fingerprints.claim(tmp_path / "out", {"a": 2})
    assert json.loads((tmp_path / "out" / "settings.json").read_text()) == {"a": 1}


def test_folders_that_hold_something_else_are_left_alone(tiny, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files and no settings\.json"):
        run(tiny, tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json is damaged"):
        run(tiny, tmp_path)
    with pytest.raises(OSError, match="cannot write to the folder"):
        run(tiny, tmp_path / "notes.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "settings.json"]


def test_a_full_disk_says_what_to_do_and_loses_nothing(tiny, whole, tmp_path, monkeypatch):
    real = shards.write_atomically

    def write(path, content, **options):
        if path.stem == "00000002":
            raise OSError(28, "No space left on device")
        real(path, content, **options)

    monkeypatch.setattr(shards, "write_atomically", write)
    with pytest.raises(OSError, match=r"00000002\.parquet.*No space left.*make room, and run the"):
        run(tiny, tmp_path / "out", **OPTIONS)
    assert len(ft.read_results(tmp_path / "out").answers) == 6
    monkeypatch.undo()
    assert_same(run(tiny, tmp_path / "out", **OPTIONS), whole)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"shard": (0, 3)}, "the third of eight"),
        ({"shard": (4, 3)}, "the third of eight"),
        ({"shard_size": 0}, "shard_size must be at least 1"),
        ({"pages": -1}, "pages must be at least 0"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"limit": 0}, "there are no rows"),
    ],
)
def test_numbers_out_of_range_are_refused(tiny, tmp_path, option, said):
    with pytest.raises(ValueError, match=said):
        run(tiny, tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()


def test_traces_pages_and_the_list_are_written(whole):
    folder: Path = whole.folder
    assert len(list((folder / "traces").iterdir())) == 24
    trace = ft.load(folder / "traces" / "00000005.flow")
    assert (
        trace.tokens[3]
        == whole.tokens.filter(whole.tokens["rollout"].to_numpy() == 5)["text"][3].as_py()
    )
    assert [path.name for path in sorted((folder / "pages").iterdir())] == [
        "00000000.html",
        "00000001.html",
    ]
    listed = (folder / "index.html").read_text("utf-8")
    assert listed.count('<th scope="row"') == 24
    assert 'href="pages/00000001.html"' in listed
    assert "pages/00000002.html" not in listed


@pytest.mark.parametrize(("pause", "listed"), [(0, [3, 6, 7]), (10**9, [3, 3, 3])])
def test_the_list_is_written_while_shards_get_done_but_not_all_the_time(
    tiny, tmp_path, monkeypatch, pause, listed
):
    monkeypatch.setattr(index, "PAUSE", pause)
    path, found = tmp_path / "out" / "index.html", []

    def look(line):
        found.append(path.read_text("utf-8").count('<th scope="row"'))

    run(tiny, tmp_path / "out", count=7, say=look)
    assert found == listed
    assert path.read_text("utf-8").count('<th scope="row"') == 7


def test_each_shard_says_how_far_it_is(tiny, tmp_path):
    lines = []
    run(tiny, tmp_path / "out", count=7, say=lines.append)
    assert [line.partition(":")[0] for line in lines] == [f"shard {n} (of 3)" for n in range(3)]
    assert "3 rows, 0 with errors; " in lines[0]
    assert lines[-1].endswith(" rows/s, 0:00:00 left")


DIFFERENT = {"pages": 6, "pages_of": "different"}


def page_texts(folder):
    return {path.name: path.read_text("utf-8") for path in (folder / "pages").glob("*.html")}


def test_the_most_different_rollouts_get_pages_that_survive_a_crash(tiny, tmp_path, monkeypatch):
    """The pages are the same if they are written later, or some of them again."""
    found = run(tiny, tmp_path / "out", **DIFFERENT)
    pages = page_texts(found.folder)
    chosen = different_rows(found, 6)
    assert sorted(pages) == [f"{row:08}.html" for row in sorted(chosen)]
    right = found.answers["correct"].to_pylist()
    assert [right[row] for row in chosen] == [True, False] * 3
    listed = (found.folder / "index.html").read_text("utf-8")
    assert all(f'href="pages/{name}"' in listed for name in pages)
    for name in [*pages][::2]:  # as after a crash between two pages
        (found.folder / "pages" / name).unlink()
    before = files(found.folder)
    run(tiny, found.folder, **DIFFERENT)
    assert page_texts(found.folder) == pages
    assert files(found.folder) == before
    # Pages can be asked for once the tables are there, and more of them begin with the same rows.
    later = run(tiny, tmp_path / "later")
    assert not (later.folder / "pages").exists()
    run(tiny, later.folder, **DIFFERENT)
    assert page_texts(later.folder) == pages
    run(tiny, later.folder, **{**DIFFERENT, "pages": 9})
    more = page_texts(later.folder)
    assert len(more) == 9
    assert pages.items() < more.items()


def test_pages_of_the_first_rows_can_be_asked_for_later(tiny, whole, tmp_path):
    rows = [*stories(5), {"prompt": "", "response": "x"}]
    found = trace_dataset(tiny, rows, tmp_path / "out", shard_size=2, shard=(1, 2), pages=2)
    assert sorted(page_texts(found.folder)) == ["00000000.html", "00000001.html"]
    trace_dataset(tiny, rows, found.folder, shard_size=2, shard=(1, 2), pages=6)
    # Rows 2 and 3 are in the other part, and row 5 has no trace.
    wanted = [f"{row:08}.html" for row in (0, 1, 4)]
    assert sorted(page_texts(found.folder)) == wanted
    trace_dataset(tiny, rows, found.folder, shard_size=2, pages=6)
    assert sorted(page_texts(found.folder)) == [f"{row:08}.html" for row in range(5)]


def test_saved_traces_make_the_pages_without_a_model(tiny, tmp_path, monkeypatch):
    run(tiny, tmp_path / "out", save_traces=True, scores=["entropy"])
    monkeypatch.setattr(chosen_pages, "trace_rows", None)
    found = run(tiny, tmp_path / "out", save_traces=True, scores=["entropy"], **DIFFERENT)
    pages = page_texts(found.folder)
    assert sorted(pages) == [f"{row:08}.html" for row in sorted(different_rows(found, 6))]
    assert all("entropy" in text for text in pages.values())


def test_pages_wait_for_the_last_part(tiny, tmp_path):
    found = run(tiny, tmp_path / "out", shard=(1, 2), **DIFFERENT)
    assert page_texts(found.folder) == {}
    found = run(tiny, tmp_path / "out", shard=(2, 2), **DIFFERENT)
    assert len(page_texts(found.folder)) == 6


def test_different_pages_take_right_answers_and_wrong_ones(tiny, tmp_path):
    rows = [{key: row[key] for key in ("prompt", "response")} for row in stories(2)]
    with pytest.raises(ValueError, match=r"no row of the data has a right answer.*--answer-column"):
        trace_dataset(tiny, rows, tmp_path / "out", **DIFFERENT)
    assert not (tmp_path / "out").exists()
    found = trace_dataset(
        tiny, [{**row, "answer": "2"} for row in rows], tmp_path / "out", **DIFFERENT
    )
    assert found.answers["correct"].to_pylist() == [True, True]
    assert page_texts(tmp_path / "out") == {}
    with pytest.raises(ValueError, match="wanted pages_of 'first' or 'different', got 'best'"):
        run(tiny, tmp_path / "out", pages_of="best")


def test_answer_finders_of_one_name_are_told_apart(tmp_path):
    def made(place):
        def finder(text):
            found = text.rindex("2") if place == "last" else text.index("3")
            return found, found + 1

        return finder

    def other(text):
        return (0, 1)

    other.__name__ = "finder"
    first = wrap(tiny_llama(), tiny_tokenizer(), answer=made("last"), preset="paper")
    run(first, tmp_path / "out", 4)
    run(first, tmp_path / "out", 4)
    second = wrap(first.model, tiny_tokenizer(), answer=other, preset="paper")
    with pytest.raises(ValueError, match=r"answer is 'finder .* there and 'finder .* now"):
        run(second, tmp_path / "out", 4)


def test_what_a_crash_has_left_before_the_settings_is_no_other_file(tiny, whole, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / ".0123456789abcdef.part").write_bytes(b"{")
    assert_same(run(tiny, folder), whole)
    assert not [path for path in folder.rglob(".*") if path.is_file()]


def test_a_part_without_shards_says_so_before_the_model_is_made(tmp_path):
    with pytest.raises(ValueError, match="part 3 of 8 has nothing to trace: the data have only 2"):
        run(lambda: pytest.fail("made"), tmp_path / "out", 4, shard=(3, 8))


def test_other_numbers_of_rows_are_named_first(tiny, tmp_path):
    run(tiny, tmp_path / "out", 4)
    with pytest.raises(ValueError, match="holds results of 4 rows, and the data have 8 now"):
        run(tiny, tmp_path / "out", 8)


def test_settings_that_differ_are_named_without_the_others(tiny, tmp_path):
    rows = [{**one, "asked": one["prompt"]} for one in stories(3)]
    trace_dataset(tiny, rows, tmp_path / "out")
    with pytest.raises(ValueError, match=r"columns.prompt is 'prompt' there and 'asked' now; give"):
        trace_dataset(tiny, rows, tmp_path / "out", columns=Columns(prompt="asked"))


def test_settings_are_written_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    for settings in ({"a": 1}, {"a": 1}):
        fingerprints.claim(tmp_path / "out", settings)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["settings.json"]


def test_a_later_page_shows_the_answer_that_was_traced(tiny, tmp_path, monkeypatch):
    said = iter([" He had 3. 3 - 1 = 2.\nThe answer is 2.", " He ate 3.\nThe answer is 3."])

    def generate_many(model, prompts, *, tokenizer, max_new_tokens):
        answer = next(said)
        return [tokenizer(answer).input_ids for _ in prompts]

    monkeypatch.setattr(tracing, "generate_many", generate_many)
    rows = [{"prompt": stories(1)[0]["prompt"]}]
    trace_dataset(tiny, rows, tmp_path / "out")
    trace_dataset(tiny, rows, tmp_path / "out", pages=1)
    (page,) = page_texts(tmp_path / "out").values()
    assert "answer “2”" in page
    assert next(said).endswith("3.")
