"""Policy gradients of a group's tokens, each with a weight of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from flowtracer_plugin.model.causal_lm import (
    accepted_inputs,
    evaluating,
    first_output,
    input_device,
)
from flowtracer_plugin.model.free_memory import free_memory
from flowtracer_plugin.model.parallel import uncompiled
from flowtracer_plugin.trace.memory import FLOAT, SPARE, TooLittleMemoryError, readable


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Chances:
    """What a policy thought of its completions; 0 at padding.

    Attributes:
        log_probs: Of each token, in nats, with the graph of the forward pass.
        entropies: Of the choice of each token, in nats.
    """

    log_probs: Float[Tensor, "completion token"]
    entropies: Float[Tensor, "completion token"]


def named_parameters(model: nn.Module, pattern: str | None) -> dict[str, nn.Parameter]:
    """The trainable parameters whose name the pattern finds, all by default.

    Raises:
        ValueError: There is none.
    """
    every = {name: one for name, one in model.named_parameters() if one.requires_grad}
    found = {name: one for name, one in every.items() if re.search(pattern or "", name)}
    if not found:
        some = ", ".join(list(every)[:3]) or "no trainable ones"
        raise ValueError(
            f"no trainable parameter has a name that {pattern!r} finds; the model has {some}, …"
        )
    return found


def check_memory(model: nn.Module, parameters: Sequence[nn.Parameter], *, vectors: int) -> None:
    """Refuse parameters of which so many gradients would not fit in the memory that is free.

    Raises:
        TooLittleMemoryError: They would not.
    """
    wanted = vectors * FLOAT * sum(one.numel() for one in parameters)
    free = free_memory(input_device(model))
    if wanted > SPARE * free:
        raise TooLittleMemoryError(
            f"{vectors} gradients of all these parameters would take {readable(wanted)}, and "
            f"{readable(free)} are free; look at some of them, such as one layer's, with "
            "--parameters, or compare fewer scorers"
        )


@contextmanager
def only(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """The model in evaluation mode, with gradients for these parameters and no others."""
    chosen = set(map(id, parameters))
    frozen = [one for one in model.parameters() if one.requires_grad and id(one) not in chosen]
    for one in frozen:
        one.requires_grad_(False)
    try:
        with evaluating(model), uncompiled(model), torch.enable_grad():
            yield
    finally:
        for one in frozen:
            one.requires_grad_(True)


def chances_of(
    model: nn.Module,
    ids: Int[Tensor, "completion whole"],
    visible: Bool[Tensor, "completion whole"],
    prompt_length: int,
    temperature: float,
) -> Chances:
    """Run the policy on a prompt with its completions, padded behind the text."""
    # The last tokens of the prompt and of all but the end of the completions are what is asked of.
    asked = ids.shape[1] - prompt_length + 1
    inputs = {
        "input_ids": ids,
        "attention_mask": visible.long(),
        "use_cache": False,
        "logits_to_keep": asked,
    }
    accepted = accepted_inputs(model)
    given = {name: value for name, value in inputs.items() if name in accepted}
    logits = first_output(model(**given))[:, -asked:-1].float() / temperature
    every = logits.log_softmax(-1)
    said, shown = ids[:, prompt_length:], visible[:, prompt_length:]
    with torch.no_grad():
        entropies = torch.special.entr(every.exp()).sum(-1)
    return Chances(
        log_probs=every.gather(-1, said[..., None])[..., 0].masked_fill(~shown, 0.0),
        entropies=entropies.masked_fill(~shown, 0.0),
    )


def weighted_gradient(
    chances: Chances,
    weights: Float[Tensor, "completion token"],
    parameters: Sequence[nn.Parameter],
) -> Float[Tensor, " parameter"]:
    """The gradient of `Σ weight · log p` by all parameters in a row, float32.

    The graph stays, for other weights.
    """
    parts = torch.autograd.grad(
        chances.log_probs, parameters, weights, retain_graph=True, allow_unused=True
    )
    return torch.cat(
        [
            (torch.zeros_like(one) if part is None else part).detach().float().flatten()
            for one, part in zip(parameters, parts, strict=True)
        ]
    )
