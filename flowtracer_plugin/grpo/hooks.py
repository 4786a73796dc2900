"""The credit of a trainer's rollouts: methods that wrap those of `GRPOTrainer`.

TRL's `_compute_loss` runs the model before it uses the advantages, so the attention can be read in
the pass that trains. If TRL first scores the rollouts in a pass of its own, it is read there.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from trl.extras.profiling import profiling_context
from trl.trainer.grpo_trainer import GRPOTrainer

from flowtracer_plugin.attention.adapter import find_adapter
from flowtracer_plugin.credit.read_rollouts import Late
from flowtracer_plugin.credit.scorers import LATE, credit_weights
from flowtracer_plugin.grpo.checks import (
    UnsupportedTrainerError,
    check_loss_on,
    check_trainer,
    find_tokenizer,
)
from flowtracer_plugin.grpo.log import CreditLog
from flowtracer_plugin.grpo.options import CreditOptions
from flowtracer_plugin.grpo.scoring import RolloutScorer, Scored
from flowtracer_plugin.grpo.settings import credit_settings, settings_line
from flowtracer_plugin.model.causal_lm import evaluating, unwrapped
from flowtracer_plugin.model.parallel import is_compiled, may_stop, tensor_parallel_group
from flowtracer_plugin.trace.rollouts import OnHost, to_host
from flowtracer_plugin.trace.tracer import wrap

logger = logging.getLogger(__name__)

WEIGHTS, ROWS = "flow_weights", "flow_rows"
"""Keys that are added to TRL's rollouts: the weight of each token and the place of each row."""

_SCORING = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)[1:]
"""The arguments of TRL's method, in order; methods of subclasses may have more."""

_READ = {"model", "input_ids", "attention_mask", "logits_to_keep"}
"""The arguments that must be given to read a pass."""

Passed = tuple[Tensor, Tensor | None, Tensor | None]
"""What TRL's method returns: log-probabilities, entropies, auxiliary loss of the experts."""

Forward = Callable[..., Passed]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class _Heard:
    """A forward pass over some rollouts, and their scores or the error of scoring them."""

    ids: Int[Tensor, "batch token"]
    visible: Bool[Tensor, "batch token"]
    result: Scored | Exception


class FlowCredit:
    """The credit of one trainer's completions; it wraps four `GRPOTrainer` methods.

    Its options stand in the log, and as `flow_credit` in the trainer's `args`.

    Raises:
        UnsupportedTrainerError: The trainer cannot use one advantage per token.
        ImportError: The installed TRL release is not supported.
        ValueError: Importance sampling is not per token, or the trainer has no tokenizer.
        NoAttentionError, UnsupportedArchitectureError: The tracer cannot read the model.
    """

    def __init__(self, trainer: Any, options: CreditOptions) -> None:
        self.options = options
        self._trainer = trainer
        self._checked = check_trainer(trainer)
        self._log = CreditLog(trainer, options)
        self._scoring = self._rollout_scorer()
        self._begun = False
        self._gamma: float | None = None  # None for plain credit
        self._policy: Any = None
        self._hears: list[_Heard] | None = None  # the passes of the current generation
        self._inputs: dict[str, Any] | None = (
            None  # the rollouts of the current loss, until their pass comes
        )
        trainer.args.flow_credit = credit_settings(options)
        logger.info("flow credit: %s", settings_line(trainer.args.flow_credit))

    def generation(self, generate: Callable[[Any], dict[str, Any]], inputs: Any) -> dict[str, Any]:
        """Wrap `_generate_and_score_completions`; weigh rollouts that are read before training."""
        if not self._trainer.model.training:
            rollouts = generate(inputs)
            self._log.blank(len(rollouts["advantages"]))
            return rollouts
        self._begin()
        chosen, heard = self.options.pass_, None
        self._hears = [] if self._gamma is not None and chosen in ("auto", "scoring") else None
        try:
            rollouts = generate(inputs)
            heard = self._heard(rollouts)
        finally:
            self._hears = None
        rollouts[ROWS] = torch.arange(len(rollouts["advantages"]))
        self._log.begin(rollouts)
        if self._gamma is None:
            rollouts[WEIGHTS] = torch.ones_like(rollouts["completion_mask"], dtype=torch.float32)
        elif heard is not None:
            self._weigh(rollouts, heard.result)
        elif chosen == "extra":
            self._weigh(rollouts, self._extra(rollouts))
        elif chosen == "scoring":
            raise ValueError(
                "flow_pass='scoring' needs a pass of TRL's over the rollouts before training, and "
                "with these settings there is none (num_iterations=1, aligned accumulation, no "
                "vLLM correction); set flow_pass='auto'"
            )
        return rollouts

    def loss(
        self, compute: Callable[[Any, dict[str, Any]], Tensor], model: Any, inputs: dict[str, Any]
    ) -> Tensor:
        """Wrap `_compute_loss`: weigh rollouts without weights in the forward pass of the loss."""
        if not self._trainer.model.training:
            return compute(model, inputs)
        if not self._checked:
            check_loss_on(self._trainer, compute, model, inputs)
            self._checked = True
        if WEIGHTS in inputs:
            return compute(model, inputs)
        if not self._begun:  # attached to a trainer that already had rollouts
            self._begin()
        self._inputs = inputs
        try:
            loss = compute(model, inputs)
            if self._inputs is not None and self._gamma is not None:
                raise UnsupportedTrainerError(
                    f"the loss of {type(self._trainer).__name__} runs the policy on other tokens "
                    "than its rollouts', so there is no pass to read; set flow_pass='extra'"
                )
            return loss
        finally:
            self._inputs = None

    def forward(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """Wrap `_get_per_token_logps_and_entropies`; read the attention of the right pass."""
        if self._hears is None and self._inputs is None:
            return forward(*args, **kwargs)
        given = {**dict(zip(_SCORING, args, strict=False)), **kwargs}
        if not given.keys() >= _READ or not self._is_policy(given["model"]):
            return forward(*args, **kwargs)
        if self._hears is not None:
            if "entropy" in self._scoring.scorer.needs:
                kwargs = {**kwargs, "compute_entropy": True}
            returned, heard = self._listen(partial(forward, *args, **kwargs), given)
            self._hears.append(heard)
            return returned
        inputs, ids, visible = self._inputs, given["input_ids"], given["attention_mask"].bool()
        assert inputs is not None
        if self._gamma is None or not _fits(ids, inputs):
            return forward(*args, **kwargs)
        host, over = to_host(ids, visible, _is_over(ids, visible, inputs))
        if not over[0]:
            return forward(*args, **kwargs)
        self._inputs = None
        returned, heard = self._listen(partial(forward, *args, **kwargs), given, host)
        self._weigh(inputs, heard.result)
        return returned

    def model_card(self, create: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Wrap `create_model_card`; add the options of the credit."""
        create(*args, **kwargs)
        self._log.write_card()

    def _begin(self) -> None:
        """Prepare everything for the next rollouts that does not depend on them."""
        self._begun = True
        step = self._trainer.state.global_step
        started = step >= self.options.start_step
        self._gamma = self.options.gamma_at(step) if started else None
        self._policy = _adapters(self._trainer.model)
        # Sharding wraps the model in another root when the training starts.
        if self._scoring.tracer.model is not unwrapped(self._trainer.model):
            self._scoring = self._rollout_scorer()
        if started and self._scoring.attends:
            # With the head that TRL uses: ZeRO-3 needs the same modules in every pass.
            self._scoring.tracer.reader.verify(lambda ids: {"labels": ids, "fused_lm_head": True})
        if started:
            self._scoring.prepare()

    def _is_policy(self, model: Any) -> bool:
        """Whether `model` is the policy and not a reference, which may differ in adapters only."""
        trainer = self._trainer
        bare = [unwrapped(trainer.accelerator.unwrap_model(m)) for m in (model, trainer.model)]
        return bare[0] is bare[1] and _adapters(trainer.model) == self._policy

    def _listen(
        self, forward: Callable[[], Passed], given: Mapping[str, Any], host: OnHost | None = None
    ) -> tuple[Passed, _Heard]:
        """What TRL's method returns, and the scores of the attention in its pass.

        `host` is a copy of the ids and the mask, if there is one.
        """
        began: list[bool] = []
        returned: list[Passed] = []

        def call() -> Late:
            began.append(True)
            returned.append(forward())
            chances, entropies, *_ = returned[0]
            return Late(_detached(entropies), _detached(chances, -1))

        ids, visible = given["input_ids"], given["attention_mask"].bool()
        prompt_length = ids.shape[1] - given["logits_to_keep"]
        size = given.get("batch_size") or len(ids)
        # A compiled graph does not show the attention's outputs.
        graph = torch.is_grad_enabled() and not is_compiled(given["model"])
        chances = (lambda: returned[0][0]) if graph else None
        listen = partial(
            self._scoring.listen, call, ids, visible, prompt_length, size, chances, host
        )
        result = self._attempted(listen, excused=lambda: bool(returned) or not began)
        if not returned:
            call()
        return returned[0], _Heard(ids=ids, visible=visible, result=result)

    def _extra(self, rollouts: Mapping[str, Any]) -> Scored | Exception:
        """The scores of an additional pass without dropout, up to the last layer that is read."""
        trainer = self._trainer
        ids, visible = _whole(rollouts)
        size, kept = trainer.args.per_device_train_batch_size, rollouts["completion_ids"].shape[1]
        others = {name: rollouts[name] for name in _SCORING if name in rollouts}
        with profiling_context(trainer, "flow_credit"), torch.no_grad():
            whole = bool(self._scoring.scorer.needs & LATE) or not may_stop(trainer.model)
            if not others and not whole:
                prompt_length = ids.shape[1] - kept
                return self._attempted(
                    partial(self._scoring.read, ids, visible, prompt_length, size)
                )
            # Images, entropies and sharded models need TRL's own pass through the whole model.
            self._hears = []
            try:
                with evaluating(trainer.model):
                    trainer._get_per_token_logps_and_entropies(
                        trainer.model, ids, visible.long(), kept, batch_size=size, **others
                    )
                heard = self._heard(rollouts)
            finally:
                self._hears = None
        if heard is None:
            raise UnsupportedTrainerError(
                f"{type(trainer).__name__} runs the policy on other tokens than it is given, so "
                "there is no pass to read; give it a FlowReward as reward function instead"
            )
        return heard.result

    def _heard(self, rollouts: Mapping[str, Any]) -> _Heard | None:
        """The pass over exactly these rollouts, or None."""
        passes = self._hears or ()
        return next(
            (
                heard
                for heard in passes
                if _fits(heard.ids, rollouts) and bool(_is_over(heard.ids, heard.visible, rollouts))
            ),
            None,
        )

    def _attempted(
        self, work: Callable[[], Scored], excused: Callable[[], bool] = lambda: True
    ) -> Scored | Exception:
        """The result of `work`, or its error if `on_error` gives such a batch plain credit."""
        try:
            return work()
        except Exception as error:
            if self.options.on_error == "raise" or not excused():
                raise
            return error

    def _weigh(self, rollouts: dict[str, Any], found: Scored | Exception) -> None:
        """Multiply the advantages of some rollouts by the weights of their tokens."""
        plain = rollouts["advantages"]
        per_token = plain[:, None] if plain.ndim == 1 else plain
        competing = _competing(rollouts)
        if isinstance(found, Scored):
            found = self._attempted(partial(self._chosen, found, competing))
        boost = torch.zeros_like(competing, dtype=torch.float32)
        if isinstance(found, Scored) and found.boost is not None:
            boost = found.boost
        assert self._gamma is not None
        weights = credit_weights(
            boost, competing, gamma=self._gamma, normalize=self.options.normalize
        )
        weights = torch.where(competing & self._signed(per_token), weights, 1.0)
        total, found = self._log.read(rollouts, found, competing, weights, boost)
        if isinstance(found, Scored) and self.options.on_error == "raise":
            for row, error in found.errors.items():
                error.add_note(
                    f"This happened in completion {row} of {len(plain)}; flow_on_error='uniform' "
                    "gives such a completion plain credit, and the training goes on."
                )
                raise error
        rollouts["advantages"] = per_token * weights
        rollouts[WEIGHTS] = weights
        self._log.add(rollouts, found, plain, competing, total)

    def _chosen(self, found: Scored, competing: Bool[Tensor, "batch completion"]) -> Scored:
        """The scores with the scorer's choice, which ignores the sign of the advantage."""
        started = perf_counter()
        chosen = found.chosen(self._scoring.scorer, competing, self.options.top_fraction)
        return replace(chosen, seconds=found.seconds + perf_counter() - started)

    def _signed(self, per_token: Float[Tensor, " batch #completion"]) -> Bool[Tensor, "..."]:
        """True where advantages of this sign are reweighted."""
        if self.options.sign == "both":
            return torch.ones_like(per_token, dtype=torch.bool)
        return per_token > 0 if self.options.sign == "positive" else per_token < 0

    def _rollout_scorer(self) -> RolloutScorer:
        options, trainer = self.options, self._trainer
        scorer = options.chosen_scorer
        if "heads" in scorer.needs and tensor_parallel_group(trainer.model) is not None:
            raise ValueError(
                f"flow_scorer={scorer.name!r} chooses among all heads, and a tensor parallel model "
                "has only some of them in each process; choose another scorer"
            )
        tracer = wrap(
            trainer.model,
            find_tokenizer(trainer.processing_class),
            preset=scorer.preset or "paper",
            layers=options.chosen_layers,
            answer=options.answer,
            target=options.target,
            # The interface does not disturb compilers, sharding and threads, but not every model
            # attends through it; nnsight reads the others.
            backend="interface" if find_adapter(unwrapped(trainer.model)).interface else "nnsight",
        )
        last = options.no_answer == "last"
        return RolloutScorer(
            tracer, scorer, last=last, seed=trainer.args.seed, oracle=options.oracle
        )


def _detached(values: Tensor | None, factor: int = 1) -> Tensor | None:
    return None if values is None else factor * values.detach()


def _whole(
    rollouts: Mapping[str, Tensor],
) -> tuple[Int[Tensor, "batch token"], Bool[Tensor, "batch token"]]:
    """The ids and the mask of prompts and completions together."""
    ids = torch.cat([rollouts["prompt_ids"], rollouts["completion_ids"]], dim=1)
    mask = torch.cat([rollouts["prompt_mask"], rollouts["completion_mask"]], dim=1)
    return ids, mask.bool()


def _fits(ids: Tensor, rollouts: Mapping[str, Tensor]) -> bool:
    """Whether a forward pass was over as many tokens as these rollouts have."""
    prompts, completions = rollouts["prompt_ids"].shape, rollouts["completion_ids"].shape
    return ids.shape == (prompts[0], prompts[1] + completions[1])


def _is_over(ids: Tensor, visible: Tensor, rollouts: Mapping[str, Tensor]) -> Bool[Tensor, ""]:
    """Whether a forward pass of fitting shape was over exactly these rollouts."""
    wanted = _whole(rollouts)
    return (ids == wanted[0]).all() & (visible == wanted[1]).all()


def _competing(rollouts: Mapping[str, Tensor]) -> Bool[Tensor, "batch completion"]:
    """True for tokens that the model chose; a tool's tokens are read by it but not chosen."""
    visible = rollouts["completion_mask"].bool()
    return visible & rollouts.get("tool_mask", visible).bool()


def _adapters(model: Any) -> Any:
    """The PEFT adapters in use: a model with the same ones is the same policy."""
    if "peft" not in sys.modules:
        return None
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return None
    status = model.get_model_status()
    return status.enabled, tuple(status.active_adapters)
