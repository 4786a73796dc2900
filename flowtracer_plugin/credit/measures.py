"""The measures of scorers: one number for each completion token, higher for more credit.

Each function maps a batch of rollouts to `[feature, batch, completion]` without a gradient, and
raises `ValueError` if something that it needs is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowtracer_plugin.attention.adapter import AttentionCall, AttentionWeights
from flowtracer_plugin.attention.head_mean import token_probabilities
from flowtracer_plugin.credit.controls import row_draws
from flowtracer_plugin.credit.rhythm import Rhythm, read_rhythm

Features = Float[Tensor, "feature batch completion"]
Row = Float[Tensor, "batch token"]

POWER = 2
"""Number of hops of `attention_power`."""

_BLOCK = 64


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Rollouts:
    """One batch of completions as a scorer sees it; parts that no scorer needs may be missing.

    Attributes:
        ids: Prompts, padded on the left, and completions, padded on the right.
        visible: False on padding.
        prompt_length: Columns before the completions.
        competing: True on tokens that the model chose: visible, and not from a tool.
        target: The rows of the answer, or those that decide it; none without an answer.
        answer: The answer's own tokens.
        throughput: Flow through every token.
        reach: Influence of every token on the target.
        attention: The edges of the flow; 0 in rows and columns of padding.
        calls: The attention call of each layer, over the columns of `ids`.
        entropies: Entropy of the policy at each completion token, in nats.
        surprisals: −log p of each completion token, in nats.
        saliency: Saliency of every token for the answer, see `saliency.answer_saliency`.
        swaps: What the answer loses by swapping each token, see `counterfactual.swap_losses`.
        sensitivity: How far noise at each token moves the answer, see
            `outcome_gate.outcome_sensitivity`.
        removals: How early each token is chosen and hidden, see `choice.removal_order`.
        flow_removals: The same by the flow through the text with holes, see `choice.flow_order`.
        oracle: The completion tokens that matter, according to someone who knows the task.
        tokens: The text of every token, empty on padding.
        seed: Seed of the scorers that draw.
    """

    ids: Int[Tensor, "batch token"]
    visible: Bool[Tensor, "batch token"]
    prompt_length: int
    competing: Bool[Tensor, "batch completion"]
    target: Bool[Tensor, "batch token"]
    answer: Bool[Tensor, "batch token"]
    throughput: Float[Tensor, "batch token"] | None = None
    reach: Float[Tensor, "batch token"] | None = None
    attention: Float[Tensor, "batch query key"] | None = None
    calls: Sequence[AttentionCall | AttentionWeights] = ()
    entropies: Float[Tensor, "batch completion"] | None = None
    surprisals: Float[Tensor, "batch completion"] | None = None
    saliency: Float[Tensor, "batch token"] | None = None
    swaps: Float[Tensor, "batch token"] | None = None
    sensitivity: Float[Tensor, "batch token"] | None = None
    removals: Float[Tensor, "batch token"] | None = None
    flow_removals: Float[Tensor, "batch token"] | None = None
    oracle: Bool[Tensor, "batch completion"] | None = None
    tokens: Sequence[Sequence[str]] | None = None
    seed: int = 0


def flow(rollouts: Rollouts) -> Features:
    """The flow through each token: FlowTracer (arXiv 2606.10646)."""
    return _completions(_needed(rollouts.throughput, "throughput"), rollouts)


def reach(rollouts: Rollouts) -> Features:
    """The influence of each token on the target over all paths, wherever the flow comes from."""
    return _completions(_needed(rollouts.reach, "reach"), rollouts)


def attention(rollouts: Rollouts) -> Features:
    """The mean attention that the target's rows pay to each token: the first hop of the flow.

    As in the graph of the flow, no token pays attention to itself.
    """
    return _completions(_hop(_target_row(rollouts), _edges(rollouts)), rollouts)


def attention_power(rollouts: Rollouts) -> Features:
    """The attention that the target's rows pay to each token in two hops, by the squared matrix.

    FlashTrace (arXiv 2602.01914) compares itself with such powers.
    """
    row = _target_row(rollouts)
    for _ in range(POWER):
        row = _hop(row, _edges(rollouts))
    return _completions(row, rollouts)


def rollout(rollouts: Rollouts) -> Features:
    """Attention rollout from the target's rows to each token (Abnar & Zuidema 2020).

    From the last layer to the first, `r ← ½ r + ½ r A` with the mean `A` over the layer's heads, in
    which tokens also attend to themselves (arXiv 2005.00928).
    """
    if not rollouts.calls:
        raise ValueError(_MISSING.format("calls"))
    row = _target_row(rollouts)
    for call in reversed(rollouts.calls):
        row = (row + _through(row, call, rollouts.visible)) / 2
    return _completions(row, rollouts)


def grad_x_input(rollouts: Rollouts) -> Features:
    """The length of the answer's gradient at each embedding, times the embedding's length."""
    return _completions(_needed(rollouts.saliency, "saliency"), rollouts)


def counterfactual(rollouts: Rollouts) -> Features:
    """What the answer loses if a token is swapped for the likeliest other one."""
    return _completions(_needed(rollouts.swaps, "swaps"), rollouts)


def oar(rollouts: Rollouts) -> Features:
    """The sensitivity of the answer to each token before it: OAR-G of arXiv 2601.07408."""
    return _completions(_needed(rollouts.sensitivity, "sensitivity"), rollouts)


def causal(rollouts: Rollouts) -> Features:
    """How early a token is chosen among those whose loss costs the answer most, from 1 to 0."""
    return _completions(_needed(rollouts.removals, "removals"), rollouts)


def flow_causal(rollouts: Rollouts) -> Features:
    """How early a token is chosen among those through which most flow passes, from 1 to 0."""
    return _completions(_needed(rollouts.flow_removals, "flow_removals"), rollouts)


def entropy(rollouts: Rollouts) -> Features:
    """The entropy of the policy at each token: the high-entropy baseline of both papers."""
    # Rounding can make the entropy of a certain choice negative.
    return _needed(rollouts.entropies, "entropies").detach().clamp_min(0.0)[None]


def surprisal(rollouts: Rollouts) -> Features:
    """The surprisal of each token."""
    return _needed(rollouts.surprisals, "surprisals").detach().clamp_min(0.0)[None]


def waad(rollouts: Rollouts) -> Features:
    """`Δ`, large at the borders of local chunks: the first strategy of arXiv 2510.13554."""
    return _rhythm(rollouts).step[None]


def fai(rollouts: Rollouts) -> Features:
    """`FAI`, large at global anchors: the second strategy of arXiv 2510.13554.

    A token scores 0 if no token lies far enough ahead, so that completions of at most ten tokens
    have no chosen token.
    """
    return _rhythm(rollouts).influence[None]


def rhythm(rollouts: Rollouts) -> Features:
    """The three numbers that the third strategy of arXiv 2510.13554 uses."""
    found = _rhythm(rollouts)
    return torch.stack([found.influence, found.distance, found.step])


def oracle(rollouts: Rollouts) -> Features:
    """1 for the tokens that someone who knows the task would choose."""
    return _needed(rollouts.oracle, "oracle").float()[None]


def random(rollouts: Rollouts) -> Features:
    """A random draw for each token, by `controls.row_draws`."""
    return row_draws(rollouts.ids, rollouts.visible, rollouts.prompt_length, rollouts.seed)[None]


def flow_and_chance(rollouts: Rollouts) -> Features:
    """The flow scores stacked with random draws, for `shuffled`."""
    return torch.cat([flow(rollouts), random(rollouts)])


def reach_and_chance(rollouts: Rollouts) -> Features:
    """The reach scores stacked with random draws, for `shuffled_reach`."""
    return torch.cat([reach(rollouts), random(rollouts)])


def nothing(rollouts: Rollouts) -> Features:
    """0 for every token."""
    return torch.zeros_like(rollouts.competing, dtype=torch.float32)[None]


def _completions(values: Row, rollouts: Rollouts) -> Features:
    return values.detach()[None, :, rollouts.prompt_length :]


def _edges(rollouts: Rollouts) -> Float[Tensor, "batch query key"]:
    return _needed(rollouts.attention, "attention").detach()


def _target_row(rollouts: Rollouts) -> Row:
    """Equal shares of 1 for the target's rows; 0 without a target."""
    target = rollouts.target.float()
    return target / target.sum(-1, keepdim=True).clamp_min(1)


def _hop(row: Row, paid: Float[Tensor, "batch query key"]) -> Row:
    """The attention that tokens pay to earlier ones, weighted by `row`, by blocks of rows."""
    score = torch.zeros_like(row)
    for start in range(0, row.shape[1], _BLOCK):
        rows = slice(start, start + _BLOCK)
        # Not a matrix product, which autocast would round.
        score += (paid[:, rows].tril(start - 1) * row[:, rows, None]).sum(1)
    return score


def _through(
    row: Row, call: AttentionCall | AttentionWeights, visible: Bool[Tensor, "batch token"]
) -> Row:
    """The attention that the rows pay in one layer, also to themselves."""
    given = call.weights if isinstance(call, AttentionWeights) else call.query
    seen, weights = visible.to(given.device), row.to(given.device)
    score, tokens = torch.zeros_like(weights), row.shape[1]
    with torch.autocast(given.device.type, enabled=False):
        for start in range(0, tokens, _BLOCK):
            rows = slice(start, min(start + _BLOCK, tokens))
            mean = reduce(token_probabilities(call, rows, tokens), "b head q k -> b q k", "mean")
            shown = seen[:, rows, None] & seen[:, None, : mean.shape[-1]]
            paid = mean.masked_fill(~shown, 0.0) * weights[:, rows, None]
            score[:, : mean.shape[-1]] += paid.sum(1)
    return score.to(row.device)


def _rhythm(rollouts: Rollouts) -> Rhythm:
    if not rollouts.calls:
        raise ValueError(_MISSING.format("calls"))
    return read_rhythm(rollouts.calls, rollouts.visible, rollouts.prompt_length)


def _needed(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(_MISSING.format(name))
    return value


_MISSING = "this scorer reads the rollouts' {0}, and there are none; pass Rollouts({0}=...)"
