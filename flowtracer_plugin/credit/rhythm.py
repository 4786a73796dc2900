"""The rhythm of attention: local chunks and global anchors, FlowTracer's predecessor.

"Attention Illuminates LLM Reasoning: Preplan-and-Anchor" (arXiv 2510.13554); equations are numbered
as in its first version. Queries are the response, `R`: the visible tokens of the completion. Keys
are all visible tokens up to the query, the prompt's among them, as the sums over `s ≤ t` say.

Where the paper averages the maps of a group of heads and then sums, this sums for every head and
then averages. Both are the same, for everything is linear in the map, and no map is ever built.
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
"""`W`: distances beyond it count as this much."""

HORIZON = (10, 50)
"""`H_lo`, `H_hi`: how far behind a token others may be influenced by it; (10, 100) in version 2."""

HEAD_SHARE = 0.3
"""Share of all heads that is local, and share that is global."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Rhythm:
    """What the attention of some layers says of each completion token; 0 at padding.

    Attributes:
        distance: `WAAD`, windowed average attention distance: how far back the local heads look.
        influence: `FAI`, future attention influence: what the global heads of tokens ahead pay to
            it; 0 where no token is that far ahead.
        step: `Δ`, how much `distance` changes to the next token; 0 at the last one.
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
    """The rhythm of each row, by the heads of all calls that are local and global in that row.

    * (7) `d(head) = 1/|R| · Σ_{t∈R} Σ_{s≤t} A[t,s] (t−s)`, the mean distance
    * (8) the `⌈0.3 n⌉` of all `n` heads with the smallest `d` are local, as many with the largest
      global; of equal ones the earlier
    * (9) `WAAD_t = Σ_{s≤t} A_local[t,s] min(t−s, W)`
    * (10) `FAI_s = 1/|T(s)| · Σ_{t∈T(s)} A_global[t,s]`, where `T(s) = {t∈R : H_lo ≤ t−s ≤ H_hi}`
    * `Δ_t = |WAAD_t − WAAD_{t+1}|`

    The heads are chosen by each row's own distances, so that no row depends on the others.

    Args:
        calls: Attention over the columns of `visible`, one call for each layer.
        visible: Not padding; prompts are padded on the left, completions on the right.
        prompt_length: Columns before the completions.
        window: `W`.
        horizon: `H_lo` and `H_hi`.
        block: Query rows at a time.
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
    """For every head `|R| · d`, `WAAD` and `|T| · FAI`."""
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
    """Mean over the heads that come first, as many as `HEAD_SHARE` of all."""
    count = math.ceil(round(HEAD_SHARE * order.shape[1], 9))
    chosen = order.argsort(dim=-1, stable=True) < count
    # Not a matrix product, which autocast would round.
    return reduce(values * chosen[..., None], "batch head token -> batch token", "sum") / count


def _followers(
    response: Bool[Tensor, "batch completion"], horizon: tuple[int, int]
) -> Int[Tensor, "batch completion"]:
    """`|T(s)|`: how many tokens of the response lie between `H_lo` and `H_hi` ahead of each."""
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
    """Anchors, of which those led by a local chunk share their boost with the token that led in.

    The third strategy, the sum of three indicators: `1` on the anchors that are not in `D`,
    `1 − alpha` on those in `D`, and `alpha` on `I(D)`. An anchor `t` is in `D` if `WAAD_t ≤ τ_WAAD`
    and some `Δ_u ≥ τ_Δ` among the `k` tokens before it, `t−k … t−1`; its introductory token, in
    `I(D)`, is the one of these with the largest `Δ`, the earlier of equal ones. A token that leads
    several in is boosted once; one that is an anchor too gets the sum, up to `1 + alpha`.

    The paper has `alpha` from 0 to 1 and `k` from 1 to 3. Ours are `alpha = 0.5` and `k = 2`; that
    both `τ` are the row's medians over its competing tokens (the lower of two middle ones); and
    that only competing tokens can lead in.

    Args:
        rhythm: Where `WAAD` and `Δ` come from.
        anchors: The global anchors, the top of `FAI`; they compete.
        competing: Tokens that the model chose.
        alpha: How much of its boost an anchor in `D` passes on.
        reach: `k`, how many tokens before an anchor can lead it in.
    """
    step = rhythm.step.masked_fill(~competing, -1.0)
    windows = pad(step, (reach, -1), value=-1.0).unfold(-1, reach, 1)
    largest, offset = windows.max(-1)
    led = anchors & (rhythm.distance <= _median(rhythm.distance, competing))
    led &= largest >= _median(rhythm.step, competing)
    width = led.shape[1]
    leader = torch.arange(width, device=led.device) - reach + offset
    # What leads nobody in is sent to a column more.
    leading = led.new_zeros(len(led), width + 1).scatter_(1, leader.where(led, width), True)
    return (anchors & ~led) + (1 - alpha) * led + alpha * leading[:, :width]


def _median(
    values: Float[Tensor, "batch completion"], competing: Bool[Tensor, "batch completion"]
) -> Float[Tensor, "batch 1"]:
    """The lower median of the competing values; infinite where there are none."""
    # Not nanmedian: CUDA has no deterministic one.
    ordered = values.masked_fill(~competing, torch.inf).sort(-1).values
    middle = (competing.sum(-1, keepdim=True) - 1).clamp_min(0) // 2
    return ordered.gather(-1, middle)
