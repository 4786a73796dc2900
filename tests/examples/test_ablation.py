"""The runs of the ablation, its gate, and its grid, which continues where it stopped."""

import json
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from examples.ablation import __main__ as command, audits, gate, grid, house, report
from examples.ablation.grid import Run, make, run_all, start_of
from examples.ablation.plan import ARMS, PLAN, TASKS, TUNED, plan_of
from examples.ablation.pupil import teach
from examples.ablation.runs import credit_of, rewards_of
from tests.examples.records import oracle_gains, record

SMALL = replace(PLAN, steps=3, prompts=2, completions=4, audited=8, warmup=0)


def test_arms_differ_from_the_papers_credit_in_their_options_and_share_alone():
    paper = {"scorer": "flow", "side": "top", "top_fraction": 0.4, "gamma": 1.5}
    for arm in (*ARMS, *TUNED):  # their options are those of the records, see below
        credit = asdict(credit_of(house.HOUSE, arm))
        wanted = paper | {"top_fraction": 0.2} | arm.credit
        assert wanted == {name: credit[name] for name in paper}
    assert next(arm for arm in ARMS if arm.name == "flow").options == {
        "scorer": "flow", "top_fraction": 0.4,
    }  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_no_seed_is_used_for_two_things(task):
    plan = plan_of(task)
    every = [*plan.seeds, *plan.tuning_seeds, *plan.gate_seeds]
    assert len(set(every)) == len(every)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    torch.set_num_threads(1)
    teach(house.HOUSE, start_of("house", folder), steps=2)
    return folder


def drawn(completion, _problem):
    """A reward that even an untaught policy gets, and that differs between texts."""
    return sum(map(ord, completion)) % 97 / 97


def a_run(arm, seed=0):
    return Run(task="house", stage="compare", arm=arm, seed=seed, learning_rate=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_a_run_depends_on_its_arm_its_seed_and_its_rate_alone(folder, monkeypatch):
    seen = set()

    def noted(completion, problem):
        seen.add(problem.prompt)
        return drawn(completion, problem)

    task = replace(house.HOUSE, is_solved=noted)
    arms = {arm.name: arm for arm in ARMS}

    def rewards(arm, seed=0, rate=0.02):
        options = {"seed": seed, "learning_rate": rate, "start": start_of("house", folder)}
        return rewards_of(task, arms[arm], SMALL, **options)

    uniform = rewards("uniform")
    assert len(uniform) == SMALL.steps
    assert len(seen) == SMALL.steps * SMALL.prompts  # none twice
    monkeypatch.setattr(grid, "TASKS", {"house": task})
    run = replace(a_run("uniform"), learning_rate=0.02)
    make(run, SMALL, folder)
    record = json.loads(run.file(folder).read_text())
    assert record.pop("seconds") > 0
    assert record == {**asdict(run), "rewards": [round(one, 6) for one in uniform]}
    assert set(report.KEPT) == set(record)
    others = {arm: rewards(arm) for arm in ("faster", "flow", "oracle")}
    others["slow"] = rewards("uniform", rate=1e-3)
    for found in others.values():
        assert found[0] == uniform[0]  # the same prompts, policy and draws, until the first update
    assert len({tuple(found[1:]) for found in [uniform, *others.values()]}) == 5
    assert rewards("uniform", seed=1) != uniform


@pytest.mark.filterwarnings("ignore")
def test_an_audit_weighs_what_each_arm_does(folder):
    task = replace(house.HOUSE, is_solved=drawn)
    summary = audits.audited(task, SMALL, start_of("house", folder))
    found = {one.scorer: one for one in summary.scorers}
    assert set(found) == {arm.name for arm in ARMS} - {"uniform", "faster"}
    for arm in set(found) - {"oar", "oracle"}:  # oar weighs all tokens, in sum by 1 each
        share = 0.4 if arm == "flow" else 0.2
        # none chooses anything in a completion without an answer
        assert found[arm].chosen <= share + 0.03
    assert found["oar"].chosen == pytest.approx(0, abs=1e-3)
    assert found["shuffled"].chosen == found["reach_derivation"].chosen
    assert summary.batches >= 2


def test_the_facts_about_a_task_take_the_factor_of_each_arm(monkeypatch):
    def difference(gamma):
        return SimpleNamespace(gamma=gamma, mean=gamma / 100, error=0.001)

    scorers = [
        SimpleNamespace(scorer=arm.name, chosen=0.2, differences=[difference(1.5), difference(2.0)])
        for arm in ARMS
    ]
    monkeypatch.setattr(audits, "accuracy", lambda *_, **__: 0.3)
    monkeypatch.setattr(audits, "audited", lambda *_: SimpleNamespace(scorers=scorers))
    found = audits.known(house.HOUSE, PLAN, "start")["audit"]
    assert {arm for arm, one in found.items() if one["cosine"] == 0.02} == {"oar"}
    assert audits.GAMMAS == (1.5, 2.0)


def test_an_accuracy_is_the_share_that_is_solved(folder, monkeypatch):
    monkeypatch.setattr(audits, "ASKED", 64)
    start = start_of("house", folder)
    assert audits.accuracy(house.HOUSE, start, greedy=True) == 0  # two steps teach nothing
    everything = replace(house.HOUSE, is_solved=lambda *_: True)
    assert audits.accuracy(everything, start, greedy=False) == 1


# --- the gate ---


@pytest.mark.parametrize(
    ("cosine", "gain", "passed"),
    [(0.041, 0.011, True), (0.039, 0.011, False), (0.041, 0.009, False)],
)
def test_the_gate_asks_for_both_a_turned_gradient_and_a_gain(cosine, gain, passed):
    audit = {"oracle": {"cosine": cosine, "error": 0.01}}
    found = gate.gate_of(oracle_gains(gain), "house", audit)
    assert found.gain.mean == pytest.approx(gain)
    assert found.passed is passed


@pytest.mark.parametrize("passed", [True, False])
def test_arms_are_compared_only_behind_the_gate(tmp_path, monkeypatch, passed):
    stages = []

    def pretend(runs, *_):
        stages.append((runs[0].stage, {run.arm for run in runs}))
        gain = 0.05 if passed else 0.0
        extra = {"uniform": 0.0, "oracle": gain}
        return [
            record(one.arm, one.seed, 0.5 + 0.01 * (one.seed % 7) + extra.get(one.arm, 0)
                   + 0.001 * (one.seed % 3) * (one.arm == "oracle"), one.stage, one.learning_rate)
            for one in runs
        ]  # fmt: skip

    monkeypatch.setattr(command, "run_all", pretend)
    audit = {"oracle": {"cosine": 1.0, "error": 0.01}}
    monkeypatch.setattr(command, "look", lambda *_: {"audit": audit})
    command.ablate("house", PLAN, tmp_path, workers=1)
    assert stages[:2] == [("tune", {"uniform", "random"}), ("gate", {"uniform", "oracle"})]
    assert stages[2:] == ([("compare", {arm.name for arm in ARMS})] if passed else [])


# --- the grid ---


@pytest.fixture
def counted(monkeypatch):
    """A grid of quick runs in this process."""
    made = []

    def pretend(run, plan, folder):
        if run.seed in made_to_fail:
            raise RuntimeError("the machine went away")
        made.append(run)
        run.file(folder).parent.mkdir(parents=True, exist_ok=True)
        run.file(folder).write_text(json.dumps({"seed": run.seed}))

    made_to_fail = set()
    monkeypatch.setattr(grid, "make", pretend)
    monkeypatch.setattr(grid, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    return made, made_to_fail


def test_a_grid_makes_what_is_missing_and_nothing_twice(tmp_path, counted):
    made, _ = counted
    runs = [a_run(arm, seed) for seed in (0, 1) for arm in ("uniform", "flow")]
    run_all(runs[:3], PLAN, tmp_path, workers=1)
    assert made == runs[:3]
    records = run_all(runs, PLAN, tmp_path, workers=1)
    assert made == runs
    assert [one["seed"] for one in records] == [0, 0, 1, 1]


def test_runs_made_before_an_error_stay_and_the_error_names_its_run(tmp_path, counted):
    made, made_to_fail = counted
    made_to_fail.add(1)
    runs = [a_run("flow", seed) for seed in (0, 1, 2)]
    with pytest.raises(RuntimeError, match="went away") as caught:
        run_all(runs, PLAN, tmp_path, workers=1)
    assert "seed=1" in caught.value.__notes__[0]
    before = len(made)
    made_to_fail.clear()
    run_all(runs, PLAN, tmp_path, workers=1)
    assert sorted(run.seed for run in made) == [0, 1, 2]
    assert before in (1, 2)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_error_for_a_dead_worker_says_what_to_do(tmp_path, monkeypatch):
    # A forked worker need not import everything again; it dies before it computes anything.
    monkeypatch.setattr(grid, "get_context", lambda _: multiprocessing.get_context("fork"))
    with pytest.raises(RuntimeError, match=r"worker process died.*fewer --workers"):
        list(grid._made([Killed()], PLAN, tmp_path, 1))


class Killed:
    """A run that ends its process."""

    @property
    def task(self):
        os._exit(1)


def test_a_folder_of_another_recipe_is_refused(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    taught = []

    def barely(task, start):
        taught.append(task.name)
        return teach(task, start, steps=1)

    monkeypatch.setattr(command, "teach", barely)
    monkeypatch.setattr(command, "POLICIES", tmp_path / "none")
    monkeypatch.setattr(command, "known", lambda *_: {"audit": {}})
    held = command.look("house", PLAN, tmp_path)
    assert held == command.look("house", replace(PLAN, seeds=(0, 1, 2)), tmp_path)
    assert taught == ["house"]
    assert held["recipe"]["arms"]["faster"]["learning_rate"] == 1.2
    assert held["recipe"]["arms"]["reach_derivation"]["top_fraction"] == 0.2
    with pytest.raises(ValueError, match=r"another recipe: steps differ.*another folder"):
        command.look("house", SMALL_STEPS, tmp_path)
    weights = start_of("house", tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="another recipe: policy differ"):
        command.look("house", PLAN, tmp_path)


@pytest.mark.parametrize("task", command.TASKS)
def test_runs_start_from_the_policy_that_the_repository_has(task, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "known", lambda *_: {"audit": {}})
    monkeypatch.setattr(command, "teach", None)
    command.look(task, PLAN, tmp_path)
    weights = (start_of(task, tmp_path) / "model.safetensors").read_bytes()
    assert weights == (command.POLICIES / task / "model.safetensors").read_bytes()


SMALL_STEPS = replace(PLAN, steps=2)


@pytest.mark.parametrize("seeds", ["1", "85", "-3"])
def test_too_few_seeds_and_seeds_of_the_tuning_are_refused(seeds, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ablation", "--seeds", seeds])
    with pytest.raises(SystemExit):
        command.main()
    assert f"wanted 2 to 84, found {seeds}" in capsys.readouterr().err
