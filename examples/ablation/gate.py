"""From records to numbers: paired differences, the learning rate, and whether a task can tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import sem, ttest_1samp

from examples.ablation.plan import ARMS, LEAST_ERRORS, LEAST_GAIN, PLAIN, PLAN

Record = Mapping[str, Any]
Curves = Mapping[str, Float[np.ndarray, "seed step"]]


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


def curves_of(records: Sequence[Record], task: str, stage: str, arms: Sequence[str]) -> Curves:
    """Rewards of the runs of these arms, for the seeds of which each of them has one.

    Others are left out: a grid that is not at its end has some.
    """
    runs = [one for one in records if one["task"] == task and one["stage"] == stage]
    found = {
        arm: {one["seed"]: one["rewards"] for one in runs if one["arm"] == arm} for arm in arms
    }
    whole = sorted(set.intersection(*(set(seeds) for seeds in found.values())))
    return {arm: np.array([seeds[one] for one in whole]) for arm, seeds in found.items()}


def compared(records: Sequence[Record], task: str) -> Curves:
    """The comparison of all arms; no seeds, if there was none."""
    return curves_of(records, task, "compare", [arm.name for arm in ARMS])


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


def finished(records: Sequence[Record], task: str) -> bool:
    """Whether all runs of the tuning and the gate are there."""
    stages = [one["stage"] for one in records if one["task"] == task]
    tuning = len(PLAN.tuning_seeds) * len(PLAN.learning_rates)
    return stages.count("tune") == tuning and stages.count("gate") == 2 * len(PLAN.gate_seeds)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What the oracle does in a task.

    Attributes:
        plain: Mean reward of plain GRPO.
        gain: Of the oracle over it.
        cosine: What the oracle adds to the cosine in the audit.
        error: The standard error of that.
    """

    plain: float
    gain: Paired
    cosine: float
    error: float

    @property
    def passed(self) -> bool:
        """Whether a comparison could say anything."""
        return self.cosine >= LEAST_ERRORS * self.error and self.gain.mean >= LEAST_GAIN


def gate_of(records: Sequence[Record], task: str, audit: Mapping[str, Record]) -> Gate:
    curves = curves_of(records, task, "gate", (PLAIN, "oracle"))
    plain, oracle = (curves[arm].mean(1) for arm in (PLAIN, "oracle"))
    return Gate(
        plain=float(plain.mean()),
        gain=paired(oracle, plain),
        cosine=audit["oracle"]["cosine"],
        error=audit["oracle"]["error"],
    )
