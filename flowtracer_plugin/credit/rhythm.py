"""The rhythm of attention, local chunks and global anchors, by FlowTracer's predecessor paper.

"Attention Illuminates LLM Reasoning: Preplan-and-Anchor" (arXiv 2510.13554); the
equation numbers are those of its first version. Queries are the response `R`, the visible tokens of
the completion. Keys are all visible tokens up to the query, in the prompt too.

The paper averages the maps of a group of heads and then sums. This module sums for each head and
then averages, which is the same because all sums are linear in the map, and needs no map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from flowtracer_plugin.attention.adapter import AttentionCall, AttentionWeights
from flowtracer_plugin.attention.head_mean import token_probabilities

WINDOW = 10
"""`W`: larger distances count as this distance."""

HORIZON = (10, 50)
"""`H_lo`, `H_hi`: at which distance a token can influence later ones; (10, 100) in version 2."""

HEAD_SHARE = 0.3
"""Share of all heads that are local, and share that are global."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Rhythm:
    """Statistics of each completion token's attention over some layers; 0 at padding.

    Attributes:
        distance: `WAAD`, windowed average attention distance: how far back the local heads look.
        influence: `FAI`, future attention influence: the mean attention that the global heads of
            later tokens pay to it; 0 where no token is that far ahead.
        step: `Δ`, the change of `distance` to the next token; 0 at the last token.
    """

    distance: Float[Tensor, "batch completion"]
    influence: Float[Tensor, "batch completion"]
    step: Float[Tensor, "batch completion"]


def read_rhythm(
    calls: Sequence[AttentionCall | AttentionWeights],
    visible: Bool[Tensor, "batch token"],
    prompt_length: int,
    *,
    window: int = WINDOW,
    horizon: tuple[int, int] = HORIZON,
    block: int = 64,
) -> Rhythm:
    """The rhythm of each row, by the local and the global heads of that row.

    * (7) `d(head) = 1/|R| · Σ_{t∈R} Σ_{s≤t} A[t,s] (t−s)`, the mean distance
    * (8) the `⌈0.3 n⌉` of all `n` heads with the smallest `d` are local, and as many with the
      largest `d` are global; the earlier head goes first among equals
    * (9) `WAAD_t = Σ_{s≤t} A_local[t,s] min(t−s, W)`
    * (10) `FAI_s = 1/|T(s)| · Σ_{t∈T(s)} A_global[t,s]`, where `T(s) = {t∈R : H_lo ≤ t−s ≤ H_hi}`
    * `Δ_t = |WAAD_t − WAAD_{t+1}|`

    The heads are chosen for each row by itself, so that no row depends on the others.

    Args:
        calls: Attention over the columns of `visible`, one call for each layer.
        visible: False on padding; prompts are padded on the left, completions on the right.
        prompt_length: Columns before the completions.
        window: `W`.
        horizon: `H_lo` and `H_hi`.
        block: Number of query rows that are computed at a time.
    """
    sums = [_head_sums(call, visible, prompt_length, window, horizon, block) for call in calls]
    far, near, ahead = (torch.cat(parts, dim=1) for parts in zip(*sums, strict=True))
    response = visible[:, prompt_length:]
    distance = _mean_over_first(far.argsort(dim=-1, stable=True), near)
    influence = _mean_over_first(far.argsort(dim=-1, stable=True, descending=True), ahead)
    both = response & pad(response[:, 1:], (0, 1), value=False)
    return Rhythm(
        distance=distance,
        influence=influence / _followers(response, horizon).clamp_min(1),
        step=(distance - pad(distance[:, 1:], (0, 1))).abs().masked_fill(~both, 0.0),
    )


def _head_sums(
    call: AttentionCall | AttentionWeights,
    visible: Bool[Tensor, "batch token"],
    prompt_length: int,
    window: int,
    horizon: tuple[int, int],
    block: int,
) -> tuple[
    Float[Tensor, "batch head"],
    Float[Tensor, "batch head completion"],
    Float[Tensor, "batch head completion"],
]:
    """`|R| · d`, `WAAD` and `|T| · FAI` of every head."""
    given = call.weights if isinstance(call, AttentionWeights) else call.query
    (batch, tokens), heads, device = visible.shape, given.shape[1], given.device
    shown, home = visible.to(device), visible.device
    far = torch.zeros(batch, heads, device=device)
    near, ahead = torch.zeros(2, batch, heads, tokens, device=device)
    with torch.autocast(device.type, enabled=False):
        for start in range(prompt_length, tokens, block):
            rows = slice(start, min(start + block, tokens))
            paid = token_probabilities(call, rows, tokens)
            keys = torch.arange(paid.shape[-1], device=device)
            seen = shown[:, rows, None] & shown[:, None, : len(keys)]
            paid = paid.masked_fill(~seen[:, None], 0.0)
            back = (torch.arange(rows.start, rows.stop, device=device)[:, None] - keys).float()
            far += (paid * back).sum((-1, -2))
            near[..., rows] = (paid * back.clamp_max(window)).sum(-1)
            within = (back >= horizon[0]) & (back <= horizon[1])
            ahead[..., : len(keys)] += (paid * within).sum(-2)
    return far.to(home), near[..., prompt_length:].to(home), ahead[..., prompt_length:].to(home)


def _mean_over_first(
    order: Int[Tensor, "batch head"], values: Float[Tensor, "batch head completion"]
) -> Float[Tensor, "batch completion"]:
    """The mean over the first `HEAD_SHARE` of the heads in this order."""
    count = math.ceil(round(HEAD_SHARE * order.shape[1], 9))
    chosen = order.argsort(dim=-1, stable=True) < count
    # Not a matrix product, which autocast would round.
    return reduce(values * chosen[..., None], "batch head token -> batch token", "sum") / count


def _followers(
    response: Bool[Tensor, "batch completion"], horizon: tuple[int, int]
) -> Int[Tensor, "batch completion"]:
    """`|T(s)|`: the number of response tokens that lie `H_lo` to `H_hi` ahead of each token."""
    nearest, furthest = horizon
    place = torch.arange(response.shape[1], device=response.device)
    last = response.sum(-1, keepdim=True) - 1
    return ((place + furthest).minimum(last) - place - nearest + 1).clamp_min(0)


def coupled_boost(
    rhythm: Rhythm,
    anchors: Bool[Tensor, "batch completion"],
    competing: Bool[Tensor, "batch completion"],
    *,
    alpha: float = 0.5,
    reach: int = 2,
) -> Float[Tensor, "batch completion"]:
    """The boost of the third strategy: anchors may share theirs with an introductory token.

    It is the sum of three indicators: `1` on the anchors that are not in `D`, `1 − alpha` on those
    in `D`, and `alpha` on `I(D)`. An anchor `t` is in `D` if `WAAD_t ≤ τ_WAAD` and some
    `Δ_u ≥ τ_Δ` among the `k` tokens before it, `t−k … t−1`. Its introductory token, in `I(D)`, is
    the token with the largest `Δ` among these, the earlier one among equals. A token that
    introduces several anchors is boosted once; an anchor that introduces another gets the sum, up
    to `1 + alpha`.

    The paper gives `alpha` from 0 to 1 and `k` from 1 to 3. Our choices are `alpha = 0.5`,
    `k = 2`, the medians of the row's competing tokens as both `τ` (the lower of two middle values),
    and that only competing tokens introduce an anchor.

    Args:
        rhythm: Holds `WAAD` and `Δ`.
        anchors: The global anchors, the competing tokens with the highest `FAI`.
        competing: Tokens that the model chose.
        alpha: Share of its boost that an anchor in `D` passes on.
        reach: `k`, the number of tokens before an anchor that can introduce it.
    """
    step = rhythm.step.masked_fill(~competing, -1.0)
    windows = pad(step, (reach, -1), value=-1.0).unfold(-1, reach, 1)
    largest, offset = windows.max(-1)
    led = anchors & (rhythm.distance <= _median(rhythm.distance, competing))
    led &= largest >= _median(rhythm.step, competing)
    width = led.shape[1]
    leader = torch.arange(width, device=led.device) - reach + offset
    # A token that introduces no anchor is sent to an additional column.
    leading = led.new_zeros(len(led), width + 1).scatter_(1, leader.where(led, width), True)
    return (anchors & ~led) + (1 - alpha) * led + alpha * leading[:, :width]


def _median(
    values: Float[Tensor, "batch completion"], competing: Bool[Tensor, "batch completion"]
) -> Float[Tensor, "batch 1"]:
    """The lower median of the competing values; infinite without any."""
    # Not nanmedian, which is not deterministic on CUDA.
    ordered = values.masked_fill(~competing, torch.inf).sort(-1).values
    middle = (competing.sum(-1, keepdim=True) - 1).clamp_min(0) // 2
    return ordered.gather(-1, middle)
