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

import importlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from flowtracer_plugin.model.loading import load_model, load_tokenizer
from flowtracer_plugin.rewards.flow_reward import FlowReward, completion_text
from flowtracer_plugin.text.answers import find_answer
from flowtracer_plugin.trace.tracer import FlowTracer, wrap

__all__ = ["completion_text", "concentration", "math_answer", "math_flow", "reasoning_share"]

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


def math_answer(
    completions: Sequence[Any], answer: Sequence[Any] | None = None, **columns: Any
) -> list[float | None]:
    r"""1 where the answer of a completion equals the one in the column `answer`, 0 where not.

    `find_answer` finds the answer of a completion, so that the rewarded answer is the traced one.
    `math-verify` compares: `1/2`, `0.5` and `\frac{1}{2}` are equal, as are `72` and `72 clips`.
    In a reference such as GSM8K's, the part after `####` or in `\boxed{}` counts. The reward is
    None, which TRL leaves out, if the reference cannot be read.

    Raises:
        ValueError: The data have no column `answer`.
        ModuleNotFoundError: math-verify is missing; the extra `math` installs it.

    Example:
        >>> math_answer([r"3 + 4 makes \boxed{7}", "#### 8"], ["#### 7", "7"])
        [1.0, 0.0]
    """
    if answer is None:
        raise ValueError(
            "math_answer needs the right answers in a column `answer` of the data; rename it, or "
            "with `flowtracer train` name it by --answer_column"
        )
    return [
        _verdict(
            completion_text(completion[-1:] if isinstance(completion, list) else completion), wanted
        )
        for completion, wanted in zip(completions, answer, strict=True)
    ]


def _verdict(said: str | None, wanted: Any) -> float | None:
    reference = str(wanted)
    marked = find_answer(reference, "hash") or find_answer(reference, "boxed")
    right = _read(reference[marked.start : marked.end] if marked else reference)
    if not right:
        return None
    found = find_answer(said or "")
    if said is None or found is None:
        return 0.0
    from math_verify import verify

    return float(verify(right, _read(said[found.start : found.end]), **_timeout("timeout_seconds")))


def _read(text: str) -> list[Any]:
    """All readings of a text: as a formula, and as a sentence that contains one."""
    try:
        from math_verify import parse
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "math_answer needs math-verify; run: pip install 'flowtracer-plugin[math]'",
            name="math_verify",
        ) from error
    limit = _timeout("parsing_timeout")
    return [*parse(rf"\boxed{{{text}}}", **limit), *parse(text, **limit)]


def _timeout(name: str) -> dict[str, int | None]:
    # math-verify uses an alarm, which only the main thread can set.
    if threading.current_thread() is threading.main_thread():
        return {name: 5}
    logging.getLogger("math_verify").setLevel(
        logging.ERROR
    )  # it logs a warning for every such call
    return {name: None}


@cache
def _reward(name: str) -> FlowReward:
    if name == "math_flow":
        return FlowReward(_tracer, outcome=math_answer, name=name)
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
    return wrap(model, load_tokenizer(name))


def named_reward(name: str) -> Callable[..., Any]:
    """`math_answer`, or the reward function of a dotted path.

    Raises:
        ValueError: As `imported_reward`.
    """
    return math_answer if name == "math_answer" else imported_reward(name, ("math_answer",))


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
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # as TRL's own script does
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import the reward {path!r}: {error}") from error
    if not callable(found) or isinstance(found, type):
        raise ValueError(
            f"the reward {path!r} must be a function or an instance that can be called, "
            f"got {found!r}"
        )
    return found
