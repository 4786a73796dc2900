"""The ablation's tables, plots and documents, which match its records."""

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t as student

from examples.ablation import gate, report
from examples.ablation.grid import Run
from examples.ablation.plan import ARMS, PLAN, TASKS, TUNED, plan_of, settled
from tests.examples.records import oracle_gains, record

RESULTS = Path(report.__file__).parent / "results"


def planted(seeds=10):
    """Records in which the oracle gains 0.05, one hop 0.004, and larger steps lose 0.1."""
    noise = np.random.default_rng(0).normal(0, 1, (len(ARMS), seeds))
    noise = 0.005 * (noise - noise.mean(1, keepdims=True)) / noise.std(1, ddof=1, keepdims=True)
    gains = {"oracle": 0.05, "one_hop": 0.004, "faster": -0.1}
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
    assert found.median == pytest.approx((0.05 + 0.1) / 2)
    assert (found.low, found.high) == pytest.approx((mean - reach, mean + reach))
    assert found.size == pytest.approx(mean / spread)
    assert found.p == pytest.approx(2 * student.sf(mean / spread * 2, 3))


def test_the_table_shows_the_planted_differences():
    rows = report.table(planted(), "house", AUDIT).splitlines()[2:]
    cells = {row.split(" | ")[0].strip("| "): row.strip("|").split("|")[1:] for row in rows}
    assert len(cells) == len(ARMS)
    plain, oracle = cells["plain GRPO"], cells["what matters, as the task knows it"]
    assert [cell.strip() for cell in plain[:5]] == ["0.690", "", "", "", ""]
    assert plain[5].strip() == "+0.100 (+0.096 to +0.104)"
    assert oracle[0].strip() == "0.740"
    assert oracle[1].strip() == "+0.050 (+0.046 to +0.054)"
    assert float(oracle[2]) == pytest.approx(0.05, abs=0.005)
    assert oracle[3].strip() == "+10.00"
    assert oracle[4].strip() == "< 0.001"
    assert oracle[6].strip() == "31%"
    assert oracle[7].strip() == "+0.030 ± 0.004"
    assert cells["OAR-G, all tokens weighed"][6].strip() == "all, weighed"
    # p = 0.03 alone, but not significant among eleven comparisons
    one_hop = cells["attention of the answer, one hop"]
    t = 0.004 / (0.005 / math.sqrt(10))
    assert 2 * student.sf(t, 9) < 0.05 < float(one_hop[4])
    assert float(one_hop[4]) == pytest.approx(9 * 2 * student.sf(t, 9), abs=0.001)


def test_a_seed_that_an_arm_lacks_is_left_out_of_all():
    runs = [one for one in planted() if (one["arm"], one["seed"]) != ("flow", 3)]
    assert {len(curve) for curve in gate.compared(runs, "house").values()} == {9}
    assert {len(curve) for curve in gate.compared([], "house").values()} == {0}


@pytest.mark.parametrize(
    ("at_2", "scatter", "chosen"),
    [(0.591, 0.01, 2e-3), (0.589, 0.01, 4e-3), (0.6, 0.03, 4e-3), (0.61, 0.03, 4e-3)],
)
def test_of_the_best_learning_rates_the_one_with_the_least_scatter_is_taken(at_2, scatter, chosen):
    plain = {4e-3: 0.6, 2e-3: at_2, 1e-3: 0.5}
    spread = {4e-3: 0.02, 2e-3: scatter, 1e-3: 0.0}
    tuned = [
        record(arm, seed, plain[rate] + 0.01 * sign + chance * spread[rate] * sign, "tune", rate)
        for seed, sign in ((0, -1), (1, 1))  # a standard error of 0.01
        for rate in plain
        for arm, chance in (("uniform", 0), ("random", 1))
    ]
    others = [{**one, "task": "program", "rewards": [1.0, 1.0]} for one in tuned]
    assert gate.best_rate(tuned + others, "house") == chosen


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
        record(arm.name, seed, 0.5 + seed / 100, "tune", rate)
        for arm, seed, rate in product(TUNED, PLAN.tuning_seeds, PLAN.learning_rates)
    ]
    runs = [*planted(), *gates, *tuned]
    others = [{**one, "task": "program"} for one in gates[1:]]  # an unfinished gate
    known = {"greedy": 0.3, "sampled": 0.4, "audit": AUDIT}
    files_of(runs + others, {"house": known, "program": known}, tmp_path / "runs")
    out, again = tmp_path / "out", tmp_path / "again"
    report.write_report(*report.found_in(tmp_path / "runs"), out)
    text = (out / "README.md").read_text()
    assert "| house | 0.30 | 0.40 |" in text
    assert "| program | 0.30 | 0.40 | not finished |" in text
    assert "## House: 10 of 16 planned seeds" in text
    assert "## Program" not in text
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
    for task, known in tasks.items():
        plan = plan_of(task)
        wanted = json.loads(json.dumps(settled(plan)))
        assert {name: known["recipe"][name] for name in wanted} == wanted
        assert 0.2 <= round(known["greedy"], 2) <= 0.5
        runs = [one for one in records if one["task"] == task]
        assert {len(one["rewards"]) for one in runs} == {plan.steps}
        tuned = {
            (one["arm"], one["seed"], one["learning_rate"])
            for one in runs
            if one["stage"] == "tune"
        }
        arms = [arm.name for arm in TUNED]
        assert tuned == set(product(arms, plan.tuning_seeds, plan.learning_rates))
        rate = gate.best_rate(records, task)
        rest = [one for one in runs if one["stage"] != "tune"]
        assert {one["learning_rate"] for one in rest} == {rate}
        gates = {(one["arm"], one["seed"]) for one in rest if one["stage"] == "gate"}
        assert gates == set(product(("uniform", "oracle"), plan.gate_seeds))
        found = {(one["arm"], one["seed"]) for one in rest if one["stage"] == "compare"}
        every = set(product((arm.name for arm in ARMS), plan.seeds))
        assert found == (every if gate.gate_of(records, task, known["audit"]).passed else set())


def shown(value):
    return f"{value:+.3f}".replace("-", "−")


SURE = {
    "house": {"faster", "reach_decided", "reach_derivation", "oracle"},
    "program": {"faster", "reach_derivation", "oracle"},
    "clock_1100": {
        "faster",
        "reach_decided",
        "reach_derivation",
        "grad_x_input",
        "oar",
        "oracle",
    },
}
"""The arms with p < 0.05 before the correction."""


@pytest.mark.parametrize(
    ("document", "task", "arms"),
    [
        ("README.md", "house", ("reach_derivation", "oracle")),
        ("README.md", "program", ("reach_derivation", "oracle")),
        ("README.md", "clock_1100", ("reach_derivation", "oracle")),
        *(
            (
                "docs/ablation.md",
                task,
                ("flow", "reach_derivation", "reach_decided", "oracle", "shuffled", "faster"),
            )
            for task in SURE
        ),
    ],
)
def test_the_documents_say_what_the_records_say(document, task, arms):
    text = (RESULTS.parents[2] / document).read_text().replace("\n  ", " ")
    records, _ = report.found_in(RESULTS)
    means = {arm: curve.mean(1) for arm, curve in gate.compared(records, task).items()}
    over = {arm: gate.paired(means[arm], means["uniform"]) for arm in means if arm != "uniform"}
    for arm in arms:
        one = over[arm]
        assert shown(one.mean) in text
        assert f"{shown(one.low)} to {shown(one.high)}" in text
    assert {arm for arm, found in over.items() if found.p < 0.05} == SURE[task]


def test_the_page_says_of_gate_and_spread_what_the_records_say():
    text = (RESULTS.parents[2] / "docs" / "ablation.md").read_text().replace("\n  ", " ")
    records, tasks = report.found_in(RESULTS)
    refused = set()
    for task in TASKS:
        found = gate.gate_of(records, task, tasks[task]["audit"])
        assert shown(found.gain.mean) in text
        if not found.passed:
            refused.add(task)
            assert f"{shown(found.gain.low)} to {shown(found.gain.high)}" in text
            assert f"{shown(found.cosine)} ± {found.error:.3f}" in text
    assert refused == {"clock"}
    pairs = gate.curves_of(records, "clock", "gate", ("uniform", "oracle"))
    spread = (pairs["oracle"].mean(1) - pairs["uniform"].mean(1)).std(ddof=1)
    assert f"its eight pairs scattered by {spread:.3f}" in text
    asked, used = "reach_derivation", list(SURE)
    pairs = [(asked, other) for other in ("flow", "flow_20", "one_hop", "shuffled", "faster")]
    pairs += [(asked, "oracle"), (asked, "grad_x_input")]
    pairs += [(arm, "uniform") for arm in (asked, "reach_decided", "oracle", "flow", "faster")]
    for one in (report.pooled(records, used, *pair) for pair in pairs):
        assert f"({shown(one.low)} to {shown(one.high)})" in text.replace(", ", " (")
        assert shown(one.mean)[1:] in text
    curves = gate.compared(records, "house")
    spread = (curves["flow"].mean(1) - curves["uniform"].mean(1)).std(ddof=1)
    assert f"the spread was {spread:.3f}" in text
    collapsed = {}
    for arm, runs in curves.items():
        means = np.array([np.convolve(run, np.ones(7) / 7, "valid") for run in runs])
        falls = np.maximum.accumulate(means, axis=1) - means
        collapsed[arm] = int((falls.max(1) > 0.3).sum())
    some = dict.fromkeys(("uniform", "flow", "shuffled", "bottom"), 1)
    assert collapsed == dict.fromkeys(curves, 0) | some
