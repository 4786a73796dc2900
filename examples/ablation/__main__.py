"""Does flow credit train better than plain GRPO? A comparison that could also show the opposite.

make ablation

For each task: teach the policy, choose the learning rate by plain GRPO and credit by chance, check
by a gate whether credit matters in the task, and only then run all arms. Existing results are not
made again, so the same command continues where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import version
from itertools import product
from pathlib import Path
from shutil import copytree
from typing import Any

from examples.ablation.audits import known
from examples.ablation.gate import best_rate, gate_of
from examples.ablation.grid import Run, Stage, quiet, run_all, start_of
from examples.ablation.plan import ARMS, PLAIN, PLAN, TASKS, TUNED, Plan, plan_of, settled
from examples.ablation.pupil import teach
from examples.ablation.report import found_in, write_report
from flowtracer_plugin.files import write_atomically

POLICIES = Path(__file__).parent / "policies"
"""The policies from which the published runs start: another machine teaches others."""
MEASURED_WITH = ("torch", "transformers", "trl", "peft")


def ablate(task: str, plan: Plan, folder: Path, workers: int) -> None:
    """Make all runs of a task; those of the comparison only if the task passes the gate."""
    audit = look(task, plan, folder)["audit"]

    def records_of(
        stage: Stage, arms: Sequence[str], seeds: Sequence[int], rates: Sequence[float]
    ) -> list[dict[str, Any]]:
        runs = [
            Run(task=task, stage=stage, arm=arm, seed=seed, learning_rate=rate)
            for seed, arm, rate in product(seeds, arms, rates)
        ]
        return run_all(runs, plan, folder, workers)

    tuned = [arm.name for arm in TUNED]
    rates = plan.learning_rates
    best = [best_rate(records_of("tune", tuned, plan.tuning_seeds, rates), task)]
    gate = gate_of(records_of("gate", [PLAIN, "oracle"], plan.gate_seeds, best), task, audit)
    print(
        f"{task}: the oracle adds {gate.cosine:+.3f} ± {gate.error:.3f} to the cosine, and "
        f"{gate.gain} to the mean reward: {'used' if gate.passed else 'not used'}"
    )
    if gate.passed:
        records_of("compare", [arm.name for arm in ARMS], plan.seeds, best)


def look(task: str, plan: Plan, folder: Path) -> dict[str, Any]:
    """Facts about a task besides its runs; its policy is taught first, if `POLICIES` has none.

    Raises:
        ValueError: The folder holds results of another recipe.
    """
    start, file = start_of(task, folder), folder / task / "task.json"
    if not start.exists() and (POLICIES / task).exists():
        copytree(POLICIES / task, start)
    if not start.exists():
        teach(TASKS[task], start)
    recipe = json.loads(json.dumps(recipe_of(plan, start)))
    if not file.exists():
        found = {"recipe": recipe, **known(TASKS[task], plan, start)}
        write_atomically(file, json.dumps(found, indent=1).encode() + b"\n")
    held = json.loads(file.read_text())
    differ = [name for name in recipe if held["recipe"].get(name) != recipe[name]]
    if differ:
        raise ValueError(
            f"{str(folder / task)!r} holds runs of another recipe: {', '.join(differ)} differ from "
            f"those in {file.name!r}; write to another folder (--out), or delete this one"
        )
    return held


def recipe_of(plan: Plan, start: Path) -> dict[str, Any]:
    """All that a run depends on besides its name and this code, as plain values."""
    policy = (start / "model.safetensors").read_bytes()
    return {
        **settled(plan),
        "policy": sha256(policy).hexdigest(),
        "versions": {name: version(name) for name in MEASURED_WITH},
    }


def main() -> None:
    arguments = _arguments()
    quiet()
    if arguments.report:
        write_report(*found_in(arguments.report), arguments.report)
        return
    for task in arguments.tasks:
        plan = plan_of(task)
        if arguments.seeds is not None:
            first = plan.seeds[0]
            plan = replace(plan, seeds=tuple(range(first, first + arguments.seeds)))
        ablate(task, plan, arguments.out, arguments.workers)
        write_report(*found_in(arguments.out), arguments.out)
    print(f"tables and plots: {arguments.out / 'README.md'}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("build/ablation"), help="for the records")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, help="in the comparison; by default those planned")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="worker processes")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FOLDER",
        help="only write its tables and plots again",
    )
    arguments = parser.parse_args()
    most = min(PLAN.tuning_seeds) - PLAN.seeds[0]
    if arguments.seeds is not None and not 2 <= arguments.seeds <= most:
        parser.error(f"--seeds: wanted 2 to {most}, found {arguments.seeds}")
    return arguments


if __name__ == "__main__":
    main()
