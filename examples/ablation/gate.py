"""From records to numbers: paired differences, the best learning rate, and a task's gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import sem, ttest_1samp

from examples.ablation.plan import ARMS, CHANCE, LEAST_ERRORS, LEAST_GAIN, PLAIN, TUNED, plan_of

Record = Mapping[str, Any]
Curves = Mapping[str, Float[np.ndarray, "seed step"]]


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Differences of the mean reward over a run, seed by seed.

    Attributes:
        mean: Mean difference.
        median: Median difference.
        low: Lower end of its 95 % interval, by Student's t.
        high: Upper end of this interval.
        size: The mean, divided by the differences' standard deviation (Cohen's d for pairs).
        p: Two-sided p-value of the paired t-test.
    """

    mean: float
    median: float
    low: float
    high: float
    size: float
    p: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def paired(ours: Sequence[float], others: Sequence[float]) -> Paired:
    differences = np.subtract(ours, others)
    found = ttest_1samp(differences, 0.0)
    interval = found.confidence_interval(0.95)
    return Paired(
        mean=float(differences.mean()),
        median=float(np.median(differences)),
        low=float(interval.low),
        high=float(interval.high),
        size=float(differences.mean() / differences.std(ddof=1)),
        p=float(found.pvalue),
    )


def curves_of(records: Sequence[Record], task: str, stage: str, arms: Sequence[str]) -> Curves:
    """Rewards of the runs of these arms, for the seeds of which every arm has a run.

    An unfinished grid has other seeds too; they are left out.
    """
    runs = [one for one in records if one["task"] == task and one["stage"] == stage]
    found = {
        arm: {one["seed"]: one["rewards"] for one in runs if one["arm"] == arm} for arm in arms
    }
    whole = sorted(set.intersection(*(set(seeds) for seeds in found.values())))
    return {arm: np.array([seeds[one] for one in whole]) for arm, seeds in found.items()}


def compared(records: Sequence[Record], task: str) -> Curves:
    """Rewards of all arms in the comparison; arrays without rows if there was none."""
    return curves_of(records, task, "compare", [arm.name for arm in ARMS])


def best_rate(records: Sequence[Record], task: str) -> float:
    """The learning rate at which differences between arms scatter least, among the good ones.

    Good are the rates whose mean reward with plain GRPO is within one standard error of the best
    one's. Of these it is the one with the smallest standard deviation of `random` minus plain GRPO,
    seed by seed: at high rates plain GRPO collapses in some seeds, and a comparison with it finds
    only large differences.
    """
    tuned = [one for one in records if one["stage"] == "tune"]
    plain, scatter = {}, {}
    for rate in {one["learning_rate"] for one in tuned if one["task"] == task}:
        runs = [one for one in tuned if one["learning_rate"] == rate]
        curves = curves_of(runs, task, "tune", (PLAIN, CHANCE))
        plain[rate] = curves[PLAIN].mean(1)
        scatter[rate] = float((curves[CHANCE].mean(1) - plain[rate]).std(ddof=1))
    best = max(plain.values(), key=np.mean)
    enough = best.mean() - sem(best)
    return min((rate for rate in plain if plain[rate].mean() >= enough), key=scatter.__getitem__)


def finished(records: Sequence[Record], task: str) -> bool:
    """Whether all runs of the tuning and the gate exist."""
    stages = [one["stage"] for one in records if one["task"] == task]
    plan = plan_of(task)
    tuning = len(plan.tuning_seeds) * len(plan.learning_rates) * len(TUNED)
    return stages.count("tune") == tuning and stages.count("gate") == 2 * len(plan.gate_seeds)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The oracle's gain in a task.

    Attributes:
        plain: Mean reward of plain GRPO.
        gain: Mean reward of the oracle minus that of plain GRPO.
        cosine: Gain of the oracle's cosine in the audit.
        error: Standard error of the gain in cosine.
    """

    plain: float
    gain: Paired
    cosine: float
    error: float

    @property
    def passed(self) -> bool:
        """Whether both gains are large enough for a comparison."""
        sure = self.cosine >= LEAST_ERRORS * self.error and self.gain.low > 0
        return sure and self.gain.mean >= LEAST_GAIN


def gate_of(records: Sequence[Record], task: str, audit: Mapping[str, Record]) -> Gate:
    curves = curves_of(records, task, "gate", (PLAIN, "oracle"))
    plain, oracle = (curves[arm].mean(1) for arm in (PLAIN, "oracle"))
    return Gate(
        plain=float(plain.mean()),
        gain=paired(oracle, plain),
        cosine=audit["oracle"]["cosine"],
        error=audit["oracle"]["error"],
    )
