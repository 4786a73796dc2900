"""What is compared, settled before the first run of it.

The primary metric is the mean reward over all steps of a run, on prompts that are drawn anew in
every step, minus that of plain GRPO with the same seed; its chance is Student's t for pairs,
corrected by Holm over the other arms of a task. Everything else is secondary.

A change here, after runs were made, is another experiment, and so is one of the tasks: the runner
refuses to mix arms, plans, policies and versions of libraries, and cannot know of other changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from examples.ablation.countdown import COUNTDOWN
from examples.ablation.house import HOUSE
from examples.ablation.task import Task

TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in (HOUSE, COUNTDOWN)})


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to give credit.

    Attributes:
        name: Of its files.
        says: What it is, for the table.
        credit: What it changes of `CreditOptions`.
        learning_rate: Factor on the learning rate.
    """

    name: str
    says: str
    credit: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = 1.0


PLAIN, FASTER = "uniform", "faster"
"""What every arm is compared with, and the control for its larger steps."""
SHARE = 0.4
"""Of the tokens that get more credit, where an arm does not say; the paper's."""

ARMS = (
    Arm(name="uniform", says="plain GRPO", credit={"scorer": "uniform"}),
    Arm(name="faster", says="plain GRPO, learning rate × 1.2", credit={"scorer": "uniform"},
        learning_rate=1.2),
    Arm(name="flow", says="flow, as in the paper"),
    Arm(name="sharp", says="flow, preset `sharp`", credit={"scorer": "flow:sharp"}),
    Arm(name="product", says="flow × entropy, 10 %",
        credit={"scorer": "flow*entropy", "top_fraction": 0.1}),
    Arm(name="bottom", says="the lowest flow", credit={"side": "bottom"}),
    Arm(name="shuffled", says="flow, shuffled in role and tenth", credit={"scorer": "shuffled"}),
    Arm(name="random", says="chance", credit={"scorer": "random"}),
    Arm(name="one_hop", says="attention of the answer, one hop", credit={"scorer": "attention"}),
    Arm(name="entropy", says="the policy's entropy, 20 %",
        credit={"scorer": "entropy", "top_fraction": 0.2}),
    Arm(name="oracle", says="what matters, as the task knows it", credit={"scorer": "oracle"}),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How every run is made, and how many there are.

    Attributes:
        rank: Of the LoRA that is trained, see `pupil.adapters`.
        steps: Of GRPO, one update for each batch of rollouts.
        prompts: Of a batch.
        completions: Of a prompt.
        warmup: Steps over which the learning rate rises.
        learning_rates: Of which all arms get the one that is best for plain GRPO, see `best_rate`.
        tuning_seeds: With which that is found out.
        audited: Prompts of the audit in the gate.
        gate_seeds: With which plain credit and the oracle's are run to see whether a task can tell.
        seeds: Of the comparison. Arms of one seed see the same prompts. 80 % of the differences of
            0.02 are found at p < 0.05 with (2.8 spread / 0.02)² + 2 seeds: 10 by the 0.020 between
            pairs of the gate, of which there are more here, as arms may scatter more.
    """

    rank: int = 4
    steps: int = 60
    prompts: int = 4
    completions: int = 8
    warmup: int = 5
    learning_rates: tuple[float, ...] = (2e-3, 2.8e-3, 4e-3, 5.6e-3)
    tuning_seeds: tuple[int, ...] = tuple(range(100, 104))
    audited: int = 512
    gate_seeds: tuple[int, ...] = tuple(range(200, 208))
    seeds: tuple[int, ...] = tuple(range(16))


PLAN = Plan()


def settled(plan: Plan) -> dict[str, Any]:
    """The arms and the plan but for the seeds of the comparison, of which there may be more."""
    arms = {arm.name: {"learning_rate": arm.learning_rate, **arm.credit} for arm in ARMS}
    return {
        "arms": arms,
        **{name: value for name, value in asdict(plan).items() if name != "seeds"},
    }


LEAST_ERRORS = 4.0
"""A task is used if its oracle raises the cosine by so many standard errors in the audit ..."""
LEAST_GAIN = 0.02
"""... and the mean reward over all steps by so much in the runs of the gate."""
