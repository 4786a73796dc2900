r"""Reward functions for scripts that take the dotted path of a reward.

    FLOWTRACER_MODEL=my/model trl grpo ... --reward_funcs \
        flowtracer_plugin.rewards.math_answer flowtracer_plugin.rewards.reasoning_share

Such a script passes no model to the reward. Therefore the flow rewards here trace the model that
the environment variable `FLOWTRACER_MODEL` names: a folder or an id on the hub. Each process loads
it once, with the first completions, and it stays frozen during the training. `FLOWTRACER_DEVICE`
names its device, by default the GPU if there is one. For other options, put a
`flowtracer_plugin.rewards.FlowReward` into a module of your own and pass its path.

`docs/rewards.md` says what each reward measures and how it could be gamed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from flowtracer_plugin.credit.own_scorers import import_named
from flowtracer_plugin.model.loading import load_model, load_tokenizer
from flowtracer_plugin.rewards.flow_reward import FlowReward, completion_text
from flowtracer_plugin.trace.tracer import FlowTracer, wrap

# Without math_answer, which is another module's and starts a process.
__all__ = ["completion_text", "concentration", "math_flow", "reasoning_share"]

MODEL, DEVICE = "FLOWTRACER_MODEL", "FLOWTRACER_DEVICE"


def _traced(name: str, doc: str) -> Callable[..., list[float | None]]:
    """The reward function of this name, which traces the model of `FLOWTRACER_MODEL`."""

    def reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        return _reward(name)(prompts, completions, completion_ids, **columns)

    reward.__name__ = reward.__qualname__ = name  # TRL logs __name__, pickle uses __qualname__
    reward.__doc__ = f"""{doc}

    Raises:
        ValueError: `FLOWTRACER_MODEL` names no model.
    """
    return reward


reasoning_share = _traced(
    "reasoning_share",
    "The share of the answer's flow that passes the reasoning, 0 to 1; see `FlowReward`.",
)
concentration = _traced(
    "concentration",
    "How unevenly the flow is spread over the reasoning, 0 to 1; see `FlowReward`.",
)
math_flow = _traced(
    "math_flow",
    "`math_answer` times `reasoning_share`: only right answers are rewarded, more if reasoned.",
)


@cache
def _reward(name: str) -> FlowReward:
    if name == "math_flow":
        return FlowReward(_tracer, outcome=named_reward("math_answer"), name=name)
    return FlowReward(_tracer, score=name)


@cache
def _tracer() -> FlowTracer:
    name = os.environ.get(MODEL)
    if not name:
        raise ValueError(
            f"the rewards of flowtracer_plugin.rewards.named trace the model that the environment "
            f"variable {MODEL} names, and it is not set; set it to the folder of a model or its id "
            "on the hub, such as the one that is trained"
        )
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):  # loading may draw random weights
        model = load_model(name, os.environ.get(DEVICE, "auto"), "auto")
    return wrap(model, load_tokenizer(name), preset="paper")


def named_reward(name: str) -> Callable[..., Any]:
    """`math_answer`, or the reward function of a dotted path.

    Raises:
        ValueError: As `imported_reward`.
    """
    if name == "math_answer":
        # Late, since the import starts the process that judges formulas.
        from flowtracer_plugin.rewards.right_answers import math_answer

        return math_answer
    return imported_reward(name, ("math_answer",))


def __getattr__(name: str) -> Any:
    """`math_answer`, which older scripts name by a path through this module."""
    if name == "math_answer":
        return named_reward(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def imported_reward(path: str, known: Sequence[str]) -> Callable[..., Any]:
    """The reward function of a dotted path, which may be a module in the current folder.

    Raises:
        ValueError: There is no such function; the message lists the `known` names.
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(
            f"there is no reward {path!r}; wanted one of {', '.join(known)}, or a dotted path "
            "such as my_rewards.short"
        )
    try:
        found = import_named(module, name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import the reward {path!r}: {error}") from error
    if not callable(found) or isinstance(found, type):
        raise ValueError(
            f"the reward {path!r} must be a function or an instance that can be called, "
            f"got {found!r}"
        )
    return found
