"""What a training run shows of its credit: the table of completions and the pages of groups."""

from __future__ import annotations

import math
import os

import pandas
import pytest

from flowtracer_plugin.grpo import FlowGRPOTrainer
from tests.grpo.trained import ANSWERS, TEXTS, answering, name_of, words
from tests.grpo.worker import build, word_tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")]


@pytest.mark.parametrize(
    "options",
    [{}, {"num_iterations": 2}, {"steps_per_generation": 2, "gradient_accumulation_steps": 2}],
    ids=name_of,
)
def test_the_table_of_completions_has_the_answers_beside_their_completions(
    policy, tmp_path, options
):
    answering(
        policy, tmp_path, [TEXTS[0], TEXTS[1], TEXTS[3]], log_completions=True, max_steps=2,
        **options,
    ).train()  # fmt: skip
    (*_, last) = sorted((tmp_path / "out" / "completions").glob("*.parquet"))
    table = pandas.read_parquet(last)
    tokenizer = word_tokenizer()
    for _, row in table.iterrows():
        said = words(row["completion"])
        place = ANSWERS[TEXTS.index(row["completion"])]
        assert row["flow_answer"] == tokenizer.decode([said[place]])
        share = math.ceil(0.4 * len(said)) / len(said)
        assert row["flow_weight"] == pytest.approx(1 + 0.5 * share, abs=0.51 / len(said))
        assert 0 <= row["flow_prompt_jump"] <= 1
    assert len(table) >= 4


def test_columns_of_the_table_have_one_length_after_evaluation(policy, tmp_path):
    trainer = build(
        FlowGRPOTrainer, policy, tmp_path, log_completions=True, max_steps=2,
        per_device_eval_batch_size=2,
    )  # fmt: skip
    trainer.eval_dataset = trainer.train_dataset.select(range(4))
    for _ in range(2):
        trainer.evaluate()
        columns = trainer._logs["extra"].values()
        assert {len(column) for column in columns} == {len(trainer._logs["prompt"])}
        trainer.train()


@pytest.mark.parametrize(
    "options",
    [{}, {"num_iterations": 2}, {"steps_per_generation": 2, "gradient_accumulation_steps": 2}],
    ids=name_of,
)
def test_a_page_shows_the_group_of_the_first_prompt(policy, tmp_path, options):
    answering(policy, tmp_path, max_steps=4, flow_page_steps=2, **options).train()
    folder = tmp_path / "out" / "flow"
    names = sorted(path.name for path in folder.glob("step_*.html"))
    assert names[0] == "step_000000.html"
    assert len(names) == 2
    assert (folder / "index.html").exists()
    page = (folder / names[0]).read_text("utf-8")
    assert "<dt>Scorer</dt>" in page
    assert "gamma 1.5; 40.0\N{NO-BREAK SPACE}% of a completion’s tokens are chosen" in page


def test_pages_can_be_left_out_and_limited(policy, tmp_path):
    build(FlowGRPOTrainer, policy, tmp_path, flow_page_steps=0).train()
    assert not (tmp_path / "out" / "flow").exists()
    build(
        FlowGRPOTrainer, policy, tmp_path, max_steps=4, flow_page_steps=1, flow_page_limit_mb=0.0
    ).train()
    assert len(list((tmp_path / "out" / "flow").glob("step_*.html"))) == 1


@pytest.mark.parametrize("chosen", ["auto", "training"])
def test_the_table_is_right_with_an_evaluation_inside_a_generation(policy, tmp_path, chosen):
    texts = [TEXTS[0], TEXTS[1], TEXTS[3]]
    answering(
        policy, tmp_path, texts, log_completions=True, flow_pass=chosen, max_steps=4,
        steps_per_generation=4, gradient_accumulation_steps=1, per_device_eval_batch_size=2,
        eval_strategy="steps", eval_steps=2, eval_dataset=True,
    ).train()  # fmt: skip
    tables = sorted((tmp_path / "out" / "completions").glob("*.parquet"))
    rows = pandas.concat(map(pandas.read_parquet, tables))
    known = rows[rows["flow_answer"].notna()]
    assert len(known) > 4
    for _, row in known.iterrows():
        said = word_tokenizer()(row["completion"])["input_ids"]
        place = ANSWERS[TEXTS.index(row["completion"])]
        assert row["flow_answer"] == word_tokenizer().decode([said[place]])


@pytest.mark.parametrize(
    ("every", "iterations", "wanted"), [(2, 3, [0, 3, 6, 9]), (5, 4, [0, 8]), (1, 1, range(12))]
)
def test_a_page_is_written_for_the_first_generation_of_each_interval(
    policy, tmp_path, every, iterations, wanted
):
    answering(
        policy, tmp_path, max_steps=12, flow_page_steps=every, num_iterations=iterations
    ).train()
    names = sorted(path.name for path in (tmp_path / "out" / "flow").glob("step_*.html"))
    assert names == [f"step_{step:06d}.html" for step in wanted]


def test_training_continues_when_a_page_cannot_be_written(policy, tmp_path, caplog):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "flow").write_text("a file")
    build(FlowGRPOTrainer, policy, tmp_path).train()
    assert "the page of step 0 could not be written" in caplog.text


def test_the_oldest_page_is_deleted_first_whatever_its_step(policy, tmp_path):
    folder = tmp_path / "out" / "flow"
    folder.mkdir(parents=True)
    before = folder / "step_000900.html"
    before.write_text("x" * 10_000)
    os.utime(before, (1, 1))
    answering(policy, tmp_path, max_steps=2, flow_page_steps=1, flow_page_limit_mb=0.1).train()
    assert not before.exists() or sum(p.stat().st_size for p in folder.glob("step_*")) < 1e5
    assert (folder / "step_000001.html").exists()
