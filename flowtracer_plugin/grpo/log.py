"""The metrics, table columns and pages that a trainer with flow credit logs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flowtracer_plugin.grpo.checks import find_tokenizer
from flowtracer_plugin.grpo.options import CreditOptions
from flowtracer_plugin.grpo.pages import GroupPages, rows_each
from flowtracer_plugin.grpo.scoring import Scored
from flowtracer_plugin.text.spans import AnswerNotFoundError

logger = logging.getLogger(__name__)

METRICS = (
    ("answer_found", "answers", "visible"),
    ("weight_mean", "weight", "tokens"),
    ("top_share", "top", "flowing"),
    ("entropy", "entropy", "flowing"),
    ("prompt_jump", "jump", "traced"),
    ("seconds", "seconds", "processes"),
)
"""Name of each metric, and the two sums over all processes whose quotient it is."""

COLUMNS = ("flow_answer", "flow_weight", "flow_prompt_jump")


class CreditLog:
    """The metrics, columns and pages of one trainer."""

    def __init__(self, trainer: Any, options: CreditOptions) -> None:
        self._trainer, self._options = trainer, options
        self._pages = GroupPages(trainer, options)
        self._later = 0  # rows that TRL's table has after those of the last generation
        self._errors = 0.0

    def blank(self, rows: int) -> None:
        """Fill the columns with None, since all columns of TRL's table need the same length."""
        everywhere = rows * self._trainer.accelerator.num_processes
        self._later += everywhere
        if self._trainer.log_completions:
            for column in COLUMNS:
                self._trainer._logs["extra"][column].extend([None] * everywhere)

    def begin(self, rollouts: Mapping[str, Any]) -> None:
        """Begin with new rollouts, whose flow is not known yet."""
        self.blank(len(rollouts["advantages"]))
        self._later = 0
        self._pages.begin(rollouts)

    def add(
        self,
        rollouts: Mapping[str, Any],
        heard: Scored | Exception,
        plain: Tensor,
        competing: Bool[Tensor, "batch completion"],
        boost: Float[Tensor, "batch completion"],
    ) -> None:
        """Log the credit of some rollouts; every process calls this equally often.

        Raises:
            AnswerNotFoundError: A completion has no answer, and `no_answer` is "raise".
        """
        if isinstance(heard, Exception):
            logger.warning(
                "flow credit failed, and these rollouts get plain credit", exc_info=heard
            )
        weights = rollouts["flow_weights"]
        visible = rollouts["completion_mask"].bool().any(-1)
        local = {
            "visible": visible.sum(),
            "tokens": competing.sum(),
            "weight": (weights * competing).sum(),
            "processes": 1,
            "errors": isinstance(heard, Exception),
            **(_sums(heard, competing, boost) if isinstance(heard, Scored) else _NOTHING),
        }
        total = self._reduced(local)
        if self._options.no_answer == "raise" and not total["errors"]:
            self._require_answers(total)
        metrics = self._trainer._metrics["train"]
        self._errors += total["errors"]
        metrics["flow/errors"] = [self._errors]  # a total, so it is not averaged
        for name, part, whole in METRICS:
            # TRL leaves nan out of its means.
            metrics[f"flow/{name}"].append(total[part] / total[whole] if total[whole] else math.nan)
        if "flow_rows" in rollouts:  # rollouts made before flow credit was attached have none
            if self._trainer.log_completions:
                self._fill_columns(rollouts, heard, competing)
            self._pages.add(rollouts, heard, plain, competing)

    def _reduced(self, local: Mapping[str, Any]) -> dict[str, float]:
        accelerator = self._trainer.accelerator
        sums = torch.tensor([float(value) for value in local.values()], device=accelerator.device)
        return dict(zip(local, accelerator.reduce(sums, reduction="sum").tolist(), strict=True))

    def _require_answers(self, total: Mapping[str, float]) -> None:
        if total["answers"] < total["visible"]:
            raise AnswerNotFoundError(
                f"no answer found in {total['visible'] - total['answers']:.0f} of "
                f"{total['visible']:.0f} completions; set flow_answer to a finder that fits, or "
                "flow_no_answer='uniform' to give such completions plain credit"
            )

    def _fill_columns(
        self,
        rollouts: Mapping[str, Any],
        heard: Scored | Exception,
        competing: Bool[Tensor, "batch completion"],
    ) -> None:
        """Write the values of these rows of every process to their places in TRL's table."""
        trainer = self._trainer
        rows = len(competing)
        counts = competing.sum(-1).clamp(min=1)
        means = ((rollouts["flow_weights"] * competing).sum(-1) / counts).tolist()
        answers: list[str | None] = [None] * rows
        jumps: list[float | None] = [None] * rows
        if isinstance(heard, Scored):
            answers = _answer_texts(heard, find_tokenizer(trainer.processing_class))
            jumps = [None if math.isnan(jump) else jump for jump in heard.jump.tolist()]
        first = trainer.accelerator.process_index * rows_each(trainer)
        last = trainer.args.generation_batch_size + self._later
        places = [last - first - row for row in rollouts["flow_rows"].tolist()]
        for place, *values in gather_object([*zip(places, answers, means, jumps, strict=True)]):
            for column, value in zip(COLUMNS, values, strict=True):
                known = trainer._logs["extra"][column]
                if place <= len(known):  # an evaluation may have pushed the row out
                    known[-place] = value


def _answer_texts(heard: Scored, tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    rows = zip(heard.rollouts.ids, heard.rollouts.answer, strict=True)
    return [
        str(tokenizer.decode(ids[answer])) if bool(answer.any()) else None for ids, answer in rows
    ]


_NOTHING = dict.fromkeys(("answers", "traced", "jump", "flowing", "top", "entropy", "seconds"), 0.0)


def _sums(
    heard: Scored,
    competing: Bool[Tensor, "batch completion"],
    boost: Float[Tensor, "batch completion"],
) -> dict[str, Any]:
    """The sums of some rollouts for the metrics."""
    answers = sum(answer is not None for answer in heard.answers) - heard.replaced
    traced = ~heard.jump.isnan()
    sums = {
        **_NOTHING,
        "answers": answers,
        "traced": traced.sum(),
        "jump": heard.jump.nansum(),
        "seconds": heard.seconds,
    }
    throughput = heard.rollouts.throughput
    if throughput is None:
        return sums
    flow = throughput[:, heard.rollouts.prompt_length :] * competing
    total = flow.sum(-1, keepdim=True)
    share = flow / total.where(total > 0, 1.0)
    spread = torch.special.entr(share).sum(-1)
    most = competing.sum(-1).clamp(min=2).float().log()
    return {
        **sums,
        "flowing": (total > 0).sum(),
        "top": (share * (boost > 0)).sum(),
        "entropy": (spread / most).sum(),
    }
