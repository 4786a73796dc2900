"""The ablation: its tasks, its runs and grid, its gate, and its tables, which match the records."""

import json
import math
import multiprocessing
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from examples.ablation import __main__ as command, audits, countdown, gate, grid, house, report
from examples.ablation.grid import Run, make, run_all, start_of
from examples.ablation.plan import ARMS, PLAN, TASKS, settled
from examples.ablation.pupil import teach, tokenizer_of
from examples.ablation.runs import credit_of, rewards_of

RESULTS = Path(house.__file__).parent / "results"
SMALL = replace(PLAN, steps=3, prompts=2, completions=4, audited=8, warmup=0)
BOTH = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def problems(task, count=200, seed=1):
    rng = random.Random(seed)
    return [task.draw(rng) for _ in range(count)]


def demonstrations(task, count=200, seed=2):
    rng = random.Random(seed)
    return [(problem, task.demonstrate(problem, rng)) for problem in problems(task, count)]


# --- the tasks ---


@BOTH
def test_a_text_is_one_token_for_each_word_and_none_is_unknown(task):
    tokenizer = tokenizer_of(task)
    lengths = set()
    for problem, said in demonstrations(task):
        ids = tokenizer.encode(problem.prompt + said)
        assert len(ids) == 1 + len((problem.prompt + said).split())
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == problem.prompt + said
        lengths.add((len(problem.prompt.split()), len(said.split())))
        assert len(said.split()) + 1 <= task.max_new_tokens
    assert len(lengths) == 1  # so imitation needs no padding


@BOTH
def test_a_pupil_is_sometimes_right_and_its_answer_is_found(task):
    solved = [task.is_solved(said, problem) for problem, said in demonstrations(task, 600)]
    assert 0.25 < np.mean(solved) < 0.6
    for _, said in demonstrations(task, 20):
        found = task.answer.search(said)
        assert said.endswith(found[1])
        words = said[said.index(" answer") :].split()
        assert len(words) + 1 == task.answer_tokens  # and the end token


@BOTH
def test_a_truncated_completion_is_not_solved_and_nothing_in_it_matters(task):
    for problem, said in demonstrations(task, 20):
        assert not task.is_solved(said[:40], problem)
        assert task.what_matters(said[:40]) == []
        assert not task.is_solved(said + " answer", problem)


def test_in_the_house_the_answer_is_where_the_doors_lead():
    for problem in problems(house.HOUSE):
        asked = re.search(r"Where is (\w+) \?", problem.prompt)[1]
        way = re.search(rf"{asked} (\w+) (\w+) (\w+)", problem.prompt).groups()
        room = way[0]
        for door in way[1:]:
            room = house.LEADS[room, door]
        assert problem.answer == f"{asked} {room}"
        assert house.is_solved(f" … answer {asked} {room}", problem)
        assert not house.is_solved(f" … answer {asked} roof", problem)


def test_in_the_house_steps_follow_from_each_other_and_are_wrong_as_learned():
    wrong = total = 0
    for problem, said in demonstrations(house.HOUSE, 400):
        at = dict(re.findall(r"(\w+) (\w+) \w+ \w+ [,.]", problem.prompt))
        for person, door, room in re.findall(r"(\w+) (\w+) = (\w+)", said):
            wrong += room != house.LEADS[at[person], door]
            total += 1
            at[person] = room
    expected = house.LEARNED_WRONG * house.SAID_WRONG + house.SLIP / 2
    assert wrong / total == pytest.approx(expected, abs=0.08)


def test_in_the_house_the_steps_of_the_person_asked_for_and_the_answer_matter():
    for problem, said in demonstrations(house.HOUSE, 50):
        asked = problem.answer.split()[0]
        matters = "".join(said[start:end] for start, end in house.what_matters(said)).split()
        steps = [words for words in re.findall(r"\w+ \w+ = \w+", said) if words.startswith(asked)]
        assert matters == " ".join(steps).split() + said.split()[-3:]
        assert len(steps) == house.STEPS


def test_in_countdown_every_sum_is_true_and_a_solution_makes_the_target():
    for problem, said in demonstrations(countdown.COUNTDOWN):
        numbers = problem.prompt.split()[1:4]
        sums = re.findall(r"(-?\d+) ([+-]) (\d+) = (?=(-?\d+))", said)
        assert len(sums) == 2 * len(countdown.TRIES)
        for first, sign, second, result in sums:
            assert int(first) + int(sign + second) == int(result)
        words = said.split()
        expression = words[words.index("answer") + 2 :]
        assert expression[::2] == numbers
        value = sum(int(one) for one in re.findall(r"[+-]?\d+", "".join(expression)))
        assert countdown.is_solved(said, problem) == (value == int(problem.answer))


@pytest.mark.parametrize(
    "said",
    [
        " answer two 3 + 5",  # not all numbers
        " answer two 5 + 3 - 2",  # another order
        " answer two 3 + 5 - 2 + 2",  # one too many
        " two 3 + 5 = 8 - 2 = 6",  # no answer
        "",
    ],
)
def test_in_countdown_an_expression_of_other_numbers_is_no_solution(said):
    problem = countdown.Problem(prompt="Numbers 3 5 2 make 6 .", answer="6")
    assert countdown.is_solved(" answer two 3 + 5 - 2", problem)
    assert not countdown.is_solved(said, problem)


def test_in_countdown_the_named_try_and_the_answer_matter():
    said = " one 3 + 5 = 8 - 2 = 6 two 3 - 5 = -2 + 2 = 0 three 3 + 5 = 8 + 2 = 10 answer two 3 - 5"
    parts = [said[start:end] for start, end in countdown.what_matters(said)]
    assert parts == [" two 3 - 5 = -2 + 2 = 0", " answer two 3 - 5"]
    assert countdown.what_matters(" answer two 3 - 5") == [(0, 17)]


# --- the runs ---


def test_arms_differ_from_the_papers_credit_in_their_options_alone():
    paper = {"scorer": "flow", "side": "top", "top_fraction": 0.4, "gamma": 1.5}
    for arm in ARMS:  # their options are those of the records, see below
        credit = asdict(credit_of(house.HOUSE, arm))
        assert paper | arm.credit == {name: credit[name] for name in paper}


def test_no_seed_is_used_for_two_things():
    every = [*PLAN.seeds, *PLAN.tuning_seeds, *PLAN.gate_seeds]
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
    assert record == {**asdict(run), "rewards": pytest.approx(uniform, abs=1e-6)}
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
    shares = {"product": 0.1, "entropy": 0.2, "flow": 0.4, "bottom": 0.4, "random": 0.4}
    for arm, share in shares.items():
        # flow chooses nothing in a completion without an answer
        assert found[arm].chosen <= share + 0.03
    assert found["random"].chosen == pytest.approx(0.4, abs=0.03)
    assert found["entropy"].chosen == pytest.approx(0.2, abs=0.03)
    assert summary.batches >= 2


def test_an_accuracy_is_the_share_that_is_solved(folder, monkeypatch):
    monkeypatch.setattr(audits, "ASKED", 64)
    start = start_of("house", folder)
    assert audits.accuracy(house.HOUSE, start, greedy=True) == 0  # two steps teach nothing
    everything = replace(house.HOUSE, is_solved=lambda *_: True)
    assert audits.accuracy(everything, start, greedy=False) == 1


# --- the gate ---


def oracle_gains(gain):
    """Pairs whose differences have a spread of 0.001."""
    runs = []
    for seed in range(8):
        base = 0.5 + 0.01 * seed
        runs.append(record("uniform", seed, base, "gate"))
        runs.append(record("oracle", seed, base + gain + 0.001 * (-1) ** seed, "gate"))
    return runs


@pytest.mark.parametrize(
    ("cosine", "gain", "passed"),
    [(0.041, 0.021, True), (0.039, 0.021, False), (0.041, 0.019, False)],
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
    assert stages[:2] == [("tune", {"uniform"}), ("gate", {"uniform", "oracle"})]
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
    monkeypatch.setattr(command, "known", lambda *_: {"audit": {}})
    held = command.look("house", PLAN, tmp_path)
    assert held == command.look("house", replace(PLAN, seeds=(0, 1, 2)), tmp_path)
    assert taught == ["house"]
    assert held["recipe"]["arms"]["faster"]["learning_rate"] == 1.2
    with pytest.raises(ValueError, match=r"another recipe: steps differ.*another folder"):
        command.look("house", SMALL_STEPS, tmp_path)
    weights = start_of("house", tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="another recipe: policy differ"):
        command.look("house", PLAN, tmp_path)


SMALL_STEPS = replace(PLAN, steps=2)


@pytest.mark.parametrize("seeds", ["1", "101", "-3"])
def test_too_few_seeds_and_seeds_of_the_tuning_are_refused(seeds, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ablation", "--seeds", seeds])
    with pytest.raises(SystemExit):
        command.main()
    assert f"wanted 2 to 100, found {seeds}" in capsys.readouterr().err


# --- the tables ---


def record(arm, seed, reward, stage="compare", rate=1e-3):
    return {
        "task": "house", "stage": stage, "arm": arm, "seed": seed,
        "learning_rate": rate, "rewards": [reward, reward + 0.2],
    }  # fmt: skip


def planted(seeds=10):
    """Records in which the oracle gains 0.05, sharp 0.004, and larger steps lose 0.1."""
    noise = np.random.default_rng(0).normal(0, 1, (len(ARMS), seeds))
    noise = 0.005 * (noise - noise.mean(1, keepdims=True)) / noise.std(1, ddof=1, keepdims=True)
    gains = {"oracle": 0.05, "sharp": 0.004, "faster": -0.1}
    return [
        record(arm.name, seed, 0.5 + 0.02 * seed + (arm.name != "uniform") * noise[place, seed]
               + gains.get(arm.name, 0))
        for place, arm in enumerate(ARMS)
        for seed in range(seeds)
    ]  # fmt: skip


AUDIT = {arm.name: {"cosine": 0.03, "error": 0.004, "chosen": 0.31} for arm in ARMS}


def test_paired_differences_are_those_of_the_textbook():
    ours, others = [0.5, 0.7, 0.6, 0.9], [0.4, 0.65, 0.62, 0.7]
    differences = [a - b for a, b in zip(ours, others, strict=True)]
    mean = sum(differences) / 4
    spread = math.sqrt(sum((one - mean) ** 2 for one in differences) / 3)
    reach = student.ppf(0.975, 3) * spread / 2
    found = gate.paired(ours, others)
    assert found.mean == pytest.approx(mean)
    assert (found.low, found.high) == pytest.approx((mean - reach, mean + reach))
    assert found.size == pytest.approx(mean / spread)
    assert found.chance == pytest.approx(2 * student.sf(mean / spread * 2, 3))


def test_the_table_shows_the_planted_differences():
    rows = report.table(planted(), "house", AUDIT).splitlines()[2:]
    cells = {row.split(" | ")[0].strip("| "): row.strip("|").split("|")[1:] for row in rows}
    assert len(cells) == len(ARMS)
    plain, oracle = cells["plain GRPO"], cells["what matters, as the task knows it"]
    assert [cell.strip() for cell in plain[:4]] == ["0.690", "", "", ""]
    assert plain[4].strip() == "+0.100 (+0.096 to +0.104)"
    assert oracle[0].strip() == "0.740"
    assert oracle[1].strip() == "+0.050 (+0.046 to +0.054)"
    assert oracle[2].strip() == "+10.00"
    assert oracle[3].strip() == "< 0.001"
    assert oracle[5].strip() == "31%"
    assert oracle[6].strip() == "+0.030 ± 0.004"
    # p = 0.03 alone, but not significant among ten comparisons
    sharp = cells["flow, preset `sharp`"]
    t = 0.004 / (0.005 / math.sqrt(10))
    assert 2 * student.sf(t, 9) < 0.05 < float(sharp[3])
    assert float(sharp[3]) == pytest.approx(8 * 2 * student.sf(t, 9), abs=0.001)


def test_a_seed_that_an_arm_lacks_is_left_out_of_all():
    runs = [one for one in planted() if (one["arm"], one["seed"]) != ("flow", 3)]
    assert {len(curve) for curve in gate.compared(runs, "house").values()} == {9}
    assert {len(curve) for curve in gate.compared([], "house").values()} == {0}


@pytest.mark.parametrize(("at_2", "chosen"), [(0.6, 2e-3), (0.591, 2e-3), (0.589, 4e-3)])
def test_the_learning_rate_is_the_lowest_within_an_error_of_the_best_for_plain_grpo(at_2, chosen):
    tuned = [
        record("uniform", seed, reward, "tune", rate)
        for seed, shift in ((0, -0.01), (1, 0.01))  # a standard error of 0.01
        for rate, reward in ((4e-3, 0.6 + shift), (2e-3, at_2 + shift), (1e-3, 0.5))
    ]
    assert gate.best_rate(tuned, "house") == chosen


def files_of(runs, known, folder):
    for task in known:
        (folder / task).mkdir(parents=True)
        (folder / task / "task.json").write_text(json.dumps(known[task]))
    for one in runs:
        run = Run(**{name: one[name] for name in ("task", "stage", "arm", "seed", "learning_rate")})
        run.file(folder).parent.mkdir(parents=True, exist_ok=True)
        run.file(folder).write_text(json.dumps({**one, "seconds": 1.0}))


def test_a_report_covers_a_folder_and_can_be_made_again_from_its_records(tmp_path):
    gates = oracle_gains(0.05)
    tuned = [
        record("uniform", seed, 0.5 + seed / 100, "tune", rate)
        for seed, rate in product(PLAN.tuning_seeds, PLAN.learning_rates)
    ]
    runs = [*planted(), *gates, *tuned]
    others = [{**one, "task": "countdown"} for one in gates[1:]]  # an unfinished gate
    known = {"greedy": 0.3, "sampled": 0.4, "audit": AUDIT}
    files_of(runs + others, {"house": known, "countdown": known}, tmp_path / "runs")
    out, again = tmp_path / "out", tmp_path / "again"
    report.write_report(*report.found_in(tmp_path / "runs"), out)
    text = (out / "README.md").read_text()
    assert "| house | 0.30 | 0.40 |" in text
    assert "| countdown | 0.30 | 0.40 | not finished |" in text
    assert "## House: 10 of 16 planned seeds" in text
    assert "## Countdown" not in text
    report.write_report(*report.found_in(out), again)
    for file in out.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()
    assert {file.name for file in out.iterdir()} == {
        "README.md", "house.svg", "runs.jsonl", "tasks.json",
    }  # fmt: skip


# --- the records in the repository ---


def test_tables_and_plots_in_the_repository_match_its_records(tmp_path):
    report.write_report(*report.found_in(RESULTS), tmp_path)
    made = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert made == {file.name: file.read_bytes() for file in RESULTS.iterdir()}


def test_records_in_the_repository_match_its_plan():
    records, tasks = report.found_in(RESULTS)
    assert set(tasks) == set(TASKS)
    plan = json.loads(json.dumps(settled(PLAN)))
    for task, known in tasks.items():
        assert {name: known["recipe"][name] for name in plan} == plan
        assert 0.3 <= round(known["greedy"], 2) <= 0.5
        runs = [one for one in records if one["task"] == task]
        assert {len(one["rewards"]) for one in runs} == {PLAN.steps}
        tuned = {(one["seed"], one["learning_rate"]) for one in runs if one["stage"] == "tune"}
        assert tuned == set(product(PLAN.tuning_seeds, PLAN.learning_rates))
        rate = gate.best_rate(records, task)
        rest = [one for one in runs if one["stage"] != "tune"]
        assert {one["learning_rate"] for one in rest} == {rate}
        gates = {(one["arm"], one["seed"]) for one in rest if one["stage"] == "gate"}
        assert gates == set(product(("uniform", "oracle"), PLAN.gate_seeds))
        found = {(one["arm"], one["seed"]) for one in rest if one["stage"] == "compare"}
        every = set(product((arm.name for arm in ARMS), PLAN.seeds))
        assert found == (every if gate.gate_of(records, task, known["audit"]).passed else set())


def shown(value):
    return f"{value:+.3f}".replace("-", "−")


@pytest.mark.parametrize(
    ("document", "arms"),
    [
        ("README.md", ("flow", "oracle")),
        ("docs/ablation.md", ("flow", "oracle", "sharp", "product")),
    ],
)
def test_the_documents_say_what_the_records_say(document, arms):
    text = (RESULTS.parents[2] / document).read_text().replace("\n  ", " ")
    records, _ = report.found_in(RESULTS)
    means = {arm: curve.mean(1) for arm, curve in gate.compared(records, "house").items()}
    over = {arm: gate.paired(means[arm], means["uniform"]) for arm in means if arm != "uniform"}
    for arm in arms:
        one = over[arm]
        assert shown(one.mean) in text
        assert f"{shown(one.low)} to {shown(one.high)}" in text
    assert {arm for arm, found in over.items() if found.chance < 0.05} == {"oracle"}


def test_the_page_says_of_gate_and_spread_what_the_records_say():
    text = (RESULTS.parents[2] / "docs" / "ablation.md").read_text().replace("\n  ", " ")
    records, tasks = report.found_in(RESULTS)
    for task in TASKS:
        assert shown(gate.gate_of(records, task, tasks[task]["audit"]).gain.mean) in text
    assert not gate.gate_of(records, "countdown", tasks["countdown"]["audit"]).passed
    curves = gate.compared(records, "house")
    spread = (curves["flow"].mean(1) - curves["uniform"].mean(1)).std(ddof=1)
    assert f"the spread was {spread:.3f}" in text
    collapsed = {}
    for arm, runs in curves.items():
        means = np.array([np.convolve(run, np.ones(7) / 7, "valid") for run in runs])
        falls = np.maximum.accumulate(means, axis=1) - means
        collapsed[arm] = int((falls.max(1) > 0.3).sum())
    some = {"flow": 1, "sharp": 1, "shuffled": 1, "product": 1, "random": 2, "faster": 3}
    assert collapsed == dict.fromkeys(curves, 0) | some
