"""Which trainers flow credit works in, asked before anything is trained."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl.trainer.grpo_trainer import GRPOTrainer


class UnsupportedTrainerError(TypeError):
    """The trainer cannot use one advantage per token."""


def check_trainer(trainer: Any) -> None:
    """Raise as `FlowCredit` says."""
    check_host(type(trainer))
    check_level(trainer.importance_sampling_level)
    check_loss(trainer)


def check_host(host: type) -> None:
    if not issubclass(host, GRPOTrainer):
        raise UnsupportedTrainerError(
            f"flow credit needs trl.GRPOTrainer or a subclass, and {host.__name__} is none: it has "
            "one advantage per completion. Give it a FlowReward as reward function instead"
        )
    if any("unsloth" in f"{kind.__module__}.{kind.__name__}".lower() for kind in host.__mro__):
        raise UnsupportedTrainerError(
            f"{host.__name__} is Unsloth's, whose generated loss takes one advantage per "
            "completion; import GRPOTrainer from trl before anything of unsloth, or give this one "
            "a FlowReward as reward function instead"
        )


def check_level(level: str) -> None:
    if level != "token":
        raise ValueError(
            f"flow credit has no effect with importance_sampling_level={level!r}: only the mean of "
            "a completion's advantages would count. Set importance_sampling_level='token'"
        )


def check_loss(trainer: Any) -> None:
    """Raise unless the gradient at each token is proportional to the token's own advantage.

    No model runs: the loss is given log-probabilities of 2 completions of 3 tokens.
    """
    advantages = torch.tensor([[1.0, 2.0, 4.0], [-1.0, -2.0, -4.0]])
    refusal = UnsupportedTrainerError(
        f"flow credit needs a loss that reads one advantage per token, and that of "
        f"{type(trainer).__name__} does not (GMPO, for one, has a loss per completion). Use "
        "trl.GRPOTrainer, or a FlowReward as reward function"
    )
    try:
        gradient = _loss_gradient(trainer, advantages.to(trainer.accelerator.device)).cpu()
    except (RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise refusal from error
    share = gradient / advantages
    if not (share.all() and torch.allclose(share, share[:, :1].expand_as(share), rtol=1e-3)):
        raise refusal


def _loss_gradient(
    trainer: Any, advantages: Float[Tensor, "batch completion"]
) -> Float[Tensor, "batch completion"]:
    zeros = torch.zeros_like(advantages)
    logps, ids = zeros.clone().requires_grad_(), zeros.long()
    # A copy, so that no metric and no state of the trainer changes.
    probe = copy.copy(trainer)
    probe._metrics = {mode: defaultdict(list) for mode in ("train", "eval")}
    probe._get_per_token_logps_and_entropies = lambda *_, **__: (logps, zeros, zeros.sum())
    probe.current_gradient_accumulation_steps = 1
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids + 1,
        "completion_ids": ids,
        "completion_mask": ids + 1,
        "advantages": advantages,
        "num_items_in_batch": torch.tensor(advantages.numel(), device=advantages.device),
        "old_per_token_logps": zeros,
        "sampling_per_token_logps": zeros,
        "ref_per_token_logps": zeros,
        "importance_sampling_ratio": zeros + 1,
    }
    with torch.enable_grad():
        return torch.autograd.grad(probe._compute_loss(None, inputs), logps)[0]


def find_tokenizer(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer, also that of a processor for text and images."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            "flow credit finds the answers in the text and needs the trainer's tokenizer, got "
            f"processing_class={type(processing_class).__name__}; pass processing_class="
            "AutoTokenizer.from_pretrained(...)"
        )
    return tokenizer
