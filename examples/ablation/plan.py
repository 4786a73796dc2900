"""What is compared, fixed before the first run of this plan.

The primary metric is the mean reward over all steps of a run, on prompts that are drawn anew in
every step, minus that of plain GRPO with the same seed. Its p-value is that of a paired t-test,
with Holm's correction over the other arms of a task. Everything else is secondary.

A change here or of a task, after runs were made, is another experiment. The runner refuses to mix
arms, plans, policies and library versions, and cannot notice other changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

from examples.ablation.clock import CLOCK, CLOCK_1100
from examples.ablation.house import HOUSE
from examples.ablation.program import PROGRAM
from examples.ablation.task import Task

TASKS: Mapping[str, Task] = MappingProxyType(
    {task.name: task for task in (HOUSE, PROGRAM, CLOCK, CLOCK_1100)}
)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to give credit.

    Attributes:
        name: The name, also in file names.
        says: Description in tables and plots.
        credit: Options that differ from the defaults of `CreditOptions`.
        learning_rate: Factor on the learning rate.
    """

    name: str
    says: str
    credit: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """The arm's options of `CreditOptions`, with the share of tokens that it chooses."""
        return {"top_fraction": SHARE, **self.credit}


PLAIN, FASTER, CHANCE = "uniform", "faster", "random"
"""The arm that all are compared with, the control for larger steps, and that of the tuning."""
SHARE = 0.2
"""Share of tokens that get more credit, unless an arm says otherwise."""

REACH = "reach:derivation"

ARMS = (
    Arm(name="uniform", says="plain GRPO", credit={"scorer": "uniform"}),
    Arm(name="faster", says="plain GRPO, learning rate × 1.2", credit={"scorer": "uniform"},
        learning_rate=1.2),
    Arm(name="flow", says="flow, 40 %, as in the paper",
        credit={"scorer": "flow", "top_fraction": 0.4}),
    Arm(name="flow_20", says="flow", credit={"scorer": "flow"}),
    Arm(name="reach_decided", says="`reach:decided`", credit={"scorer": "reach:decided"}),
    Arm(name="reach_derivation", says="`reach:derivation`", credit={"scorer": REACH}),
    Arm(name="shuffled", says="`reach:derivation`, shuffled in role and tenth",
        credit={"scorer": "shuffled_reach:derivation"}),
    Arm(name="bottom", says="the lowest `reach:derivation`",
        credit={"scorer": REACH, "side": "bottom"}),
    Arm(name="one_hop", says="attention of the answer, one hop", credit={"scorer": "attention"}),
    Arm(name="grad_x_input", says="gradient × input of the answer",
        credit={"scorer": "grad_x_input"}),
    Arm(name="oar", says="OAR-G, all tokens weighed", credit={"scorer": "oar", "gamma": 2.0}),
    Arm(name="oracle", says="what matters, as the task knows it", credit={"scorer": "oracle"}),
)  # fmt: skip
TUNED = (ARMS[0], Arm(name=CHANCE, says="chance", credit={"scorer": "random"}))
"""The arms with which the learning rate is chosen."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The settings and seeds of all runs.

    Attributes:
        rank: Rank of the LoRA that is trained, see `pupil.adapters`.
        steps: Steps of GRPO, one update for each batch of rollouts.
        prompts: Prompts in a batch.
        completions: Completions of a prompt.
        warmup: Steps over which the learning rate rises.
        learning_rates: Candidates. All arms get the one at which credit by chance differs least
            from plain GRPO, among those that are as good for plain GRPO, see `best_rate`. Higher
            rates are no candidates: one of four tuning runs of plain GRPO in `house` collapsed at
            4e-3, and one of eight gate runs at 3.4e-3, where pairs scatter by 0.098.
        tuning_seeds: Seeds with which the learning rate is chosen.
        audited: Prompts of the audit in the gate.
        gate_seeds: Seeds with which the gate compares the oracle with plain GRPO.
        seeds: Seeds of the comparison; no earlier one has used them. Arms of one seed see the same
            prompts. A difference of 0.02 is found with a probability of 80 % at p < 0.05 by
            (2.8 spread / 0.02)² + 2 seeds: 10 for a spread of 0.020 between pairs; there are more,
            as arms may vary more.
    """

    rank: int = 4
    steps: int = 60
    prompts: int = 4
    completions: int = 8
    warmup: int = 5
    learning_rates: tuple[float, ...] = (2e-3, 2.8e-3)
    tuning_seeds: tuple[int, ...] = tuple(range(100, 104))
    audited: int = 512
    gate_seeds: tuple[int, ...] = tuple(range(200, 208))
    seeds: tuple[int, ...] = tuple(range(16, 32))


PLAN = Plan()
PLANS: Mapping[str, Plan] = MappingProxyType(
    {
        "clock_1100": replace(
            PLAN, steps=120, learning_rates=(1e-3, 1.4e-3), seeds=tuple(range(16, 28))
        )
    }
)
"""The plans of tasks that have one of their own. In pilot runs of `clock_1100`, the oracle minus
plain GRPO scattered by 0.003 at 1e-3, by 0.021 at 1.4e-3 and by 0.029 at 2e-3, each seed by seed
in 60 steps; in 120 steps it gained 0.019 and 0.022 and scattered by 0.009 at both lower rates."""


def plan_of(task: str) -> Plan:
    return PLANS.get(task, PLAN)


def settled(plan: Plan) -> dict[str, Any]:
    """The arms and the plan, without the seeds of the comparison, which may be extended."""
    arms = {arm.name: {"learning_rate": arm.learning_rate, **arm.options} for arm in ARMS}
    return {
        "arms": arms,
        **{name: value for name, value in asdict(plan).items() if name != "seeds"},
    }


LEAST_ERRORS = 4.0
"""A task is used if its oracle raises the cosine by at least this many standard errors ..."""
LEAST_GAIN = 0.01
"""... and the mean reward over all steps by at least this in the runs of the gate, with a 95 %
interval above 0."""
