"""What an answer loses if one token had been another: exact, at a forward pass for every token."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from flowtracer_plugin.credit.saliency import check_whole
from flowtracer_plugin.model.causal_lm import evaluating, first_output, text_inputs
from flowtracer_plugin.model.padding import text_first

BATCH = 16
"""Texts in one forward pass, unless somebody chose."""


@torch.no_grad()
def swap_losses(
    model: nn.Module,
    ids: Int[Tensor, "batch token"],
    visible: Bool[Tensor, "batch token"],
    answer: Bool[Tensor, "batch token"],
    start: int,
    *,
    batch_size: int | None = None,
) -> Float[Tensor, "batch token"]:
    """By how many nats `log p(answer)` falls if a token is swapped for the likeliest other one.

    The other token is the one that the model itself would most likely have sampled in its place.
    `log p` is the sum over the answer's tokens, each given all tokens before it. A swap that makes
    the answer likelier counts as 0; so do the prompt, the answer and what follows its first token.

    Raises:
        UnsupportedArchitectureError: The model's parameters are spread over several processes.
    """
    check_whole(model)
    found = torch.zeros(ids.shape, device=ids.device)
    for row in range(len(ids)):
        if not bool(answer[row].any()):
            continue
        seen = visible[row]
        text, _ = text_first(ids[row : row + 1], visible[row : row + 1])
        prompt = int(seen[:start].sum())
        losses = _of_text(model, text[0], answer[row][seen], prompt, batch_size or BATCH)
        found[row, seen] = losses.to(found.device)
    return found


def _of_text(
    model: nn.Module, text: Tensor, answer: Tensor, prompt: int, size: int
) -> Float[Tensor, " token"]:
    first = int(answer.int().argmax())
    losses = torch.zeros(len(text))
    places = torch.arange(max(prompt, 1), first, device=text.device)
    if not len(places):
        return losses
    logits = _logits(model, text[None])[0]
    usual = _answer_log_prob(logits[None], text[None], answer)
    others = logits[places - 1].scatter(-1, text[places, None], -torch.inf).argmax(-1)
    for begin in range(0, len(places), size):
        chosen = slice(begin, begin + size)
        swapped = text.repeat(len(places[chosen]), 1)
        swapped[torch.arange(len(swapped)), places[chosen]] = others[chosen]
        new = _answer_log_prob(_logits(model, swapped), swapped, answer)
        losses[places[chosen].cpu()] = (usual - new).clamp_min(0.0).cpu()
    return losses


def _logits(model: nn.Module, texts: Tensor) -> Float[Tensor, "batch token vocabulary"]:
    inputs = text_inputs(model, texts, torch.ones_like(texts, dtype=torch.bool))
    with evaluating(model):
        return first_output(model(**inputs)).float()


def _answer_log_prob(logits: Tensor, texts: Tensor, answer: Tensor) -> Float[Tensor, " batch"]:
    asked = answer.nonzero()[:, 0]
    chances = logits[:, asked - 1].log_softmax(-1)
    return chances.gather(-1, texts[:, asked, None])[..., 0].sum(-1)
