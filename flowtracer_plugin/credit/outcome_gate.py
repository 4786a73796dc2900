"""Outcome-grounded advantage reshaping, OAR-G (arXiv 2601.07408): a rival of flow."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from flowtracer_plugin.credit.controls import row_generator
from flowtracer_plugin.credit.saliency import check_whole
from flowtracer_plugin.model.causal_lm import first_output, language_model, text_inputs
from flowtracer_plugin.model.cutting import plainly
from flowtracer_plugin.model.padding import in_front, moved_back, text_first
from flowtracer_plugin.reading.influence import own_graph

NOISE = 1e-3
"""Standard deviation of the noise on the embeddings, as in the authors' code."""

LEAST = 0.1
"""Least weight of a token before the weights are scaled to a mean of 1, as in the authors' code."""

TINY = 1e-8


def outcome_sensitivity(
    model: nn.Module,
    ids: Int[Tensor, "batch token"],
    visible: Bool[Tensor, "batch token"],
    answer: Bool[Tensor, "batch token"],
    start: int,
    *,
    seed: int = 0,
    batch_size: int | None = None,
) -> Float[Tensor, "batch token"]:
    """`|∂ KL(p₀ ‖ p) / ∂x · x|` for each token from `start` to before the answer; 0 elsewhere.

    `p₀` is the softmax of the mean of the logits that choose the answer's tokens, and `p` the same
    with normal noise of standard deviation 0.001 on the embeddings `x` of these tokens. The noise
    depends on `seed` and the row's visible ids alone. It takes two forward passes without dropout
    and a backward pass that does not change the gradients of the parameters.

    Source: OAR-G of arXiv 2601.07408, in the variant "answer_mean" of the authors' code.

    Raises:
        UnsupportedArchitectureError: The model's parameters are spread over several processes.
    """
    check_whole(model)
    found = torch.zeros(ids.shape, device=ids.device)
    answered = answer.any(-1).nonzero()[:, 0]
    size = batch_size or len(ids)
    for rows in torch.split(answered, size) if len(answered) else ():
        found[rows] = _of_batch(model, ids[rows], visible[rows], answer[rows], start, seed)
    return found


def outcome_gate(
    sensitivity: Float[Tensor, "batch completion"],
    weighed: Bool[Tensor, "batch completion"],
    top_fraction: float,
) -> Float[Tensor, "batch completion"]:
    """Weights with a mean of 1 over each row's `weighed` tokens, and 1 for the others.

    `log(1 + s)` of the sensitivity `s` is scaled to 0 to 1 within a row. A token above the quantile
    `1 − top_fraction` gets `1 + its place between quantile and maximum`, one below it its share of
    the quantile, at least 0.1. Then the weights are divided by their mean. The authors leave the
    share and the largest boost open; here the boost is at most 1 before the division.
    """
    logs = sensitivity.log1p().masked_fill(~weighed, torch.nan)
    low = logs.nan_to_num(nan=torch.inf).amin(-1, keepdim=True)
    high = logs.nan_to_num(nan=-torch.inf).amax(-1, keepdim=True)
    place = (logs - low) / torch.where(high > low, high - low, 1.0)
    border = torch.nanquantile(place, 1.0 - top_fraction, -1, keepdim=True)
    below = (place / (border + TINY)).clamp_min(LEAST)
    above = 1.0 + (place - border) / (1.0 - border + TINY)
    weights = torch.where(place < border, below, above)
    mean = torch.nanmean(weights, -1, keepdim=True)
    return torch.where(weighed, weights / mean, 1.0)


def _of_batch(
    model: nn.Module, ids: Tensor, visible: Tensor, answer: Tensor, start: int, seed: int
) -> Float[Tensor, "batch token"]:
    place = torch.arange(ids.shape[1], device=ids.device)
    first = answer.int().argmax(-1, keepdim=True)
    reasoning = visible & (place >= start) & (place < first)
    # Padding on the left would shift learned positions.
    ordered_ids, ordered = text_first(ids, visible)
    asked, moved = (in_front(part, visible, ordered) for part in (answer, reasoning))
    rows = asked[:, 1:].any(0).nonzero()[:, 0]
    choosing = asked[:, 1:][:, rows, None]
    # No other rows go through the model's large head.
    inputs = text_inputs(model, ordered_ids, ordered, logits_to_keep=rows)

    def chances() -> Float[Tensor, "batch word"]:
        logits = first_output(model(**inputs))
        kept = (logits if "logits_to_keep" in inputs else logits[:, rows]).float()
        weights = choosing.to(kept.device)
        return ((kept * weights).sum(1) / weights.sum(1)).log_softmax(-1)

    with plainly(model):
        usual = chances()
    noise = _noise(model, ordered_ids, ordered, moved, seed)
    with own_graph(model, noise) as embedded:
        noisy = chances()
        total = (usual.exp() * (usual - noisy)).sum()  # rows are independent
        (gradient,) = torch.autograd.grad(total, embedded)
    clean = embedded[0].detach().float() - noise
    sensitivity = (gradient.float() * clean).sum(-1).abs() * moved
    return moved_back(sensitivity, visible).to(ids.device)


def _noise(
    model: nn.Module, ids: Tensor, visible: Tensor, moved: Tensor, seed: int
) -> Float[Tensor, "batch token width"]:
    embedding: Any = language_model(model).get_input_embeddings()
    width = int(embedding.weight.shape[-1])
    noise = torch.zeros(*ids.shape, width)
    for row, (shown, chosen) in enumerate(zip(visible.cpu(), moved.cpu(), strict=True)):
        generator = row_generator(ids[row].to("cpu", torch.int64)[shown], seed)
        noise[row, chosen] = NOISE * torch.randn(int(chosen.sum()), width, generator=generator)
    return noise.to(ids.device)
