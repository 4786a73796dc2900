"""The metrics, table columns and pages that a trainer with flow credit logs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flowtracer_plugin.files import write_atomically
from flowtracer_plugin.flow.torch_arrays import sent
from flowtracer_plugin.grpo.checks import find_tokenizer
from flowtracer_plugin.grpo.options import CreditOptions
from flowtracer_plugin.grpo.pages import GroupPages, rows_each
from flowtracer_plugin.grpo.scoring import Scored
from flowtracer_plugin.grpo.settings import credit_settings, with_credit
from flowtracer_plugin.grpo.trackers import WhenTrackersBegin, send_settings
from flowtracer_plugin.text.spans import AnswerNotFoundError, decode_tokens
from flowtracer_plugin.trace.troubles import Troubles

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
        self._troubles = Troubles(logger)
        self._pages = GroupPages(trainer, options, self._troubles)
        self._later = 0  # rows that TRL's table has after those of the last generation
        self._errors = 0.0
        trainer.add_callback(WhenTrackersBegin(self._send_settings))

    def blank(self, rows: int) -> None:
        """Fill the columns with None, since all columns of TRL's table need the same length."""
        everywhere = rows * self._trainer.accelerator.num_processes
        self._later += everywhere
        if self._trainer.log_completions:
            with self._troubles.caught("the table of completions lacks the columns of flow"):
                for column in COLUMNS:
                    self._trainer._logs["extra"][column].extend([None] * everywhere)

    def begin(self, rollouts: Mapping[str, Any]) -> None:
        """Begin with new rollouts, whose flow is not known yet."""
        self.blank(len(rollouts["advantages"]))
        self._later = 0
        self._pages.begin(rollouts)

    def _send_settings(self) -> None:
        with self._troubles.caught("the trackers lack the options of the credit"):
            send_settings(self._trainer, credit_settings(self._options))

    def write_card(self) -> None:
        """Add the options of the credit to the model card that the trainer has just written."""
        path = Path(self._trainer.args.output_dir) / "README.md"
        if self._trainer.is_world_process_zero():
            with self._troubles.caught("the model card lacks the options of the credit"):
                card = with_credit(path.read_text("utf-8"), credit_settings(self._options))
                write_atomically(path, card.encode())

    def read(
        self,
        rollouts: Mapping[str, Any],
        heard: Scored | Exception,
        competing: Bool[Tensor, "batch completion"],
        weights: Float[Tensor, "batch completion"],
        boost: Float[Tensor, "batch completion"],
    ) -> tuple[dict[str, float], Scored | Exception]:
        """The sums over all processes for the metrics, and what was heard with all its errors.

        The host waits for the device here, once. Every process calls this equally often.
        """
        local = self._local(rollouts, heard, competing, weights, boost)
        accelerator = self._trainer.accelerator
        sums = _stacked(list(local.values()), accelerator.device)
        parts = [accelerator.reduce(sums, reduction="sum")]
        if isinstance(heard, Scored) and heard.wrong is not None:
            parts.append(heard.wrong.to(sums))
        read = torch.cat(parts).tolist()
        total, wrong = read[: len(local)], read[len(local) :]
        if isinstance(heard, Scored):
            heard = heard.read([bool(one) for one in wrong])
        return dict(zip(local, total, strict=True)), heard

    def add(
        self,
        rollouts: Mapping[str, Any],
        heard: Scored | Exception,
        plain: Tensor,
        competing: Bool[Tensor, "batch completion"],
        total: Mapping[str, float],
    ) -> None:
        """Log the credit of some rollouts, given what `read` returns; every process calls this.

        Raises:
            AnswerNotFoundError: A completion has no answer, and `no_answer` is "raise".
        """
        errors = {0: heard} if isinstance(heard, Exception) else heard.errors
        which = "these completions" if isinstance(heard, Exception) else "a completion"
        for error in errors.values():
            self._troubles.add(f"flow credit failed, and {which} got plain credit", error)
        if self._options.no_answer == "raise":
            self._require_answers(total)
        self._errors += total["errors"]
        with self._troubles.caught("the metrics of flow could not be logged"):
            metrics = self._trainer._metrics["train"]
            metrics["flow/errors"] = [self._errors]  # a total, so it is not averaged
            for name, part, whole in METRICS:
                # TRL leaves nan out of its means.
                mean = total[part] / total[whole] if total[whole] else math.nan
                metrics[f"flow/{name}"].append(mean)
        if "flow_rows" in rollouts:  # rollouts made before flow credit was attached have none
            if self._trainer.log_completions:
                self._fill_columns(rollouts, heard, competing)
            self._pages.add(rollouts, heard, plain, competing)

    def _local(
        self,
        rollouts: Mapping[str, Any],
        heard: Scored | Exception,
        competing: Bool[Tensor, "batch completion"],
        weights: Float[Tensor, "batch completion"],
        boost: Float[Tensor, "batch completion"],
    ) -> dict[str, Any]:
        """The sums of this process; all processes have the same ones, whatever happens here."""
        visible = rollouts["completion_mask"].bool().any(-1)
        sums = {
            "visible": visible.sum(),
            "tokens": competing.sum(),
            "weight": (weights * competing).sum(),
            "processes": 1,
            "errors": isinstance(heard, Exception) or bool(heard.errors) or _any_wrong(heard),
            "failed": _failed(heard, visible),
            **_NOTHING,
        }
        with self._troubles.caught("the metrics of flow could not be computed"):
            if isinstance(heard, Scored):
                sums |= _sums(heard, competing, boost)
        return sums

    def _require_answers(self, total: Mapping[str, float]) -> None:
        missing = total["visible"] - total["answers"] - total["failed"]
        if missing > 0:
            raise AnswerNotFoundError(
                f"no answer found in {missing:.0f} of {total['visible']:.0f} completions; set "
                "flow_answer to a finder that fits, or "
                "flow_no_answer='uniform' to give such completions plain credit"
            )

    def _fill_columns(
        self,
        rollouts: Mapping[str, Any],
        heard: Scored | Exception,
        competing: Bool[Tensor, "batch completion"],
    ) -> None:
        """Write the values of these rows of every process to their places in TRL's table."""
        trouble = "the table of completions lacks values of flow"
        values: list[tuple[Any, ...]] = []
        with self._troubles.caught(trouble):
            values = self._values(rollouts, heard, competing)
        for place, *row in gather_object(values):  # all processes meet here
            with self._troubles.caught(trouble):
                for column, value in zip(COLUMNS, row, strict=True):
                    known = self._trainer._logs["extra"][column]
                    if place <= len(known):  # an evaluation may have pushed the row out
                        known[-place] = value

    def _values(
        self,
        rollouts: Mapping[str, Any],
        heard: Scored | Exception,
        competing: Bool[Tensor, "batch completion"],
    ) -> list[tuple[Any, ...]]:
        """The place of each row in TRL's table, counted from its end, and its values."""
        trainer, rows = self._trainer, len(competing)
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
        return [*zip(places, answers, means, jumps, strict=True)]


def _failed(heard: Scored | Exception, visible: Bool[Tensor, " batch"]) -> Int[Tensor, ""]:
    """The number of completions in which no answer was found because something failed."""
    if isinstance(heard, Exception):
        return visible.sum()
    failed = torch.zeros_like(visible) if heard.wrong is None else heard.wrong.clone()
    for row in heard.errors:
        failed[row] = True
    return (failed & visible & ~heard.rollouts.answer.any(-1)).sum()


def _any_wrong(heard: Scored) -> Bool[Tensor, ""] | bool:
    return False if heard.wrong is None else heard.wrong.any()


def _stacked(values: Sequence[Any], device: torch.device) -> Float[Tensor, " value"]:
    """Numbers of the host and of the device, in one tensor that the host does not wait for."""
    known = sent([0.0 if isinstance(one, Tensor) else float(one) for one in values], device)
    nothing = known.new_zeros(())
    found = [one.to(known) if isinstance(one, Tensor) else nothing for one in values]
    return known + torch.stack(found)


def _answer_texts(heard: Scored, tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    rows = zip(heard.rollouts.ids, heard.rollouts.answer, strict=True)
    return [
        decode_tokens(tokenizer, ids[answer].tolist()).text if bool(answer.any()) else None
        for ids, answer in rows
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
