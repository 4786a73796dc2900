import json
import re

import pytest

from examples.reasoner.problems import make_problems
from flowtracer_plugin.cli.audit import SCORERS
from flowtracer_plugin.credit.scorers import find_scorer
from tests.cli.command_line import assert_failed, in_a_process
from tests.documents.snippets import REASONER, ROOT

STORIES = ROOT / "examples" / "stories.jsonl"
QUICK = ("--prompts", "8", "--completions", "4", "--batches", "4", "--max-new-tokens", "52")
FEW = (*QUICK, "--scorers", "flow,entropy,random,attention:decision", "--oracle", r"= (\d+)")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("audit") / "results.jsonl"


@pytest.fixture
def audit(flowtracer, kept):
    """An audit that the first test runs, and that later ones read from its file."""
    return lambda *more: flowtracer("audit", REASONER, STORIES, *FEW, "--output", kept, *more)


def test_the_stories_are_those_of_the_reasoner():
    rows = [json.loads(line) for line in STORIES.read_text().splitlines()]
    made = make_problems(len(rows), seed=21, split="held_out")
    assert rows == [{"prompt": one.prompt, "answer": str(one.answer)} for one in made]


def test_an_audit_is_printed_as_json(audit):
    ran = audit("--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["prompts"] == 8
    assert 0 < found["mean_reward"] < 1
    names = [one["scorer"] for one in found["scorers"]]
    assert names == ["flow", "entropy", "random", "attention:decision", "oracle"]
    assert [one["gamma"] for one in found["scorers"][0]["differences"]] == [1.5, 3.0, None]
    assert found["settings"]["oracle"] == r"= (\d+)"
    for one in found["scorers"]:
        first = one["differences"][0]
        assert first["mean"] == pytest.approx(first["cosine"] - found["cosine"])
        assert first["low"] < first["mean"] < first["high"]


def test_a_table_for_another_gamma_needs_no_new_gradient(audit, kept):
    assert audit("--json").code == 0
    before = kept.read_text()
    ran = audit("--gamma", "2")
    assert ran.code == 0, ran.err
    assert kept.read_text() == before
    assert re.match(r"\d of 8 prompts got completions with different rewards", ran.out)
    assert "gamma 2 " in ran.out
    assert "only these" in ran.out
    scorers = ("flow", "entropy", "random", "attention:decision", "oracle", "uniform")
    rows = [line.split()[0] for line in ran.out.splitlines() if re.search(r"\d%", line)]
    assert sorted(rows) == sorted(scorers)
    assert "(5 scorers compared at gamma 2, p below 0.05 after Holm" in ran.out


def test_an_audit_continues_where_it_stopped(audit, kept):
    first = audit("--json")
    assert first.code == 0, first.err
    lines = kept.read_text().splitlines()
    kinds = [next(iter(json.loads(line))) for line in lines]
    assert kinds[:9] == ["format", *["group"] * 8]
    assert set(kinds[9:]) == {"batch"}
    kept.write_text("\n".join([*lines[:5], *lines[9:-1]]) + "\n" + lines[-1][:20])
    again = audit("--json")
    assert json.loads(again.out) == json.loads(first.out)
    assert sorted(kept.read_text().splitlines()) == sorted(lines)


def test_ctrl_c_says_what_is_kept_and_the_same_command_goes_on(flowtracer, tmp_path, monkeypatch):
    from flowtracer_plugin.audit import sampling

    real, path, calls = sampling.sample, tmp_path / "results.jsonl", []

    def stopped(*arguments, **options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments, **options)

    command = ("audit", REASONER, STORIES, *QUICK, "--scorers", "random", "--output", path)
    with monkeypatch.context() as patched:
        patched.setattr(sampling, "sample", stopped)
        ran = flowtracer(*command)
    assert (ran.code, ran.out) == (130, "")
    kept = f"stopped: 2 of 8 prompts and 0 of 4 batches are kept in {path}; the same command"
    assert kept in ran.said
    again = flowtracer(*command)
    assert again.code == 0
    assert again.err.startswith("prompt 3 of 8: row 2 sampled; 0:00:")
    times = r"\d:\d\d:\d\d so far, about 0:00:00 left"
    assert re.search(rf"gradient (\d+) of \1: row \d with every scorer; {times}", again.err)


def test_outputs_are_checked_before_the_model_is_loaded(audit, flowtracer, kept, monkeypatch):
    assert audit("--json").code == 0
    for name in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(f"flowtracer_plugin.model.loading.{name}", None)
    ran = audit("--seed", "3")
    assert ran.code == 1
    assert "holds results with other settings: seed is 0 there and 3 now" in ran.said
    ran = flowtracer("audit", REASONER, STORIES, *QUICK, "--output", "/dev/null/results")
    assert ran.code == 2
    assert "cannot write" in ran.said


def test_changed_prompts_are_refused(flowtracer, tmp_path):
    data, path = tmp_path / "data.jsonl", tmp_path / "results.jsonl"
    data.write_text(STORIES.read_text())
    command = ("audit", REASONER, data, *QUICK, "--scorers", "random", "--output", path)
    assert flowtracer(*command).code == 0
    data.write_text("\n".join(reversed(STORIES.read_text().splitlines())))
    ran = flowtracer(*command)
    assert ran.code == 1
    assert "holds row 0 with another prompt: the data have changed" in ran.said


def test_a_reward_may_be_a_users_own_and_gets_the_columns(flowtracer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "audit_rewards.py").write_text(
        "def near(completions, answer, level, **columns):\n"
        "    assert set(level) == {7}\n"
        "    return [len(one) % 3 for one in completions]\n"
    )
    data = tmp_path / "data.jsonl"
    rows = [json.loads(line) for line in STORIES.read_text().splitlines()[:8]]
    data.write_text("".join(json.dumps({**row, "level": 7}) + "\n" for row in rows))
    ran = flowtracer(
        "audit", REASONER, data, *QUICK, "--scorers", "random", "--reward", "audit_rewards.near"
    )
    assert ran.code == 0, ran.err


@pytest.mark.slow
def test_several_workers_sample_the_same_rollouts(audit, kept, tmp_path):
    def groups(path):
        return sorted(line for line in path.read_text().splitlines() if '{"group"' in line)

    assert audit("--json").code == 0
    command = ("audit", REASONER, STORIES, *QUICK, "--scorers", "random", "--workers", 2)
    ran = in_a_process(*command, "--output", tmp_path / "two.jsonl", OMP_NUM_THREADS="1")
    assert ran.code == 0, ran.err
    assert len(groups(kept)) == 8
    assert groups(tmp_path / "two.jsonl") == groups(kept)


def test_all_default_scorers_exist():
    assert [find_scorer(name).name for name in SCORERS.split(",")] == SCORERS.split(",")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--scorers", "love"), 2, "scorer must be one of flow, .*got 'love'"),
        (("--scorers", "oracle"), 2, "the scorer oracle needs a pattern"),
        (("--batches", "5"), 1, "batches must be an even number of at least 4, got 5"),
        (("--parameters", "love"), 1, "no trainable parameter has a name that matches 'love'"),
        (("--reward", "love"), 1, "there is no reward 'love'"),
        (("--top-fraction", "0"), 1, "top_fraction must be above 0"),
        (("--oracle", "("), 2, "'\\(' is no pattern: missing \\)"),
        (("--parameters", "["), 2, "is no pattern"),
        (("--answer", "love"), 2, "wanted auto, .* found 'love'"),
    ],
)
def test_mistakes_end_in_a_sentence(flowtracer, arguments, code, said):
    ran = flowtracer("audit", REASONER, STORIES, *QUICK, *arguments)
    assert ran.code == code
    assert re.search(said, ran.said)
    assert "Traceback" not in ran.err


def test_data_that_the_model_never_solves_are_refused(flowtracer, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(re.sub('"answer": "[^"]*"', '"answer": "-77"', STORIES.read_text()))
    ran = flowtracer("audit", REASONER, data, *FEW)
    assert ran.code == 1
    assert "among 8 prompts, none in one half got completions with different rewards" in ran.said


def test_prompts_end_before_the_assistants_turn(flowtracer, chat_model, tmp_path):
    data = tmp_path / "said.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]
    data.write_text(f"{json.dumps({'messages': turns, 'answer': '7'})}\n" * 8)
    assert_failed(
        flowtracer("audit", chat_model, data, *QUICK),
        1,
        "the messages end with one of the assistant",
    )
