"""The benchmarks of training and of FlashTrace, at sizes that take seconds."""

import inspect
import sys

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import data_sets, grpo_step, harness
from benchmarks.elsewhere import Elsewhere, UnbearableError
from benchmarks.models import pretrained
from benchmarks.texts import solution
from examples.reasoner.train import MODEL_DIR
from flowtracer_plugin.grpo import FlowGRPOConfig
from flowtracer_plugin.trace.tracer import FlowTracer
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

# The values of TRL's fields do not match their types, which the tests' type checks refuse.
FlowGRPOConfig.__init__ = inspect.unwrap(FlowGRPOConfig.__init__)

TOKENS = 52  # the reasoner would end earlier if it could
OBEYS = """
import os, sys, time
print('{"ok": null}', flush=True)
for line in sys.stdin:
    if sys.argv[1] == "killed": os.kill(os.getpid(), 9)
    if sys.argv[1] == "fails": raise SystemExit(3)
    if sys.argv[1] == "slow": time.sleep(60)
    answer = {"full": '{"unbearable": "needs more than 1 GiB of memory"}'}.get(sys.argv[1])
    print(answer or f'{{"ok": {3.5 if line.strip() == "peak" else "null"}}}', flush=True)
"""
"""A process as `Elsewhere` expects it, or one that fails in the given way."""


def elsewhere(how, limit=30.0):
    return Elsewhere([sys.executable, "-c", OBEYS, how], limit=limit)


@pytest.mark.parametrize("tokens", [60, 61, 200])
def test_a_solution_has_the_exact_number_of_tokens_and_ends_with_its_answer(tokens):
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    text = solution(tokenizer, tokens)
    assert len(text.prompt_ids) == tokens // 4
    assert len(text.prompt_ids) + len(text.response_ids) == tokens
    assert tokenizer.encode(text.response, add_special_tokens=False) == text.response_ids[:-1]
    assert text.response_ids[-1] == tokenizer.eos_token_id
    first, last = text.answer
    assert first == last == len(text.response_ids) - 3  # before the brace and the end
    assert text == solution(tokenizer, tokens)


def test_a_text_that_a_tokenizer_cannot_make_is_refused():
    with pytest.raises(ValueError, match="cannot make a text of exactly 41 tokens"):
        solution(tiny_tokenizer(), 164)


def test_a_way_in_another_process_is_measured_there():
    way = elsewhere("works")
    way()
    assert harness.peak_of(way) == 3.5
    first = way._process.pid
    assert harness.seconds_of(way) > 0
    assert way._process.pid == first
    assert way.close() == 0


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("slow", "took more than 1 s"),
        ("killed", "was killed, as the system does when memory runs out"),
        ("full", "needs more than 1 GiB of memory"),
    ],
)
def test_an_unbearable_way_is_noted_and_the_others_go_on(how, reason):
    ways = {"good": lambda: None, "bad": elsewhere(how, limit=1.0)}
    samples = harness.interleaved(ways, 2)
    assert samples["bad"] == reason
    assert len(samples["good"]) == 2
    seconds, peaks, notes = harness._bearable(samples, {"good": 1.0})
    row = harness._row("good", {}, seconds, peaks, notes)
    assert set(row["seconds"]) == {"good"}
    assert row["notes"] == [f"bad: {reason}"]
    if how == "full":
        ways["bad"].close()


def test_a_process_that_took_too_long_starts_again():
    way = elsewhere("slow", limit=0.5)
    for _ in range(2):
        with pytest.raises(UnbearableError, match="took more than"):
            way()


def test_a_failing_process_is_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="failed with code 3"):
        elsewhere("fails")()


def test_a_missing_model_says_what_to_set(monkeypatch, tmp_path):
    monkeypatch.delenv("FLOWTRACER_MODELS", raising=False)
    with pytest.raises(SystemExit, match="set FLOWTRACER_MODELS to the folder that holds it"):
        pretrained("some-model")
    monkeypatch.setenv("FLOWTRACER_MODELS", str(tmp_path))
    with pytest.raises(SystemExit, match="FLOWTRACER_MODELS holds no"):
        pretrained("some-model")
    (tmp_path / "some-model").mkdir()
    assert pretrained("some-model") == tmp_path / "some-model"


class Counted:
    """Counts forward passes of a trainer's model, and notices changed weights."""

    def __init__(self, trainer):
        self.model, self.forwards = trainer.model, 0
        self.before = [p.detach().clone() for p in self.model.parameters()]
        self.model.register_forward_pre_hook(self.count)

    def count(self, *_):
        self.forwards += 1

    @property
    def trained(self):
        pairs = zip(self.before, self.model.parameters(), strict=True)
        return any(not torch.equal(old, new) for old, new in pairs)


@pytest.mark.parametrize(
    ("read", "more", "steps"), [("training", 0, 1), ("scoring", 0, 2), ("extra", 1, 1)]
)
def test_two_trainers_do_equal_work_except_for_the_credit(monkeypatch, read, more, steps):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    ways = grpo_step.ways(model="reasoner", tokens=TOKENS, read=read, rollouts=8)
    for way in ways.values():
        way()
    counted = {name: Counted(way.trainer) for name, way in ways.items()}
    samples = harness.interleaved(ways, 1)
    assert counted["with"].trained
    assert counted["without"].trained
    assert counted["with"].forwards == counted["without"].forwards + 2 * more
    rollouts = [way.trainer._buffered_inputs[0] for way in ways.values()]
    assert torch.equal(*(batch["completion_ids"] for batch in rollouts))
    assert rollouts[0]["completion_ids"].shape == (8, TOKENS)
    assert all(batch["completion_mask"].all() for batch in rollouts)
    assert [way.trainer.state.global_step for way in ways.values()] == [3 * steps, 3 * steps]
    ratios, notes = grpo_step.aside(ways, samples)
    assert ratios["credit"]["without"] > 0
    assert ratios["logged"]["without"] > 0
    assert "an answer was found in" in notes[0]
    for way in ways.values():
        way.close()


def test_the_extra_pass_runs_alone():
    ways = grpo_step.ways(model="reasoner", tokens=TOKENS, read="extra alone", rollouts=8)
    for way in ways.values():
        way()
    assert grpo_step.aside(ways, {}) == ({}, [])


def test_a_clock_counts_only_while_it_is_on(monkeypatch):
    now = iter([1.0, 3.0, 8.0, 9.0, 20.0])
    monkeypatch.setattr(grpo_step, "perf_counter", lambda: next(now))
    clock = grpo_step.Clock()
    with clock.set(True), clock.set(False):  # on from 1 to 3, and from 8 to 9
        pass
    assert clock.seconds == 2.0 + 1.0


def test_the_ways_through_a_data_set_trace_the_same_rows(monkeypatch):
    seen = []
    real = data_sets.ft.trace_dataset

    def trace_dataset(source, data, folder, *, shard_size, workers):
        found = real(source, data, folder, shard_size=shard_size)
        seen.append((workers, isinstance(source, FlowTracer), found.answers.num_rows, shard_size))
        return found

    monkeypatch.setattr(data_sets.ft, "trace_dataset", trace_dataset)
    ways = data_sets.ways(model=data_sets.REASONER, rows=9)
    for way in ways.values():
        way()
    assert seen == [(1, True, 9, 1), (2, False, 9, 1)]
