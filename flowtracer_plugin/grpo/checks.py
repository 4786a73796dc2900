"""The checks that a trainer can use flow credit, made before it trains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl.trainer.grpo_trainer import GRPOTrainer


class UnsupportedTrainerError(TypeError):
    """The trainer cannot use one advantage per token."""


def check_trainer(trainer: Any) -> bool:
    """True if the trainer passes all checks, False if the loss can only be checked later.

    Raises:
        UnsupportedTrainerError, ValueError: As `FlowCredit`.
    """
    check_host(type(trainer))
    check_level(trainer.importance_sampling_level)
    return check_loss(trainer)


def check_host(host: type) -> None:
    """Refuse a class that is no GRPO trainer, or whose loss has one advantage per completion."""
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
    """Refuse importance sampling by sequence, with which credit for tokens has no effect."""
    if level != "token":
        raise ValueError(
            f"flow credit has no effect with importance_sampling_level={level!r}: only the mean of "
            "a completion's advantages would count. Set importance_sampling_level='token'"
        )


TOKENS = 3
"""The number of made-up completions, and of tokens in each: because both are equal, a loss that
broadcasts along the wrong axis raises no error and shows in the gradients instead."""


def check_loss(trainer: Any) -> bool:
    """True if the gradient at each token is proportional to the token's own advantage.

    The loss is computed for made-up log-probabilities of made-up completions. False if it needs
    more than these, so that only `check_loss_on` can tell.

    Raises:
        UnsupportedTrainerError: The gradient is not proportional.
    """
    ids = torch.zeros(TOKENS, TOKENS, dtype=torch.long, device=trainer.accelerator.device)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids + 1,
        "completion_ids": ids,
        "completion_mask": ids + 1,
        "num_items_in_batch": (ids + 1).sum(),
    }
    try:
        share = _gradient_share(trainer, trainer._compute_loss, trainer.model, inputs)
    except (RuntimeError, LookupError, AttributeError, TypeError, ValueError):
        return False
    _require_proportion(trainer, share)
    return True


def check_loss_on(trainer: Any, compute: Any, model: Any, inputs: Mapping[str, Any]) -> None:
    """Check the loss on rollouts of the trainer itself.

    Raises:
        UnsupportedTrainerError: The loss fails, or does not use the advantage of each token.
    """
    try:
        share = _gradient_share(trainer, compute, model, inputs)
    except (RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise UnsupportedTrainerError(
            f"the loss of {type(trainer).__name__} fails with one advantage per token, of shape "
            f"(batch, token): {type(error).__name__}: {error}. Use trl.GRPOTrainer, or a "
            "FlowReward as reward function"
        ) from error
    _require_proportion(trainer, share)


def _require_proportion(trainer: Any, share: Float[Tensor, "batch completion"]) -> None:
    known = share.isfinite()  # 0/0 at tokens that the loss hides
    least = share.masked_fill(~known, torch.inf).amin(-1, keepdim=True)
    most = share.masked_fill(~known, -torch.inf).amax(-1, keepdim=True)
    shown = known.any(-1, keepdim=True)
    same = torch.isclose(least, most, rtol=1e-3) | ~shown
    nothing = known & (share == 0)
    if bool(same.all()) and not bool(nothing.any()):
        return
    raise UnsupportedTrainerError(
        f"flow credit needs a loss that reads one advantage per token, and that of "
        f"{type(trainer).__name__} does not (GMPO, for one, has a loss per completion). Use "
        "trl.GRPOTrainer, or a FlowReward as reward function"
    )


def _gradient_share(
    trainer: Any, compute: Any, model: Any, inputs: Mapping[str, Any]
) -> Float[Tensor, "batch completion"]:
    """The gradient of the loss by each token's log-probability, divided by its advantage."""
    mask = inputs["completion_mask"]
    rows, tokens = mask.shape
    place = torch.arange(rows * tokens, device=mask.device, dtype=torch.float32)
    advantages = (1 + place).view(rows, tokens) * (1 - 2 * (place.view(rows, tokens) // tokens % 2))
    zeros = torch.zeros_like(advantages)
    logps = zeros.clone().requires_grad_()
    known = ("old_per_token_logps", "sampling_per_token_logps", "ref_per_token_logps")
    asked = {
        **inputs,
        **dict.fromkeys(known, zeros),
        "advantages": advantages,
        "importance_sampling_ratio": zeros + 1,
    }
    with _untouched(trainer), torch.enable_grad():
        trainer._metrics = {mode: defaultdict(list) for mode in ("train", "eval")}
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, zeros, zeros.sum())
        trainer.current_gradient_accumulation_steps = 1
        gradient = torch.autograd.grad(compute(model, asked), logps)[0]
    hidden = mask == 0
    if "tool_mask" in inputs:
        hidden = hidden | (inputs["tool_mask"] == 0)
    return (gradient / advantages).masked_fill(hidden, torch.nan)


@contextmanager
def _untouched(trainer: Any) -> Iterator[None]:
    """Restore the trainer's attributes at the end."""
    before = dict(vars(trainer))
    try:
        yield
    finally:
        vars(trainer).clear()
        vars(trainer).update(before)


def find_tokenizer(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a trainer, even if the trainer's processor also handles images.

    Raises:
        ValueError: The trainer has no tokenizer.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            "flow credit finds the answers in the text and needs the trainer's tokenizer, got "
            f"processing_class={type(processing_class).__name__}; pass processing_class="
            "AutoTokenizer.from_pretrained(...)"
        )
    return tokenizer
