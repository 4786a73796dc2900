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
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

# First, since it starts a process that gets ready while this one imports PyTorch.
from flowtracer_plugin.rewards.referee import RefusedError, verdict

# isort: split
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
    `equal_answers` judges it, and `docs/rewards.md` says what is equal: `1/2`, `0.5` and
    `\frac{1}{2}` are, as are `72` and `72 clips`. In a reference such as GSM8K's, the part after
    `####` or in `\boxed{}` counts. The reward is None, which TRL leaves out, if the reference
    cannot be read.

    Every judgement comes back within a second, in any thread and in any fork: what needs algebra
    is judged by another process, which starts when this function is imported and is ready a second
    or two later. What takes longer is refused: it earns 0, a warning says how many were refused,
    and TRL logs their share as `math_answer/refused`.

    Raises:
        ValueError: The data have no column `answer`.
        ModuleNotFoundError: latex2sympy2_extended is missing; the extra `math` installs it.

    Example:
        >>> math_answer([r"3 + 4 makes \boxed{7}", "#### 8"], ["#### 7", "7"])
        [1.0, 0.0]
    """
    if answer is None:
        raise ValueError(
            "math_answer needs the right answers in a column `answer` of the data; rename it, or "
            "with `flowtracer train` name it by --answer_column"
        )
    if importlib.util.find_spec("latex2sympy2_extended") is None:
        raise ModuleNotFoundError(
            "math_answer needs latex2sympy2_extended; run: pip install 'flowtracer-plugin[math]'",
            name="latex2sympy2_extended",
        )
    pairs = [
        (_reference(wanted), _said(completion))
        for completion, wanted in zip(completions, answer, strict=True)
    ]
    judged: dict[tuple[str, str | None], float | None] = {}
    for gold, said in dict.fromkeys(pairs):
        unreadable = any(found is None for (own, _), found in judged.items() if own == gold)
        judged[gold, said] = None if unreadable else _verdict(gold, said)
    verdicts = [judged[pair] for pair in pairs]
    _log_refused(verdicts.count(REFUSED), len(verdicts), columns.get("log_metric"))
    return [0.0 if verdict == REFUSED else verdict for verdict in verdicts]


REFUSED = -1.0


def _reference(wanted: Any) -> str:
    reference = str(wanted)
    marked = find_answer(reference, "hash") or find_answer(reference, "boxed")
    return reference[marked.start : marked.end] if marked else reference


def _said(completion: Any) -> str | None:
    text = completion_text(completion[-1:] if isinstance(completion, list) else completion)
    found = find_answer(text or "")
    return _with_units(text, found.start, found.end) if text and found else None


def _with_units(text: str, start: int, end: int) -> str:
    """The answer with its sign of a currency, percent or degrees, which finders leave outside."""
    if text[start - 1 : start] in _CURRENCIES and not (
        text[start - 1] == text[end : end + 1] == "$"
    ):
        start -= bool(start)
    unit = _UNIT.match(text, end)
    return text[start : unit.end() if unit else end]


_CURRENCIES = tuple("$€£₹¥₩")
_UNIT = re.compile(r"\s?\\?%|°[CF]?")


def _verdict(gold: str, said: str | None) -> float | None:
    try:
        right = verdict(gold, said or "")
    except RefusedError:
        return REFUSED
    return None if right is None else float(right)


def _log_refused(refused: int, judged: int, log_metric: Callable[..., None] | None) -> None:
    if refused:
        logging.getLogger(__name__).warning(
            "math_answer refused %d of %d answers, which take too long to judge: they earn 0",
            refused,
            judged,
        )
    if log_metric is not None and judged:
        log_metric("math_answer/refused", refused / judged)


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
