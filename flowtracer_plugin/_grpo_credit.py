"""Credit for a trainer's rollouts: attention read in a forward pass, spread over the advantages.

TRL's `_compute_loss` runs the model first and looks at the advantages afterwards, so the pass that
trains can be the pass that is read. Where TRL scores the rollouts before, that pass is read.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from trl.extras.profiling import profiling_context
from trl.trainer.grpo_trainer import GRPOTrainer

from flowtracer_plugin._grpo_checks import check_trainer, find_tokenizer
from flowtracer_plugin._grpo_log import CreditLog
from flowtracer_plugin._grpo_options import CreditOptions
from flowtracer_plugin._grpo_reading import RolloutReader, Scored
from flowtracer_plugin.attention import find_adapter
from flowtracer_plugin.causal_lm import evaluating, unwrapped
from flowtracer_plugin.parallel import tensor_parallel_group
from flowtracer_plugin.scorers import SCORERS, credit_weights
from flowtracer_plugin.tracer import wrap

WEIGHTS, ROWS = "flow_weights", "flow_rows"
"""What rollouts carry beside TRL's own: each token's weight, and each row's place."""

_SCORING = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies)
"""TRL's own signature: what stands around the method may take anything."""

Forward = Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
"""TRL's method that runs the model: log-probabilities, entropies and a loss of experts."""


class FlowCredit:
    """The credit of one trainer's completions: stands around three of its methods.

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
        self._log = CreditLog(trainer, options)
        self._reader = self._rollout_reader()
        self._gamma: float | None = None  # None: plain credit
        self._policy: Any = None
        self._listens = False
        self._heard: Scored | Exception | None = None
        self._inputs: dict[str, Any] | None = None

    def generation(self, generate: Callable[[Any], dict[str, Any]], inputs: Any) -> dict[str, Any]:
        """Around `_generate_and_score_completions`: weighs what TRL's scoring pass tells.

        Every process runs its model equally often, whatever it finds in its rollouts.
        """
        trainer = self._trainer
        if not trainer.model.training:
            rollouts = generate(inputs)
            self._log.blank(len(rollouts["advantages"]))
            return rollouts
        self._begin()
        self._listens = self._gamma is not None and self.options.pass_ in ("auto", "scoring")
        try:
            rollouts = generate(inputs)
        finally:
            self._listens = False
        heard, self._heard = self._heard, None
        rollouts[ROWS] = torch.arange(len(rollouts["advantages"]))
        self._log.begin(rollouts)
        if self._gamma is None:
            rollouts[WEIGHTS] = torch.ones_like(rollouts["completion_mask"], dtype=torch.float32)
            return rollouts
        if heard is None and self.options.pass_ == "extra":
            heard = self._extra(rollouts)
        elif heard is None and self.options.pass_ == "scoring":
            raise ValueError(
                "flow_pass='scoring' needs a pass of TRL's over the rollouts before training, and "
                "with these settings there is none (num_iterations=1, aligned accumulation, no "
                "vLLM correction); set flow_pass='auto'"
            )
        if heard is not None:
            self._weigh(rollouts, heard)
        return rollouts

    def loss(
        self, compute: Callable[[Any, dict[str, Any]], Tensor], model: Any, inputs: dict[str, Any]
    ) -> Tensor:
        """Around `_compute_loss`: rollouts that are not weighed yet are, in its forward pass."""
        if not self._trainer.model.training or WEIGHTS in inputs:
            return compute(model, inputs)
        self._inputs = inputs
        try:
            return compute(model, inputs)
        finally:
            self._inputs = None

    def forward(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """Around `_get_per_token_logps_and_entropies`: listens to it where its time has come."""
        given = _SCORING.bind(None, *args, **kwargs).arguments
        del given["self"]
        if self._listens and self._heard is None and self._is_policy(given["model"]):
            needed = "entropy" in self._reader.scorer.needs
            given["compute_entropy"] = given.get("compute_entropy", False) or needed
            returned, self._heard = self._listen(forward, given)
            return returned
        if self._inputs is not None:
            inputs, self._inputs = self._inputs, None
            returned, heard = self._listen(forward, given)
            self._weigh(inputs, heard)
            return returned
        return forward(*args, **kwargs)

    def _begin(self) -> None:
        """Settle for the next rollouts what does not depend on them."""
        step = self._trainer.state.global_step
        started = step >= self.options.start_step
        self._gamma = self.options.gamma_at(step) if started else None
        self._policy = _adapters(self._trainer.model)
        # Sharding puts another root around the model when the training starts.
        if self._reader.tracer.model is not unwrapped(self._trainer.model):
            self._reader = self._rollout_reader()
        if started and self._reader.attends:
            self._reader.tracer.reader.verify()

    def _is_policy(self, model: Any) -> bool:
        """Not the reference model, which may be the policy's with other adapters."""
        return model is self._trainer.model and _adapters(model) == self._policy

    def _listen(
        self, forward: Forward, given: dict[str, Any]
    ) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], Scored | Exception]:
        """What TRL's method returns, and what the model attended to meanwhile."""
        began: list[bool] = []
        returned: list[tuple[Tensor, Tensor | None, Tensor | None]] = []

        def call() -> Tensor | None:
            began.append(True)
            returned.append(forward(**given))
            return returned[0][1]

        ids, visible = given["input_ids"], given["attention_mask"].bool()
        prompt_length = ids.shape[1] - given["logits_to_keep"]
        size = given.get("batch_size") or len(ids)
        heard: Scored | Exception
        try:
            heard = self._reader.listen(call, ids, visible, prompt_length, size)
        except Exception as error:
            model_failed = began and not returned
            if model_failed or self.options.on_error == "raise":
                raise
            heard = error
        if not returned:
            call()
        return returned[0], heard

    def _extra(self, rollouts: Mapping[str, Any]) -> Scored | Exception:
        """What a pass of its own tells, without dropout; it ends after the last layer it reads."""
        trainer = self._trainer
        ids = torch.cat([rollouts["prompt_ids"], rollouts["completion_ids"]], dim=1)
        mask = torch.cat([rollouts["prompt_mask"], rollouts["completion_mask"]], dim=1)
        size, kept = trainer.args.per_device_train_batch_size, rollouts["completion_ids"].shape[1]
        method = trainer._get_per_token_logps_and_entropies
        others = {name: rollouts[name] for name in _SCORING.parameters if name in rollouts}
        with profiling_context(trainer, "flow_credit"), torch.no_grad():
            if not others and "entropy" not in self._reader.scorer.needs:
                try:
                    return self._reader.read(ids, mask.bool(), ids.shape[1] - kept, size)
                except Exception as error:
                    if self.options.on_error == "raise":
                        raise
                    return error
            # Images, and entropies, take TRL's own way through the whole model.
            self._listens = True
            try:
                with evaluating(trainer.model):
                    method(trainer.model, ids, mask, kept, batch_size=size, **others)
            finally:
                self._listens = False
        heard, self._heard = self._heard, None
        assert heard is not None
        return heard

    def _weigh(self, rollouts: dict[str, Any], heard: Scored | Exception) -> None:
        """Give rollouts one advantage per token."""
        plain = rollouts["advantages"]
        per_token = plain[:, None] if plain.ndim == 1 else plain
        competing = _competing(rollouts)
        boost = torch.zeros_like(competing, dtype=torch.float32)
        weights = boost + 1.0
        try:
            if isinstance(heard, Scored):
                weights, boost = self._weights(heard, competing, self._signed(per_token))
        except Exception as error:
            if self.options.on_error == "raise":
                raise
            heard = error
        rollouts["advantages"] = per_token * weights
        rollouts[WEIGHTS] = weights
        self._log.add(rollouts, heard, plain, competing, boost)

    def _weights(
        self,
        heard: Scored,
        competing: Bool[Tensor, "batch completion"],
        signed: Bool[Tensor, " batch #completion"],
    ) -> tuple[Float[Tensor, "batch completion"], Float[Tensor, "batch completion"]]:
        """Weights, and what the scorer chose, whatever the sign of the advantage."""
        options, gamma = self.options, self._gamma
        assert gamma is not None
        rollouts = replace(heard.rollouts, competing=competing)
        boost = self._reader.scorer.choose(heard.features, rollouts, options.top_fraction)
        weights = credit_weights(boost, competing, gamma=gamma, normalize=options.normalize)
        return torch.where(competing & signed, weights, 1.0), boost

    def _signed(self, per_token: Float[Tensor, " batch #completion"]) -> Bool[Tensor, "..."]:
        """Where the advantage has a sign that is reweighted."""
        if self.options.sign == "both":
            return torch.ones_like(per_token, dtype=torch.bool)
        return per_token > 0 if self.options.sign == "positive" else per_token < 0

    def _rollout_reader(self) -> RolloutReader:
        options, trainer = self.options, self._trainer
        scorer = SCORERS[options.scorer]
        if "heads" in scorer.needs and tensor_parallel_group(trainer.model) is not None:
            raise ValueError(
                f"flow_scorer={scorer.name!r} chooses among all heads, and a tensor parallel model "
                "has only some of them in each process; choose another scorer"
            )
        tracer = wrap(
            trainer.model,
            find_tokenizer(trainer.processing_class),
            layers=options.chosen_layers,
            answer=options.answer,
            target=options.target,
            # It stays out of the way of compilers, sharding and threads; nnsight reads the rest.
            backend="interface" if find_adapter(unwrapped(trainer.model)).interface else "nnsight",
        )
        last = options.no_answer == "last"
        return RolloutReader(tracer, scorer, last=last, seed=trainer.args.seed)


def _competing(rollouts: Mapping[str, Tensor]) -> Bool[Tensor, "batch completion"]:
    """What the model chose. A tool's tokens are part of what it read, but not chosen by it."""
    visible = rollouts["completion_mask"].bool()
    return visible & rollouts.get("tool_mask", visible).bool()


def _adapters(model: Any) -> Any:
    """Which of PEFT's adapters are in use: two states of a model are one policy if it is equal."""
    if "peft" not in sys.modules:
        return None
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return None
    status = model.get_model_status()
    return status.enabled, tuple(status.active_adapters)
