"""What must not end a training run: rows with strange text, and whatever only shows."""

from __future__ import annotations

import re

import pandas
import pytest
import torch
from trl import GRPOTrainer

from flowtracer_plugin.grpo import (
    CreditOptions,
    FlowGRPOTrainer,
    attach_flow_credit,
    log,
    pages,
)
from flowtracer_plugin.grpo.hooks import WEIGHTS
from flowtracer_plugin.text.spans import FinderError
from tests.families import tiny_model
from tests.grpo.test_trainer import score
from tests.grpo.trained import TEXTS, logged, same_parameters, words
from tests.grpo.worker import WORDS, build, word_tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")]

UNKNOWN = len(WORDS)
"""The first id of the padded embedding, which the tokenizer does not know."""

ASKED = "3 plus 4 is"
ROWS = [
    (words(ASKED), words(TEXTS[0])),
    ([5], words(TEXTS[1])),  # a prompt of one token
    ([0, 1], words(TEXTS[1])),  # of special tokens
    ([UNKNOWN, UNKNOWN + 1], words(TEXTS[3])),  # of unknown ids
    (words(ASKED), [UNKNOWN, *words("so 3 then 7"), UNKNOWN + 1]),
    (words(ASKED), [UNKNOWN]),
    (words(ASKED), [1]),  # the end token alone
    (words(ASKED), words("so 9 then 5")),
]


@pytest.fixture(scope="module")
def padded_policy(tmp_path_factory):
    """The folder of a policy with a padded embedding."""
    folder = tmp_path_factory.mktemp("padded")
    tiny_model("llama", vocab_size=len(WORDS) + 2).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def given(rows):
    """A `rollout_func` that gives these rows in turn."""

    def rollout(prompts, trainer):
        chosen = [rows[place % len(rows)] for place in range(len(prompts))]
        asked, said = map(list, zip(*chosen, strict=True))
        return {"prompt_ids": asked, "completion_ids": said, "logprobs": None}

    return rollout


def made(policy, folder, rows=ROWS, *, credit=None, **options):
    settings = {"per_device_train_batch_size": 8, **options}
    kind = FlowGRPOTrainer if credit is None else GRPOTrainer
    trainer = build(kind, policy, folder, rollout_func=given(rows), **settings)
    return trainer if credit is None else attach_flow_credit(trainer, CreditOptions(**credit))


def found_weights(trainer, rows=8):
    return score(trainer, rows)[0][WEIGHTS]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_iterations": 2},
        {"flow_pass": "extra", "flow_no_answer": "last"},
        {"flow_scorer": "grad_x_input"},
        {"flow_scorer": "coupled"},
        {"flow_scorer": "flow:sharp*entropy"},
        {"flow_scorer": "flow:causal:2*causal:2"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
def test_rows_with_strange_text_train(padded_policy, tmp_path, options):
    trainer = made(padded_policy, tmp_path, log_completions=True, flow_page_steps=1, **options)
    trainer.train()
    assert set(logged(trainer, "errors")) == {0.0}
    page = (tmp_path / "out" / "flow" / "step_000000.html").read_text()
    assert "apples" in page
    (first, *_) = sorted((tmp_path / "out" / "completions").glob("*.parquet"))
    assert pandas.read_parquet(first)["flow_answer"][4] == "7"


def test_a_page_shows_unknown_ids(padded_policy, tmp_path):
    rows = [([UNKNOWN, *words(ASKED)], [*words("so 7"), UNKNOWN + 1])] * 2
    made(padded_policy, tmp_path, rows, max_steps=1).train()
    page = (tmp_path / "out" / "flow" / "step_000000.html").read_text()
    assert f"&lt;|unknown {UNKNOWN}|&gt;" in page
    assert f"&lt;|unknown {UNKNOWN + 1}|&gt;" in page


def test_strange_rows_change_no_other_row(padded_policy, tmp_path):
    usual = [ROWS[0], ROWS[7]]
    alone = found_weights(made(padded_policy, tmp_path, usual), rows=2)
    found = found_weights(made(padded_policy, tmp_path))
    width = alone.shape[1]
    assert torch.equal(found[[0, 7], :width], alone)
    assert len(found[4].unique()) == 2  # flow passes to its answer between unknown ids
    assert found[[5, 6]].unique().tolist() == [1.0]


def failing(text):
    if "9 then" in text:
        raise KeyError("no such answer")
    *_, last = re.finditer(r"\d+", text)
    return last.span()


def failing_oracle(text):
    if "9 then" in text:
        raise KeyError("no such token")
    return [found.span() for found in re.finditer("plus|is", text)]


@pytest.mark.parametrize(
    "credit",
    [
        {"answer": failing},
        {"answer": failing, "scorer": "surprisal"},  # which needs no answer
        {"scorer": "oracle", "oracle": failing_oracle},
    ],
    ids=["answer", "answer of surprisal", "oracle"],
)
@pytest.mark.parametrize("options", [{}, {"num_iterations": 2}], ids=["training", "scoring"])
def test_a_finder_that_fails_costs_one_row(policy, tmp_path, credit, options, caplog):
    rows = [ROWS[0], ROWS[7]]
    trainer = made(policy, tmp_path, rows, credit={**credit, "on_error": "uniform"})
    found = found_weights(trainer, rows=4)
    assert found[[0, 2]].unique().tolist() == [1.0, 1.5]
    assert found[[1, 3]].unique().tolist() == [1.0]
    assert trainer._metrics["train"]["flow/errors"] == [1.0]
    caplog.clear()
    run = made(
        policy, tmp_path, rows, credit={**credit, "on_error": "uniform"}, max_steps=3,
        log_completions=True, **options,
    )  # fmt: skip
    run.train()
    told = [record for record in caplog.records if "flow credit failed" in record.message]
    assert len(told) == 1
    assert "a completion got plain credit" in told[0].message
    raising = made(policy, tmp_path, rows, credit=credit)
    with pytest.raises(FinderError, match="raised KeyError: 'no such") as raised:
        raising.train()
    assert "completion" in raised.value.__notes__[0]
    assert "flow_on_error='uniform'" in raised.value.__notes__[0]


def test_a_missing_answer_is_an_error_only_where_the_finder_works(policy, tmp_path):
    credit = {"answer": failing, "on_error": "uniform", "no_answer": "raise"}
    found = found_weights(made(policy, tmp_path, [ROWS[0], ROWS[7]], credit=credit), rows=4)
    assert found[0].unique().tolist() == [1.0, 1.5]


@pytest.mark.parametrize(
    "scorer", ["flow", "attention", "rollout", "coupled", "entropy", "shuffled"]
)
def test_numbers_that_are_not_finite_cost_one_row(policy, tmp_path, scorer):
    rows = [ROWS[0], (words(ASKED), words("so 1 apples then 9")), ROWS[7], ROWS[0]]
    settings = {"flow_scorer": scorer, "flow_on_error": "uniform"}
    trainer = made(policy, tmp_path, rows, **settings)
    found_weights(trainer, rows=4)  # the model is checked before it breaks
    embedding = trainer.model.get_input_embeddings().weight
    with torch.no_grad():
        before = embedding[words("1")[0]].clone()
        whole = found_weights(trainer, rows=4)
        embedding[words("1")[0]] = torch.nan
        found = found_weights(trainer, rows=4)
        assert found[1].unique().tolist() == [1.0]
        assert torch.equal(found[[0, 2, 3]], whole[[0, 2, 3]])
        assert trainer._metrics["train"]["flow/errors"] == [1.0]
        embedding[words("1")[0]] = before


SHOWS = {
    "the prompt of a page": (pages, "decode_tokens"),
    "the rewards of a page": (pages, "_rewards"),
    "a page": (pages, "write_group_page"),
    "the index": (pages, "write_index"),
    "the table": (log, "_answer_texts"),
    "the metrics": (log, "_sums"),
}


SHOWING = {"max_steps": 3, "flow_page_steps": 1, "log_completions": True}


@pytest.fixture(scope="module")
def good(policy, tmp_path_factory):
    """A run in which everything can be shown."""
    trainer = build(FlowGRPOTrainer, policy, tmp_path_factory.mktemp("good"), **SHOWING)
    trainer.train()
    return trainer


@pytest.mark.parametrize("where", SHOWS)
def test_nothing_that_only_shows_ends_a_run(policy, good, tmp_path, monkeypatch, caplog, where):
    def failing(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*SHOWS[where], failing)
    trainer = build(FlowGRPOTrainer, policy, tmp_path, **SHOWING)
    trainer.train()
    assert same_parameters(trainer, good)
    told = [record for record in caplog.records if "the run goes on" in record.message]
    assert len(told) == 1
    assert "No space left on device" in str(told[0].exc_info[1])


def test_every_error_of_a_page_is_caught(policy, tmp_path, monkeypatch, caplog):
    class OddError(Exception):
        pass

    def failing(*_, **__):
        raise OddError("a page that raises anything")

    monkeypatch.setattr(pages, "write_group_page", failing)
    build(FlowGRPOTrainer, policy, tmp_path, max_steps=3, flow_page_steps=1).train()
    assert caplog.text.count("could not be written") == 1


def test_foreign_files_among_the_pages_stay_and_hinder_nothing(policy, tmp_path, caplog):
    folder = tmp_path / "out" / "flow"
    (folder / "step_folder.html").mkdir(parents=True)
    (folder / "step_gone.html").symlink_to(tmp_path / "nowhere")
    (folder / "step_notes.html").write_text("mine")
    build(FlowGRPOTrainer, policy, tmp_path, flow_page_steps=1, flow_page_limit_mb=1e-6).train()
    assert "could not be written" not in caplog.text
    assert (folder / "step_notes.html").read_text() == "mine"
    assert sorted(page.name for page in folder.glob("step_0*")) == ["step_000001.html"]
    assert (folder / "index.html").is_file()
