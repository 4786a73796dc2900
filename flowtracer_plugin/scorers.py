"""Scorers: which tokens of a rollout get more credit, by flow and by what it is compared with.

A scorer maps a batch of completions to a boost, and `credit_weights` maps the boost to the weights
of the tokens' advantages, `1 + (gamma − 1) · boost`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowtracer_plugin.attention import AttentionCall, AttentionWeights
from flowtracer_plugin.controls import permute_within, role_and_position, row_draws
from flowtracer_plugin.credit import credit_weights as credit_weights
from flowtracer_plugin.credit import top_tokens
from flowtracer_plugin.rhythm import Rhythm, coupled_boost, read_rhythm

Features = Float[Tensor, "feature batch completion"]
Boost = Float[Tensor, "batch completion"]


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
        attention: Mean over the layers and their heads; 0 in rows and columns of padding.
        calls: The attention of each layer, over the columns of `ids`.
        entropies: Of the policy, where it chose each completion token.
        seed: Of scorers that draw.
    """

    ids: Int[Tensor, "batch token"]
    visible: Bool[Tensor, "batch token"]
    prompt_length: int
    competing: Bool[Tensor, "batch completion"]
    target: Bool[Tensor, "batch token"]
    answer: Bool[Tensor, "batch token"]
    throughput: Float[Tensor, "batch token"] | None = None
    attention: Float[Tensor, "batch query key"] | None = None
    calls: Sequence[AttentionCall | AttentionWeights] = ()
    entropies: Float[Tensor, "batch completion"] | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Scorer:
    """A way to choose the tokens that get more credit, in two steps.

    The first needs what only a forward pass has, and the second which tokens compete: TRL says so
    after that pass.

    Attributes:
        name: Its key in `SCORERS`.
        needs: What of `Rollouts` it measures: "flow" (`throughput`), "attention", "heads"
            (`calls`), "entropy" (`entropies`).
        layers: The selection of layers that it was published with.
        measure: From rollouts to what the tokens are chosen by, without a gradient. It raises
            `ValueError` if what it needs is missing.
        choose: From that, the rollouts and the share of the competing tokens that is chosen to each
            token's boost, float32: from 0 to 1 (`coupled`: to 1.5), and 0 for tokens that do not
            compete. Chosen are the `⌈share · n⌉` of a row's `n` competing tokens with the highest
            scores: of equal ones the earlier, and never one whose score is 0. It raises
            `ValueError` if a score is negative or not finite.
    """

    name: str
    needs: frozenset[str]
    layers: str
    measure: Callable[[Rollouts], Features]
    choose: Callable[[Features, Rollouts, float], Boost]

    def boost(self, rollouts: Rollouts, top_fraction: float) -> Boost:
        """Both steps."""
        return self.choose(self.measure(rollouts), rollouts, top_fraction)


# --- what the tokens are chosen by ---


def flow(rollouts: Rollouts) -> Features:
    """The flow that they carry: FlowTracer (arXiv 2606.10646)."""
    throughput = _needed(rollouts.throughput, "throughput").detach()
    return throughput[None, :, rollouts.prompt_length :]


def attention(rollouts: Rollouts) -> Features:
    """What the target's rows pay to them: the first hop of the flow, alone.

    The score is the mean over the target's rows. As in the flow's graph, no row pays to itself.
    """
    paid = _needed(rollouts.attention, "attention").detach()
    target, start = rollouts.target, rollouts.prompt_length
    score = torch.zeros_like(paid[:, 0, start:])
    for row in range(0, target.shape[1], _BLOCK):
        rows = slice(row, row + _BLOCK)
        earlier = paid[:, rows].tril(row - 1)[..., start:]
        score += (earlier * target[:, rows, None]).sum(1)
    return (score / target.sum(-1, keepdim=True).clamp_min(1))[None]


def entropy(rollouts: Rollouts) -> Features:
    """How unsure the policy was of them: the high-entropy baseline of both papers."""
    # Rounding can make the entropy of a sure choice negative.
    return _needed(rollouts.entropies, "entropies").detach().clamp_min(0.0)[None]


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


def random(rollouts: Rollouts) -> Features:
    """Chance, by `controls.row_draws`."""
    return row_draws(rollouts.ids, rollouts.visible, rollouts.prompt_length, rollouts.seed)[None]


def flow_and_chance(rollouts: Rollouts) -> Features:
    """Both."""
    return torch.cat([flow(rollouts), random(rollouts)])


def nothing(rollouts: Rollouts) -> Features:
    """All the same."""
    return torch.zeros_like(rollouts.competing, dtype=torch.float32)[None]


# --- how they are chosen ---


def top(features: Features, rollouts: Rollouts, top_fraction: float) -> Boost:
    """Those with the highest scores."""
    return _top(features[0], rollouts, top_fraction).float()


def coupled(features: Features, rollouts: Rollouts, top_fraction: float) -> Boost:
    """Anchors that share with what leads them in: arXiv 2510.13554's third strategy.

    A token that is both gets a boost of up to 1.5; see `rhythm.coupled_boost`.
    """
    influence, distance, step = features
    anchors = _top(influence, rollouts, top_fraction)
    found = Rhythm(influence=influence, distance=distance, step=step)
    return coupled_boost(found, anchors, rollouts.competing)


def shuffled(features: Features, rollouts: Rollouts, top_fraction: float) -> Boost:
    """The choice of `flow`, permuted among tokens of like role and position.

    In every bin of a rollout, the answer's tokens or the others in one tenth of the competing
    tokens, as many are chosen as by flow, but which is chance. Were flow no better than this, it
    would only know where in a rollout to look. Completions of up to ten competing tokens have at
    most one in a tenth, and come back as `flow` has them.
    """
    flow, draws = features
    chosen = _top(flow, rollouts, top_fraction)
    answer = rollouts.answer[:, rollouts.prompt_length :]
    return permute_within(role_and_position(rollouts.competing, answer), chosen, draws).float()


def _scorer(
    name: str,
    measure: Callable[[Rollouts], Features],
    *needs: str,
    layers: str = "middle",
    choose: Callable[[Features, Rollouts, float], Boost] = top,
) -> Scorer:
    needed = frozenset(needs)
    return Scorer(name=name, needs=needed, layers=layers, measure=measure, choose=choose)


_ALL = (
    _scorer("flow", flow, "flow"),
    _scorer("fai", fai, "heads", layers="middle:5"),
    _scorer("waad", waad, "heads", layers="middle:5"),
    _scorer("coupled", rhythm, "heads", layers="middle:5", choose=coupled),
    _scorer("attention", attention, "attention"),
    _scorer("entropy", entropy, "entropy"),
    _scorer("random", random),
    _scorer("shuffled", flow_and_chance, "flow", choose=shuffled),
    _scorer("uniform", nothing),
)
SCORERS: Mapping[str, Scorer] = {scorer.name: scorer for scorer in _ALL}
"""Every scorer by its name."""

_BLOCK = 64


def _top(
    score: Float[Tensor, "batch completion"], rollouts: Rollouts, top_fraction: float
) -> Bool[Tensor, "batch completion"]:
    competing = rollouts.competing
    return top_tokens(score.masked_fill(~competing, 0.0), competing, top_fraction=top_fraction)


def _rhythm(rollouts: Rollouts) -> Rhythm:
    if not rollouts.calls:
        raise ValueError(_MISSING.format("calls"))
    return read_rhythm(rollouts.calls, rollouts.visible, rollouts.prompt_length)


def _needed(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(_MISSING.format(name))
    return value


_MISSING = "this scorer reads the rollouts' {0}, and there are none; pass Rollouts({0}=...)"
