"""The table and the plot, from the records of the runs alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import sem, ttest_1samp

from examples.ablation.gate import passes
from examples.ablation.plan import ARMS, LEAST_ERRORS, LEAST_GAIN
from flowtracer_plugin.audit_summary import holm

Record = Mapping[str, Any]
Curves = Mapping[str, Float[np.ndarray, "seed step"]]

BASELINE, CONTROL = "uniform", "faster"
SAYS = {arm.name: arm.says for arm in ARMS}


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Differences of the mean reward over a run, seed by seed.

    Attributes:
        mean: Of the differences.
        low: Lower end of its 95 % interval, by Student's t.
        high: Upper end.
        size: The mean in units of the differences' spread (Cohen's d for pairs).
        chance: Two-sided p of no difference, by the same t.
    """

    mean: float
    low: float
    high: float
    size: float
    chance: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def paired(ours: Sequence[float], others: Sequence[float]) -> Paired:
    differences = np.subtract(ours, others)
    found = ttest_1samp(differences, 0.0)
    interval = found.confidence_interval(0.95)
    return Paired(
        mean=float(differences.mean()),
        low=float(interval.low),
        high=float(interval.high),
        size=float(differences.mean() / differences.std(ddof=1)),
        chance=float(found.pvalue),
    )


def curves_of(records: Sequence[Record], task: str, stage: str) -> Curves:
    """Rewards of each arm's runs, in the order of the arms and the seeds; whole seeds only.

    A seed that some arm has no run of, as the grid was broken off, is left out of all.
    """
    runs = [one for one in records if one["task"] == task and one["stage"] == stage]
    by_arm = {
        arm.name: {one["seed"]: one["rewards"] for one in runs if one["arm"] == arm.name}
        for arm in ARMS
    }
    by_arm = {arm: seeds for arm, seeds in by_arm.items() if seeds}
    whole = sorted(set.intersection(*(set(seeds) for seeds in by_arm.values()))) if by_arm else []
    return {arm: np.array([seeds[one] for one in whole]) for arm, seeds in by_arm.items()}


def best_rate(records: Sequence[Record], task: str) -> float:
    """The lowest rate at which plain GRPO is within one standard error of its best rate.

    Of rates that the tuning cannot tell apart the lowest one scatters the least, by far.
    """
    means: dict[float, list[float]] = {}
    for one in records:
        if one["task"] == task and one["stage"] == "tune":
            means.setdefault(one["learning_rate"], []).append(float(np.mean(one["rewards"])))
    best = max(means.values(), key=np.mean)
    enough = np.mean(best) - sem(best)
    return min(rate for rate, found in means.items() if np.mean(found) >= enough)


def table(records: Sequence[Record], task: str, cosines: Mapping[str, Record]) -> str:
    """The comparison as Markdown: one row for each arm, the primary metric first."""
    means = {arm: curve.mean(1) for arm, curve in curves_of(records, task, "compare").items()}
    over = {arm: paired(means[arm], means[BASELINE]) for arm in means if arm != BASELINE}
    adjusted = dict(zip(over, holm([one.chance for one in over.values()]), strict=True))
    rows = [
        "| credit | mean reward | − plain GRPO | d | p, Holm "
        "| − learning rate × 1.2 | cosine, audit |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, values in means.items():
        cells = [SAYS[arm], f"{values.mean():.3f}"]
        if arm == BASELINE:
            cells += ["", "", ""]
        else:
            cells += [str(over[arm]), f"{over[arm].size:+.2f}", _chance(adjusted[arm])]
        cells.append("" if arm == CONTROL else str(paired(values, means[CONTROL])))
        audit = cosines.get(arm)
        cells.append(f"{audit['cosine']:+.3f} ± {audit['error']:.3f}" if audit else "")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _chance(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def gate_table(records: Sequence[Record], audits: Mapping[str, Mapping[str, Record]]) -> str:
    """What the oracle does in each task, and whether that is enough."""
    rows = [
        "| task | learning rate | plain GRPO, mean reward | oracle − plain GRPO "
        "| cosine, audit | used |",
        "|---|---|---|---|---|---|",
    ]
    for task, cosines in audits.items():
        means = {arm: curve.mean(1) for arm, curve in curves_of(records, task, "gate").items()}
        over, oracle = paired(means["oracle"], means[BASELINE]), cosines["oracle"]
        used = passes(oracle["cosine"], oracle["error"], over.mean)
        rows.append(
            f"| {task} | {best_rate(records, task):g} | {means[BASELINE].mean():.3f} | {over} | "
            f"{oracle['cosine']:+.3f} ± {oracle['error']:.3f} | {'yes' if used else 'no'} |"
        )
    return "\n".join(rows)


def document(records: Sequence[Record], audits: Mapping[str, Mapping[str, Record]]) -> str:
    """All tables."""
    parts = [
        "# Does flow credit teach better?",
        "Made by `make ablation` from the records beside it. Differences are of the mean reward "
        "over all steps, between runs of one seed, with 95 % intervals by Student's t.",
        "## The gate",
        f"A task is used if its oracle raises the cosine by at least {LEAST_ERRORS:g} standard "
        f"errors and the mean reward by at least {LEAST_GAIN:g}.",
        gate_table(records, audits),
    ]
    for task, cosines in audits.items():
        curves = curves_of(records, task, "compare")
        if curves:
            seeds = len(next(iter(curves.values())))
            parts += [
                f"## {task.capitalize()}, {seeds} seeds",
                table(records, task, cosines),
                f"![Differences from plain GRPO]({task}.svg)",
            ]
    return "\n\n".join(parts) + "\n"


def plot(records: Sequence[Record], task: str, folder: Path) -> Path:
    """Differences from plain GRPO with their intervals, and the rewards step by step."""
    from benchmarks.plots import linear_panels, write

    curves = curves_of(records, task, "compare")
    figure, (left, right) = linear_panels(2)
    means = {arm: curve.mean(1) for arm, curve in curves.items()}
    arms = [arm for arm in means if arm != BASELINE]
    for place, arm in enumerate(reversed(arms)):
        one = paired(means[arm], means[BASELINE])
        left.errorbar(
            one.mean,
            place,
            xerr=[[one.mean - one.low], [one.high - one.mean]],
            fmt="o",
            color="0.25",
        )
    left.axvline(0, color="0.6", linewidth=0.8)
    left.set_yticks(range(len(arms)), labels=[SAYS[arm].replace("`", "") for arm in reversed(arms)])
    left.set(xlabel="mean reward − plain GRPO")
    for arm, color in (("uniform", "0.55"), ("faster", "C1"), ("flow", "C0"), ("oracle", "C2")):
        right.plot(_smooth(curves[arm].mean(0)), color=color, label=SAYS[arm], linewidth=1.2)
    right.set(xlabel="step", ylabel="reward, mean over seeds and 7 steps")
    right.legend(fontsize="small")
    return write(figure, task, folder)


def _smooth(curve: Float[np.ndarray, " step"], width: int = 7) -> Float[np.ndarray, " place"]:
    return np.convolve(curve, np.ones(width) / width, mode="valid")


def collected(records: Sequence[Record]) -> str:
    """The records as lines of JSON, in an order that no worker has a say in."""
    order = {arm.name: place for place, arm in enumerate(ARMS)}
    keys = [
        (one["task"], one["stage"], one["learning_rate"], one["seed"], order[one["arm"]])
        for one in records
    ]
    lines = [json.dumps(records[place]) for place in sorted(range(len(keys)), key=keys.__getitem__)]
    return "".join(f"{line}\n" for line in lines)
