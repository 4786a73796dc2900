"""The policy gradient of a group of completions in which every token has its own weight."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from flowtracer_plugin.model.causal_lm import (
    evaluating,
    first_output,
    input_device,
    text_inputs,
)
from flowtracer_plugin.model.free_memory import free_memory
from flowtracer_plugin.model.parallel import uncompiled
from flowtracer_plugin.trace.memory import FLOAT, SPARE, TooLittleMemoryError, readable


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class TokenProbabilities:
    """The policy's log-probabilities and entropies at the tokens of completions; 0 at padding.

    Attributes:
        log_probs: Log-probability of each token, in nats, with the graph of the forward pass.
        entropies: Entropy of the distribution that each token was drawn from, in nats.
    """

    log_probs: Float[Tensor, "completion token"]
    entropies: Float[Tensor, "completion token"]


def named_parameters(model: nn.Module, pattern: str | None) -> dict[str, nn.Parameter]:
    """The trainable parameters whose names contain a match of the pattern; all by default.

    Raises:
        ValueError: No parameter has such a name.
    """
    every = {name: one for name, one in model.named_parameters() if one.requires_grad}
    found = {name: one for name, one in every.items() if re.search(pattern or "", name)}
    if not found:
        some = ", ".join(list(every)[:3]) or "no trainable ones"
        raise ValueError(
            f"no trainable parameter has a name that matches {pattern!r}; the model has {some}, …"
        )
    return found


def check_memory(model: nn.Module, parameters: Sequence[nn.Parameter], *, vectors: int) -> None:
    """Refuse to hold this many gradients of the parameters if the free memory is too small.

    Raises:
        TooLittleMemoryError: The gradients do not fit in the free memory.
    """
    wanted = vectors * FLOAT * sum(one.numel() for one in parameters)
    free = free_memory(input_device(model))
    if wanted > SPARE * free:
        raise TooLittleMemoryError(
            f"{vectors} gradients of all these parameters would take {readable(wanted)}, and "
            f"{readable(free)} are free; choose some of the parameters, such as one layer's, with "
            "--parameters, or compare fewer scorers"
        )


@contextmanager
def gradients_for(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Put the model in evaluation mode, with gradients for these parameters and no others."""
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


def token_probabilities(
    model: nn.Module,
    ids: Int[Tensor, "completion whole"],
    visible: Bool[Tensor, "completion whole"],
    prompt_length: int,
    temperature: float,
) -> TokenProbabilities:
    """The result of one forward pass over a prompt's completions, padded after the text."""
    # Each token is predicted one position earlier, so that the last position predicts none of them.
    kept = ids.shape[1] - prompt_length + 1
    given = text_inputs(model, ids, visible, logits_to_keep=kept)
    logits = first_output(model(**given))[:, -kept:-1].float() / temperature
    every = logits.log_softmax(-1)
    said, shown = ids[:, prompt_length:], visible[:, prompt_length:]
    with torch.no_grad():
        entropies = torch.special.entr(every.exp()).sum(-1)
    return TokenProbabilities(
        log_probs=every.gather(-1, said[..., None])[..., 0].masked_fill(~shown, 0.0),
        entropies=entropies.masked_fill(~shown, 0.0),
    )


def weighted_gradient(
    log_probs: Float[Tensor, "completion token"],
    weights: Float[Tensor, "completion token"],
    parameters: Sequence[nn.Parameter],
) -> Float[Tensor, " parameter"]:
    """The gradient of `Σ weight · log p`, for all parameters in one float32 vector.

    The graph is kept, so that other weights can follow.
    """
    parts = torch.autograd.grad(
        log_probs, parameters, weights, retain_graph=True, allow_unused=True
    )
    return torch.cat(
        [
            (torch.zeros_like(one) if part is None else part).detach().float().flatten()
            for one, part in zip(parameters, parts, strict=True)
        ]
    )
