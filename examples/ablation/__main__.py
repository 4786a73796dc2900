"""Does credit by flow teach better than plain GRPO? A comparison that could fail.

make ablation

Each task's policy is taught, the learning rate is tuned on plain GRPO, the gate says whether the
task could tell at all, and only then all arms are run. What is in the folder already is not made
again, so that the same command goes on where it was broken off.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.ablation.gate import audited, cosines, passes
from examples.ablation.grid import Run, quiet, run_all, start_of
from examples.ablation.plan import ARMS, PLAN, TASKS, Plan
from examples.ablation.pupil import teach
from examples.ablation.report import (
    best_rate,
    collected,
    curves_of,
    document,
    paired,
    plot,
)
from flowtracer_plugin.storage import write_atomically


def ablate(task: str, plan: Plan, folder: Path, workers: int) -> list[dict[str, Any]]:
    """All records of a task: those of the comparison only if the gate is passed."""
    start = start_of(task, folder)
    if not (start / "model.safetensors").exists():
        teach(TASKS[task], start)
    if not _audit_file(task, folder).exists():
        found = cosines(audited(TASKS[task], plan, start))
        _write(_audit_file(task, folder), json.dumps(found, indent=2) + "\n")
    tuning = [
        Run(task=task, stage="tune", arm="uniform", seed=seed, learning_rate=rate)
        for seed in plan.tuning_seeds
        for rate in plan.learning_rates
    ]
    records = run_all(tuning, plan, folder, workers)
    rate = best_rate(records, task)

    def staged(stage: Any, arms: Sequence[str], seeds: Sequence[int]) -> list[Run]:
        return [
            Run(task=task, stage=stage, arm=arm, seed=seed, learning_rate=rate)
            for seed in seeds
            for arm in arms
        ]

    records += run_all(
        staged("gate", ("uniform", "oracle"), plan.gate_seeds), plan, folder, workers
    )
    means = {arm: curve.mean(1) for arm, curve in curves_of(records, task, "gate").items()}
    gain = paired(means["oracle"], means["uniform"])
    oracle = json.loads(_audit_file(task, folder).read_text())["oracle"]
    used = passes(oracle["cosine"], oracle["error"], gain.mean)
    print(
        f"{task}: the oracle adds {oracle['cosine']:+.3f} ± {oracle['error']:.3f} to the cosine "
        f"and {gain} to the mean reward: {'used' if used else 'not used, as it cannot tell'}"
    )
    if used:
        every = [arm.name for arm in ARMS]
        records += run_all(staged("compare", every, plan.seeds), plan, folder, workers)
    return records


def report(records: Sequence[dict[str, Any]], folder: Path) -> None:
    """The records in one file, the tables and the plots."""
    tasks = list(dict.fromkeys(one["task"] for one in records))
    audits = {task: json.loads(_audit_file(task, folder).read_text()) for task in tasks}
    _write(folder / "runs.jsonl", collected(records))
    _write(folder / "audits.json", json.dumps(audits, indent=2) + "\n")
    _write(folder / "README.md", document(records, audits))
    for task in tasks:
        if curves_of(records, task, "compare"):
            plot(records, task, folder)


def _audit_file(task: str, folder: Path) -> Path:
    return folder / task / "audit.json"


def _write(path: Path, text: str) -> None:
    write_atomically(path, text.encode())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/ablation"), help="folder of records"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=len(PLAN.seeds), help="of the comparison")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    arguments = parser.parse_args()
    quiet()
    plan = replace(PLAN, seeds=tuple(range(arguments.seeds)))
    records: list[dict[str, Any]] = []
    for task in arguments.tasks:
        records += ablate(task, plan, arguments.out, arguments.workers)
        report(records, arguments.out)
    print(f"tables and plots: {arguments.out / 'README.md'}")


if __name__ == "__main__":
    main()
