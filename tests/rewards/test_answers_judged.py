"""Answers: which are equal, and that every judgement comes back."""

import doctest
import json
import logging
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from threading import Thread, Timer

import pytest

from flowtracer_plugin import rewards
from flowtracer_plugin.rewards import (
    algebra,
    judge,
    moments,
    numerals,
    referee,
    spelling,
    units,
    worker,
)
from flowtracer_plugin.rewards.judge import equal_answers

TABLE = tomllib.loads((Path(__file__).parent / "answer_pairs.toml").read_text(encoding="utf-8"))
ROOT = Path(__file__).parents[2]
CHILDREN = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")

# Each of these would take minutes, gigabytes or for ever.
ENDLESS = [
    r"9^{9^{9^{9}}}",
    r"(10^{10})!",
    r"\binom{10^9}{5 \cdot 10^8}",
    r"\sum_{k=1}^{10^{12}} 1/k",
    r"\prod_{k=1}^{10^9} (k^2 + 1)",
    r"\int_0^\infty \frac{\sin(x^3+\sqrt{x})}{\ln(x+2)} dx",
    r"x^{x^{x^{x^{100}}}}",
    "(" * 900 + "x",
    r"\frac{1}{" * 200,
    "{" + ",".join("{" + ",".join(f"x+{i * j}" for i in range(8)) + "}" for j in range(30)) + "}",
]
TOO_LONG = ["7" * 100_000, "{" * 100_000, "(" * 100_000, r"\frac{" * 100_000, "x+" * 50_000 + "x"]


@pytest.fixture
def pool(monkeypatch):
    """Workers of this test alone."""
    own = referee._Pool()
    monkeypatch.setattr(referee, "_pool", own)
    yield own
    own.close()


def pairs(kind):
    return [pair for section in TABLE.values() for pair in section.get(kind, [])]


@pytest.mark.parametrize(
    ("kind", "equal"), [("equal", True), ("unequal", False), ("undecided", False)]
)
def test_pairs_of_answers_are_judged_as_a_teacher_would(kind, equal):
    both = [pair for one, other, *_ in pairs(kind) for pair in ((one, other), (other, one))]
    wrong = [pair for pair in both if bool(equal_answers(*pair)) is not equal]
    assert wrong == []


def test_the_table_is_large_and_says_why_it_leaves_pairs_undecided():
    assert len(pairs("equal")) >= 300
    assert len(pairs("unequal")) >= 250
    assert len(pairs("undecided")) < 10
    assert all(len(pair) == 3 for pair in pairs("undecided"))


@pytest.mark.parametrize(
    ("gold", "completion", "reward"),
    [
        ("120", r"\boxed{5!}", 1.0),
        ("5", r"\boxed{5!}", 0.0),
        ("120", "The answer is $5!$.", 1.0),
        ("5", "The answer is 5!", 1.0),
        ("-5", r"\boxed{- 5}", 1.0),
        ("5", r"\boxed{- 5}", 0.0),
        ("-5", "The answer is - 5.", 1.0),
        ("5", "Answer:\n- 5", 1.0),
        ("-1", "The answer is i^2.", 1.0),
        ("2", "The answer is i^2.", 0.0),
        ("(-2, 3)", r"\boxed{x \in (-2, 3)}", 1.0),
        ("(-1,0) \\cup (0,1)", r"\boxed{(-1, 0) \cup (0, 1)}", 1.0),
        ("Paris", "The answer is Paris (the capital).", 1.0),
        ("7", "The answer is not 7.", 0.0),
        ("8", "The answer is not 7; it is 8.", 1.0),
        ("(1, 2)", r"The answer is \begin{pmatrix}1\\2\end{pmatrix}.", 1.0),
        (
            r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
            r"Answer: $\begin{bmatrix}1&2\\3&4\end{bmatrix}$",
            1.0,
        ),
        (
            r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
            r"Answer: $\begin{bmatrix}1&2\\3&5\end{bmatrix}$",
            0.0,
        ),
    ],
)
def test_what_is_found_keeps_the_signs_that_change_its_value(gold, completion, reward):
    assert rewards.math_answer([completion], [gold]) == [reward]


def test_every_answer_equals_itself():
    texts = {text for kind in ("equal", "unequal") for pair in pairs(kind) for text in pair[:2]}
    assert [text for text in texts - {""} if not equal_answers(text, text)] == []


@pytest.mark.parametrize("gold", ["", " ", r"\text{ }", "x" * 2001])
def test_a_right_answer_that_cannot_be_read_judges_nothing(gold):
    assert equal_answers(gold, "7") is None


def refused(caplog):
    return [record.getMessage() for record in caplog.records]


def test_thinking_that_the_prompt_opened_has_no_answer():
    said = ["It is 7", "It is 8</think>7", "It is 7"]
    prompts = ["3 + 4?<think>\n", "3 + 4?<think>\n", "3 + 4?"]
    assert rewards.math_answer(said, ["7"] * 3, prompts=prompts) == [0.0, 1.0, 1.0]


def test_what_takes_for_ever_is_refused_counted_and_costs_nothing_else(caplog):
    said = [rf"\boxed{{{text}}}" for text in ENDLESS[:5]] + [r"\boxed{x+x}", r"\boxed{7}"]
    logged = []
    found = rewards.math_answer(
        said, ["2x"] * len(said), log_metric=lambda *metric: logged.append(metric)
    )
    assert found == [0.0] * 5 + [1.0, 0.0]
    assert logged == [("math_answer/refused", 5 / 7)]
    assert refused(caplog) == [
        "math_answer refused 5 of 7 answers, which take too long to judge: they earn 0"
    ]


@pytest.mark.parametrize("gold", ["2x", "7"])
def test_no_judgement_is_endless_in_any_thread(gold):
    found = {}

    def judged(name):
        found[name] = [outcome(gold, text) for text in [*ENDLESS, "x+x"]]

    threads = [Thread(target=judged, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    judged("main")
    right = [gold == "2x"]
    for outcomes in found.values():
        assert set(map(str, outcomes[:-1])) <= {"refused", "False"}
        assert outcomes[-1:] == right
    assert len(found) == 4


@pytest.mark.skipif(not CHILDREN.exists(), reason="this system does not list a process's children")
def test_a_judgement_that_a_busy_machine_holds_up_is_awaited(pool):
    assert outcome("2x", "x+x") is True
    (serving,) = children(pool._parent._process.pid)
    (judging,) = children(serving)
    os.kill(judging, signal.SIGSTOP)
    resume = Timer(1.0, os.kill, (judging, signal.SIGCONT))
    resume.start()
    assert outcome("2x", "x+x") is True
    assert not resume.is_alive()


def children(process):
    listed = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(pid) for pid in listed.split()]


def outcome(gold, said):
    try:
        return referee.verdict(gold, said)
    except referee.RefusedError:
        return "refused"


def test_long_texts_earn_nothing_and_are_no_reference():
    found = rewards.math_answer([rf"\boxed{{{text}}}" for text in TOO_LONG], ["7"] * 5)
    assert found == [0.0] * 5
    assert rewards.math_answer([r"\boxed{7}"] * 5, TOO_LONG) == [None] * 5


def test_a_reference_that_takes_for_ever_is_no_reference(caplog):
    golds = [r"9^{9^{9^{9}}}", r"\sum_{k=1}^{10^{12}} 1/k", "7"]
    assert rewards.math_answer([r"\boxed{7}"] * 3, golds) == [None, None, 1.0]
    assert not caplog.records


def test_numbers_words_and_choices_start_no_process(pool, monkeypatch, caplog):
    monkeypatch.setattr(subprocess, "Popen", None)
    golds = ["1,234.5", "(B)", "March 5, 2024", "5 km", "Paris", r"\frac{1}{2}", "(1, 2)"]
    said = ["1234.5", "B) Paris", "2024-03-05", "5000 m", "paris", "0.5", "(5, 2)"]
    found = [referee.verdict(*pair) for pair in zip(golds, said, strict=True)]
    assert found == [True] * 6 + [False]
    assert not caplog.records


def test_where_no_process_can_be_started_this_one_judges(pool, monkeypatch, caplog):
    def refuse(*_, **__):
        raise PermissionError("no processes here")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert outcome("2x", "x+x") is True
    assert outcome("2x", "x+1") is False
    assert outcome("2x", r"9^{9^{9^{9}}}") == "refused"
    (message,) = refused(caplog)
    assert "no process can be started to judge answers" in message


def test_a_python_that_does_not_start_is_not_tried_again(pool, monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", "/bin/true")
    assert [outcome("2x", "x+x"), outcome("3x", "x+2x")] == [True, True]
    assert len(refused(caplog)) == 1


def test_without_fork_a_late_worker_is_killed_and_another_one_started(pool, monkeypatch):
    monkeypatch.setattr(worker, "FORKS", False)
    assert outcome("2x", "x+x") is True
    first = pool._idle[0]._process
    assert outcome("2x", r"\sum_{k=1}^{10^{12}} 1/k") == "refused"
    assert first.poll() is not None
    assert outcome("2x", "x+x") is True
    assert pool._idle[0]._process.pid != first.pid


def test_a_dead_worker_is_replaced_and_nothing_is_left_behind(pool):
    assert outcome("2x", "x+x") is True
    for _ in range(2):
        dead = pool._parent._process
        dead.kill()
        dead.wait()
        pool._idle.pop().stop()
        assert outcome("2x", "x+x") is True
        assert pool._parent._process.pid != dead.pid
    last = pool._parent._process
    pool.close()
    assert last.returncode == -9


def test_all_that_wait_may_be_killed_at_once(pool):
    connections = [pool._worker() for _ in range(3)]
    for connection in connections:
        connection._socket.shutdown(2)
    pool._idle.extend(connections)
    assert outcome("2x", "x+x") is True
    assert len(pool._idle) == 1


def test_the_worker_is_started_ahead_and_awaited_when_it_is_needed(pool):
    pool.start()
    first = pool._parent
    assert first is not None
    pool.start()
    assert outcome("2x", "x+x") is True
    assert pool._parent is first


def test_a_connection_that_breaks_is_replaced_at_once(pool):
    assert outcome("2x", "x+x") is True
    pool._idle[0]._socket.shutdown(2)
    assert outcome("2x", "x+x") is True


def test_an_interrupt_leaves_no_answer_for_the_next_question(pool, monkeypatch):
    assert outcome("2x", "x+x") is True
    asked = pool._idle[0]
    receive = asked._socket.settimeout

    def interrupted(seconds):
        receive(seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(asked), "judge", lambda *_: interrupted(1.0))
    with pytest.raises(KeyboardInterrupt):
        referee.verdict("2x", "x+x")
    monkeypatch.undo()
    assert asked not in pool._idle


NAMED = """
import sys
started = []
sys.addaudithook(lambda event, args: event == "subprocess.Popen" and started.append(str(args)))
import flowtracer_plugin.rewards.named as named
from flowtracer_plugin.rewards import math_flow, reasoning_share
from flowtracer_plugin.rewards.named import *
import flowtracer_plugin.grpo.script
dir(named), hasattr(named, "nothing"), hasattr(named, "save")
print(sum("flowtracer_plugin.rewards.worker" in one for one in started))
from flowtracer_plugin.rewards import math_answer
assert named.math_answer is math_answer is named.named_reward("math_answer")
print(sum("flowtracer_plugin.rewards.worker" in one for one in started))
"""


@pytest.mark.skipif(not worker.FORKS, reason="this system cannot fork")
def test_only_the_reward_for_right_answers_starts_a_process():
    ran = subprocess.run(
        [sys.executable, "-c", NAMED],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ran.stdout == "0\n1\n", ran.stderr


SCRIPT = """
import os, sys
from flowtracer_plugin.rewards import referee

worker = referee._pool._parent._process.pid
assert referee.verdict("2x", "x+x") is True
child = os.fork()
if not child:
    right = referee.verdict("3x", "x+2x") is True
    shared = referee._pool._parent._process.pid == worker
    referee._pool.close()
    os._exit(0 if right and shared else 1)
assert os.waitpid(child, 0)[1] == 0
assert referee.verdict("2x", "x+1") is False
assert referee._pool._parent._process.pid == worker
assert not {"torch", "sympy", "numpy"} & set(sys.modules)
print(referee._pool._parent._process.pid, flush=True)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(not worker.FORKS, reason="this system cannot fork")
@pytest.mark.parametrize("end", ["exit", "kill"])
def test_a_fork_shares_the_worker_that_does_not_outlive_its_process(end):
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, end],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ran.stderr == ""
    assert ran.returncode == (0 if end == "exit" else -9)
    left = int(ran.stdout)
    for _ in range(200):
        try:
            os.kill(left, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{left}/stat").exists() and " Z " in Path(f"/proc/{left}/stat").read_text():
            return  # it has ended, and the init of this system has not noticed
        subprocess.run(["sleep", "0.05"], check=True)
    raise AssertionError("the worker outlived its process")


def test_the_worker_refuses_what_it_cannot_compute():
    def answer(*request):
        return json.loads(worker.judged(json.dumps([*request, 1.0]).encode()))

    assert answer("2x", "x+x") is True
    assert answer("2x", "x+1") is False
    assert answer("", "7") is None
    assert answer("2x", "9^{9^{9^9}}") == "refused"
    assert answer("2x", "(" * 1000 + "x") == "refused"


@pytest.mark.parametrize("module", [algebra, judge, moments, numerals, spelling, units])
def test_examples(module):
    assert doctest.testmod(module).failed == 0


@pytest.fixture(autouse=True)
def _warnings(caplog):
    caplog.set_level(logging.WARNING)
