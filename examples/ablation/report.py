"""Tables and plots, from the records of the runs alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from benchmarks.plots import linear_panels, write
from examples.ablation.gate import Paired, Record, best_rate, compared, finished, gate_of, paired
from examples.ablation.plan import ARMS, FASTER, LEAST_ERRORS, LEAST_GAIN, PLAIN, TUNED, plan_of
from flowtracer_plugin.audit.summary import holm
from flowtracer_plugin.files import write_atomically

Tasks = Mapping[str, Record]
"""Facts about each task besides its runs, see `audits.known`."""

SAYS = {arm.name: arm.says for arm in ARMS}
KEPT = ("task", "stage", "arm", "seed", "learning_rate", "rewards")
WEIGHED = "oar"
"""The arm that chooses no tokens, but weighs all."""
SHOWN = {"uniform": "0.55", "faster": "C1", "flow": "C0", "reach_derivation": "C3", "oracle": "C2"}
"""The arms with a curve, and its colour."""
ASKED = "reach_derivation"
"""The arm that the comparison is about."""
SMOOTH = 7
"""Width of the moving average of curves, in steps."""


def found_in(folder: Path) -> tuple[list[Record], Tasks]:
    """The records in a folder of runs, or in a folder of reports without runs."""
    files = sorted(folder.glob("*/task.json"))
    if not files:
        lines = (folder / "runs.jsonl").read_text().splitlines()
        tasks = json.loads((folder / "tasks.json").read_text())
        return [json.loads(line) for line in lines], tasks
    tasks = {file.parent.name: json.loads(file.read_text()) for file in files}
    runs = [json.loads(file.read_text()) for file in folder.glob("*/*/*-*-*.json")]
    kept = [{name: run[name] for name in KEPT} for run in runs if run["task"] in tasks]
    return sorted(kept, key=_place), tasks


def _place(record: Record) -> tuple[object, ...]:
    """A sort key, so that the order does not depend on the workers."""
    arms = [arm.name for arm in (*ARMS, *TUNED)]
    numbers = (record["learning_rate"], record["seed"], arms.index(record["arm"]))
    return (record["task"], record["stage"], *numbers)


def write_report(records: Sequence[Record], tasks: Tasks, folder: Path) -> None:
    """Write the records, the facts about the tasks, the tables and the plots."""
    lines = "".join(f"{json.dumps(one)}\n" for one in records)
    write_atomically(folder / "runs.jsonl", lines.encode())
    write_atomically(folder / "tasks.json", json.dumps(tasks, indent=1).encode() + b"\n")
    write_atomically(folder / "README.md", document(records, tasks).encode())
    for task in tasks:
        if _seeds(records, task) > 1:
            plot(records, task, folder)


def document(records: Sequence[Record], tasks: Tasks) -> str:
    """The page with all tables, in Markdown."""
    parts = [
        "# The ablation, in figures",
        "`make ablation` writes this page from the records beside it; `docs/ablation.md` explains "
        "it. Differences are between mean rewards over all steps of runs with the same seed, with "
        "95 % intervals by Student's t, without correction for several comparisons; the median is "
        "that of these differences, and d their mean, divided by their standard deviation over "
        "seeds.",
        "## The gate",
        f"A task is used if its oracle raises the cosine by at least {LEAST_ERRORS:g} standard "
        f"errors, and the mean reward by at least {LEAST_GAIN:g} with an interval above 0. Greedy "
        "and sampled are the accuracies of the policy that all runs start from.",
        gate_table(records, tasks),
    ]
    for task, known in tasks.items():
        seeds = _seeds(records, task)
        if seeds > 1:
            parts += [
                f"## {task.capitalize()}: {seeds} of {len(plan_of(task).seeds)} planned seeds",
                table(records, task, known["audit"]),
                f"![Differences from plain GRPO, and rewards by step]({task}.svg)",
            ]
    used = [task for task in tasks if _seeds(records, task) > 1]
    if len(used) > 1:
        parts += [
            f"## All of {', '.join(used)}",
            "The differences of all seeds together, each from the run of its own task and seed. No "
            "plan asked for this, and nothing is corrected for the number of comparisons.",
            pooled_table(records, used),
        ]
    return "\n\n".join(parts) + "\n"


def pooled(records: Sequence[Record], tasks: Sequence[str], arm: str, other: str) -> Paired:
    """One arm minus another one, over the seeds of several tasks."""
    curves = [compared(records, task) for task in tasks]
    ours, others = (np.concatenate([one[name].mean(1) for one in curves]) for name in (arm, other))
    return paired(ours, others)


def pooled_table(records: Sequence[Record], tasks: Sequence[str]) -> str:
    """Each arm minus plain GRPO, and `ASKED` minus each arm, over all seeds of the tasks."""
    rows = [f"| credit | − plain GRPO | {SAYS[ASKED]} − it |", "|---|---|---|"]
    for arm in [one.name for one in ARMS if one.name != PLAIN]:
        over = pooled(records, tasks, arm, PLAIN)
        left = "" if arm == ASKED else str(pooled(records, tasks, ASKED, arm))
        rows.append(f"| {SAYS[arm]} | {over} | {left} |")
    return "\n".join(rows)


def gate_table(records: Sequence[Record], tasks: Tasks) -> str:
    """The oracle's gains in each task, and whether they are large enough."""
    rows = [
        "| task | greedy | sampled | learning rate | plain GRPO | oracle − plain GRPO "
        "| cosine, audit | used |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, known in tasks.items():
        right = f"| {task} | {known['greedy']:.2f} | {known['sampled']:.2f} "
        if not finished(records, task):
            rows.append(f"{right}| not finished | | | | |")
            continue
        gate = gate_of(records, task, known["audit"])
        rows.append(
            f"{right}| {best_rate(records, task):g} | {gate.plain:.3f} | {gate.gain} "
            f"| {gate.cosine:+.3f} ± {gate.error:.3f} | {'yes' if gate.passed else 'no'} |"
        )
    return "\n".join(rows)


def table(records: Sequence[Record], task: str, audit: Mapping[str, Record]) -> str:
    """The comparison, with one row for each arm and the primary metric first."""
    means = {arm: curve.mean(1) for arm, curve in compared(records, task).items()}
    over = {arm: paired(means[arm], means[PLAIN]) for arm in means if arm != PLAIN}
    adjusted = dict(zip(over, holm([one.p for one in over.values()]), strict=True))
    rows = [
        "| credit | mean reward | − plain GRPO | median | d | p, Holm "
        "| − learning rate × 1.2 | tokens chosen | cosine, audit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, values in means.items():
        cells = [SAYS[arm], f"{values.mean():.3f}"]
        if arm == PLAIN:
            cells += ["", "", "", ""]
        else:
            one = over[arm]
            cells += [str(one), f"{one.median:+.3f}", f"{one.size:+.2f}", _p_value(adjusted[arm])]
        cells.append("" if arm == FASTER else str(paired(values, means[FASTER])))
        if arm in (PLAIN, FASTER):
            cells += ["", ""]
        else:
            found = audit[arm]
            chosen = "all, weighed" if arm == WEIGHED else f"{found['chosen']:.0%}"
            cells += [chosen, f"{found['cosine']:+.3f} ± {found['error']:.3f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _seeds(records: Sequence[Record], task: str) -> int:
    return len(compared(records, task)[PLAIN])


def plot(records: Sequence[Record], task: str, folder: Path) -> Path:
    """Plot differences from plain GRPO (seeds, and intervals of the mean) and rewards by step."""
    curves = compared(records, task)
    figure, (left, right) = linear_panels(2)
    arms = [arm for arm in reversed(curves) if arm != PLAIN]
    for place, arm in enumerate(arms):
        differences = curves[arm].mean(1) - curves[PLAIN].mean(1)
        left.plot(differences, [place] * len(differences), "|", color="0.7")
        one = paired(curves[arm].mean(1), curves[PLAIN].mean(1))
        left.plot([one.low, one.high], [place, place], color="0.2", linewidth=1.5)
        left.plot(one.mean, place, "o", color="0.2")
    left.axvline(0, color="0.6", linewidth=0.8)
    left.set_yticks(range(len(arms)), labels=[SAYS[arm].replace("`", "") for arm in arms])
    left.set(xlabel="mean reward − plain GRPO")
    for arm, color in SHOWN.items():
        curve = _smoothed(curves[arm].mean(0))
        steps = np.arange(len(curve)) + SMOOTH // 2
        right.plot(steps, curve, color=color, label=SAYS[arm], linewidth=1.2)
    right.set(xlabel="step", ylabel=f"reward, mean over seeds and {SMOOTH} steps")
    right.legend(fontsize="small", loc="lower right")
    return write(figure, task, folder)


def _smoothed(curve: Float[np.ndarray, " step"]) -> Float[np.ndarray, " place"]:
    return np.convolve(curve, np.ones(SMOOTH) / SMOOTH, mode="valid")
