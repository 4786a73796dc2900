"""What tokens are chosen by: one number for each completion token, higher for more credit.

Each function maps a batch of rollouts to `[feature, batch, completion]`, without a gradient, and
raises `ValueError` if what it needs is missing.
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
"""Hops of `attention_power`."""

_BLOCK = 64


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Rollouts:
    """One batch of completions, as a scorer sees it; what no chosen scorer needs may be missing.

    Attributes:
        ids: Prompts, padded on the left, and completions, padded on the right.
        visible: Not padding.
        prompt_length: Columns before the completions.
        competing: Tokens that the model chose: visible, and not a tool's.
        target: The rows that stand for the answer, or that decide it; none where no answer is.
        answer: The answer's own tokens.
        throughput: Flow through every token.
        reach: Influence of every token on the target.
        attention: The edges of the flow: a mean over layers and heads; 0 in rows and columns of
            padding.
        calls: The attention of each layer, over the columns of `ids`.
        entropies: Of the policy, where it chose each completion token, in nats.
        surprisals: −log p of each completion token, in nats.
        saliency: Of every token for the answer, see `saliency.answer_saliency`.
        oracle: The completion tokens that matter, for whoever knows.
        seed: Of scorers that draw.
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
    oracle: Bool[Tensor, "batch completion"] | None = None
    seed: int = 0


def flow(rollouts: Rollouts) -> Features:
    """The flow that they carry: FlowTracer (arXiv 2606.10646)."""
    return _completions(_needed(rollouts.throughput, "throughput"), rollouts)


def reach(rollouts: Rollouts) -> Features:
    """Their influence on the target, over all paths: flow without where it comes from."""
    return _completions(_needed(rollouts.reach, "reach"), rollouts)


def attention(rollouts: Rollouts) -> Features:
    """What the target's rows pay to them: the first hop of the flow, alone.

    The score is the mean over the target's rows. As in the flow's graph, no row pays to itself.
    """
    return _completions(_hop(_target_row(rollouts), _edges(rollouts)), rollouts)


def attention_power(rollouts: Rollouts) -> Features:
    """What the target's rows pay in two hops, over one token between: a row of the squared matrix.

    FlashTrace (arXiv 2602.01914) compares itself with such powers.
    """
    row = _target_row(rollouts)
    for _ in range(POWER):
        row = _hop(row, _edges(rollouts))
    return _completions(row, rollouts)


def rollout(rollouts: Rollouts) -> Features:
    """Attention rollout: what the target's rows hold of them after all layers.

    Abnar & Zuidema 2020 (arXiv 2005.00928): from the last layer to the first,
    `r ← ½ r + ½ r A` with the layer's mean over its heads, in which rows pay to themselves too.
    """
    if not rollouts.calls:
        raise ValueError(_MISSING.format("calls"))
    row = _target_row(rollouts)
    for call in reversed(rollouts.calls):
        row = (row + _through(row, call, rollouts.visible)) / 2
    return _completions(row, rollouts)


def grad_x_input(rollouts: Rollouts) -> Features:
    """The length of the answer's gradient at their embeddings, times that of the embedding."""
    return _completions(_needed(rollouts.saliency, "saliency"), rollouts)


def entropy(rollouts: Rollouts) -> Features:
    """How unsure the policy was of them: the high-entropy baseline of both papers."""
    # Rounding can make the entropy of a sure choice negative.
    return _needed(rollouts.entropies, "entropies").detach().clamp_min(0.0)[None]


def surprisal(rollouts: Rollouts) -> Features:
    """How unlikely they were."""
    return _needed(rollouts.surprisals, "surprisals").detach().clamp_min(0.0)[None]


def waad(rollouts: Rollouts) -> Features:
    """The borders of local chunks, the largest `Δ`: arXiv 2510.13554's first strategy."""
    return _rhythm(rollouts).step[None]


def fai(rollouts: Rollouts) -> Features:
    """The global anchors, the largest `FAI`: arXiv 2510.13554's second strategy.

    Tokens with none ahead at the distance that counts score 0, so that in completions of at most
    ten tokens nothing is chosen.
    """
    return _rhythm(rollouts).influence[None]


def rhythm(rollouts: Rollouts) -> Features:
    """Everything that arXiv 2510.13554's third strategy looks at."""
    found = _rhythm(rollouts)
    return torch.stack([found.influence, found.distance, found.step])


def oracle(rollouts: Rollouts) -> Features:
    """1 for those that somebody who knows the task would choose."""
    return _needed(rollouts.oracle, "oracle").float()[None]


def random(rollouts: Rollouts) -> Features:
    """Chance, by `controls.row_draws`."""
    return row_draws(rollouts.ids, rollouts.visible, rollouts.prompt_length, rollouts.seed)[None]


def flow_and_chance(rollouts: Rollouts) -> Features:
    """Both."""
    return torch.cat([flow(rollouts), random(rollouts)])


def nothing(rollouts: Rollouts) -> Features:
    """All the same."""
    return torch.zeros_like(rollouts.competing, dtype=torch.float32)[None]


def _completions(values: Row, rollouts: Rollouts) -> Features:
    return values.detach()[None, :, rollouts.prompt_length :]


def _edges(rollouts: Rollouts) -> Float[Tensor, "batch query key"]:
    return _needed(rollouts.attention, "attention").detach()


def _target_row(rollouts: Rollouts) -> Row:
    """Equal shares of 1 for the target's rows; 0 where there is no target."""
    target = rollouts.target.float()
    return target / target.sum(-1, keepdim=True).clamp_min(1)


def _hop(row: Row, paid: Float[Tensor, "batch query key"]) -> Row:
    """What the tokens pay to earlier ones, weighed by `row`, a block of rows at a time."""
    score = torch.zeros_like(row)
    for start in range(0, row.shape[1], _BLOCK):
        rows = slice(start, start + _BLOCK)
        # Not a matrix product, which autocast would round.
        score += (paid[:, rows].tril(start - 1) * row[:, rows, None]).sum(1)
    return score


def _through(
    row: Row, call: AttentionCall | AttentionWeights, visible: Bool[Tensor, "batch token"]
) -> Row:
    """What the rows pay through one layer, themselves included."""
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
