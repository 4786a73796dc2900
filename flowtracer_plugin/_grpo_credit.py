"""Credit for a trainer's rollouts: traced in an extra forward pass, spread over advantages."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from trl.extras.profiling import profiling_context

from flowtracer_plugin._grpo_checks import check_trainer, find_tokenizer
from flowtracer_plugin.answers import AnswerFinder, Span, find_answer
from flowtracer_plugin.credit import token_credit, top_tokens
from flowtracer_plugin.rollouts import FlowBatch
from flowtracer_plugin.spans import AnswerNotFoundError
from flowtracer_plugin.tracer import FlowTracer, wrap


@dataclass(frozen=True, kw_only=True, slots=True)
class CreditOptions:
    """How flow becomes credit; `FlowGRPOConfig` explains each option under `flow_<name>`.

    Raises:
        ValueError: A value is out of range or not among the choices.
    """

    top_fraction: float = 0.4
    gamma: float = 1.5
    layers: str | Sequence[int] = "middle"
    answer: AnswerFinder = "auto"
    target: str = "answer"
    sign: str = "both"
    normalize: str = "none"
    no_answer: str = "uniform"

    def __post_init__(self) -> None:
        """Refuse what no option can be; `wrap` checks the layers."""
        if not 0 <= self.top_fraction <= 1:
            raise ValueError(
                f"flow credit: top_fraction must be between 0 and 1, got {self.top_fraction!r}"
            )
        if not (self.gamma >= 0 and math.isfinite(self.gamma)):
            raise ValueError(f"flow credit: gamma must be at least 0, got {self.gamma!r}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"flow credit: {name} must be one of {', '.join(choices)}, "
                    f"got {getattr(self, name)!r}"
                )
        if not callable(self.answer):
            find_answer("", self.answer)


_CHOICES = {
    "target": ("answer", "decision"),
    "sign": ("both", "positive", "negative"),
    "normalize": ("none", "mean_one"),
    "no_answer": ("uniform", "raise", "last"),
}


class FlowCredit:
    """The credit of one trainer's completions: traces them and spreads their advantages.

    Raises:
        UnsupportedTrainerError: The trainer cannot use one advantage per token.
        ImportError: The installed TRL is another than those that are known to work.
        ValueError: Importance sampling is not per token, or the trainer has no tokenizer.
        NoAttentionError, UnsupportedArchitectureError: The tracer cannot read the model.
    """

    def __init__(self, trainer: Any, options: CreditOptions) -> None:
        check_trainer(trainer)
        self.options = options
        self._trainer = trainer
        self._tracer = self._wrap()

    def spread(self, rollouts: dict[str, Any]) -> dict[str, Any]:
        """The same rollouts with one advantage per token; in evaluation, as they came.

        Every process runs its model equally often, whatever it finds in its rollouts.

        Raises:
            AnswerNotFoundError: There is no answer in a completion, and `no_answer` is "raise".
            NotImplementedError: The rollouts hold images.
            ValueError: The flow is not finite.
        """
        if not self._trainer.model.training:
            return rollouts
        if "pixel_values" in rollouts:
            raise NotImplementedError(
                "flow credit reads text only, and these rollouts hold images; train on text, or "
                "with trl.GRPOTrainer"
            )
        with profiling_context(self._trainer, "flow_credit"):
            weights = self._weights(rollouts)
        rollouts["advantages"] = _per_token(rollouts["advantages"]) * weights
        return rollouts

    def _weights(self, rollouts: Mapping[str, Tensor]) -> Float[Tensor, "batch completion"]:
        started, options = time.perf_counter(), self.options
        visible = rollouts["completion_mask"].bool()
        # A tool's tokens are part of what the model read, but it did not choose them.
        chosen_by_model = visible & rollouts.get("tool_mask", visible).bool()
        finder = _FinderOrLast(options.answer)
        batch = self._trace(rollouts, finder if options.no_answer == "last" else options.answer)
        flow = batch.completion_throughput
        credit = token_credit(
            flow,
            chosen_by_model,
            top_fraction=options.top_fraction,
            gamma=options.gamma,
            normalize=options.normalize,
        )
        weights = torch.where(chosen_by_model & self._signed(rollouts["advantages"]), credit, 1.0)
        top = top_tokens(flow, chosen_by_model, top_fraction=options.top_fraction)
        total = (flow * chosen_by_model).sum(-1)
        answers = sum(answer is not None for answer in batch.answers) - finder.fallbacks
        self._log(
            visible=visible.any(-1).sum(),
            answers=answers,
            traced=batch.found.sum(),
            reasoning=batch.reasoning_share.sum(),
            flowing=(total > 0).sum(),
            top=((flow * top).sum(-1) / total.where(total > 0, 1.0)).sum(),
            tokens=chosen_by_model.sum(),
            weight=(weights * chosen_by_model).sum(),
            processes=1,
            seconds=time.perf_counter() - started,
        )
        return weights

    def _trace(self, rollouts: Mapping[str, Tensor], finder: AnswerFinder) -> FlowBatch:
        # Sharding puts another root around the model when the training starts.
        if self._tracer.model is not self._trainer.model:
            self._tracer = self._wrap()
        return self._tracer.trace_ids(
            rollouts["prompt_ids"],
            rollouts["completion_ids"],
            rollouts["prompt_mask"],
            rollouts["completion_mask"],
            batch_size=self._trainer.args.per_device_train_batch_size,
            answer=finder,
        )

    def _wrap(self) -> FlowTracer:
        options, trainer = self.options, self._trainer
        return wrap(
            trainer.model,
            find_tokenizer(trainer.processing_class),
            layers=options.layers,
            answer=options.answer,
            target=options.target,
        )

    def _signed(self, advantages: Float[Tensor, "..."]) -> Bool[Tensor, " batch #completion"]:
        """Where the advantage has a sign that is reweighted."""
        per_token = _per_token(advantages)
        if self.options.sign == "both":
            return torch.ones_like(per_token, dtype=torch.bool)
        return per_token > 0 if self.options.sign == "positive" else per_token < 0

    def _log(self, **local: Any) -> None:
        """Add the metrics of all processes' rollouts, from sums over those of this one."""
        trainer = self._trainer
        device = trainer.accelerator.device
        sums = torch.tensor([float(value) for value in local.values()], device=device)
        reduced = trainer.accelerator.reduce(sums, reduction="sum").tolist()
        total = dict(zip(local, reduced, strict=True))
        if self.options.no_answer == "raise" and total["answers"] < total["visible"]:
            raise AnswerNotFoundError(
                f"no answer found in {total['visible'] - total['answers']:.0f} of "
                f"{total['visible']:.0f} completions; set flow_answer to a finder that fits, or "
                "flow_no_answer='uniform' to give such completions plain credit"
            )
        for name, part, whole in _METRICS:
            # TRL leaves nan out of its means.
            mean = total[part] / total[whole] if total[whole] else math.nan
            trainer._metrics["train"][f"flow/{name}"].append(mean)


_METRICS = (
    ("answer_found", "answers", "visible"),
    ("weight_mean", "weight", "tokens"),
    ("top_share", "top", "flowing"),
    ("reasoning_share", "reasoning", "traced"),
    ("seconds", "seconds", "processes"),
)


class _FinderOrLast:
    """An answer finder, and where it finds nothing, the last character that is no space."""

    def __init__(self, finder: AnswerFinder) -> None:
        self.fallbacks = 0
        self._finder = finder

    def __call__(self, text: str) -> Span | None:
        found = find_answer(text, self._finder)
        if found is not None:
            return found.start, found.end
        end = len(text.rstrip())
        self.fallbacks += end > 0
        return (end - 1, end) if end else None


def _per_token(advantages: Float[Tensor, "..."]) -> Float[Tensor, " batch #completion"]:
    return advantages[:, None] if advantages.ndim == 1 else advantages
