"""The reward for right answers.

Importing this module starts the process that judges formulas, so that it is ready when the first
answers are. `flowtracer_plugin.rewards.named` therefore imports it late.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

# First, since it starts a process that gets ready while this one imports PyTorch.
from flowtracer_plugin.extras import install
from flowtracer_plugin.rewards.referee import RefusedError, verdict

# isort: split
from flowtracer_plugin.rewards.flow_reward import completion_text
from flowtracer_plugin.text.answers import find_answer
from flowtracer_plugin.text.thinking import leaves_thinking_open


def math_answer(
    completions: Sequence[Any], answer: Sequence[Any] | None = None, **columns: Any
) -> list[float | None]:
    r"""1 where the answer of a completion equals the one in the column `answer`, 0 where not.

    `find_answer` finds the answer of a completion, so that the rewarded answer is the traced one.
    `equal_answers` judges it, and `docs/rewards.md` says what is equal: `1/2`, `0.5` and
    `\frac{1}{2}` are, as are `72` and `72 clips`. In a reference such as GSM8K's, the part after
    `####` or in `\boxed{}` counts. The reward is None, which TRL leaves out, if the reference
    cannot be read.

    Every judgement ends after at most 0.3 s of computing, in any thread and in any fork: what
    needs algebra is judged by another process, which starts when this module is imported and is
    ready a second or two later. What takes longer is refused: it earns 0, a warning says how many
    were refused, and TRL logs their share as `math_answer/refused`.

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
            f"math_answer needs latex2sympy2_extended; run: {install('math')}",
            name="latex2sympy2_extended",
        )
    prompts = columns.get("prompts") or [None] * len(completions)
    pairs = [
        (_reference(wanted), _said(completion, prompt))
        for completion, wanted, prompt in zip(completions, answer, prompts, strict=True)
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
    return _with_units(reference, marked.start, marked.end) if marked else reference


def _said(completion: Any, prompt: Any) -> str | None:
    text = completion_text(completion[-1:] if isinstance(completion, list) else completion)
    opened = isinstance(prompt, str) and leaves_thinking_open(prompt)
    found = find_answer(text or "", in_thinking=opened)
    return _with_units(text, found.start, found.end) if text and found else None


def _with_units(text: str, start: int, end: int) -> str:
    """The answer with its sign of a currency, percent or degrees, which finders leave outside."""
    sign = text[start - 1 : start]
    if sign in _CURRENCIES and not (sign == "$" == text[end : end + 1]):
        start -= 1
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
