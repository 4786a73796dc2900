"""Scorers: which tokens of a rollout get more credit, by flow or by one of its rivals.

A scorer maps a batch of completions to a boost, and `credit_weights` maps the boost to the weights
of the tokens' advantages, `1 + (gamma − 1) · boost`. `find_scorer` returns the scorer of a name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowtracer_plugin.credit import measures
from flowtracer_plugin.credit.controls import permute_within, role_and_position
from flowtracer_plugin.credit.measures import Features, Rollouts as Rollouts
from flowtracer_plugin.credit.outcome_gate import outcome_gate
from flowtracer_plugin.credit.rhythm import Rhythm, coupled_boost
from flowtracer_plugin.credit.weights import credit_weights as credit_weights, top_tokens
from flowtracer_plugin.options import PRESETS
from flowtracer_plugin.trace.choice import STEPS

Boost = Float[Tensor, "batch completion"]
Choose = Callable[[Features, Rollouts, float], Boost]

LATE = frozenset({"entropy", "surprisal"})
"""What is known only at the end of a forward pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scorer:
    """A way to choose the tokens that get more credit, in two steps.

    The first step needs what a forward pass computes, the second which tokens compete, which TRL
    says only after that pass.

    Attributes:
        name: The name by which `find_scorer` finds it.
        needs: The parts of `Rollouts` that it measures: "flow" (`throughput` and `reach`),
            "attention", "heads" (`calls`), "entropy" (`entropies`), "surprisal" (`surprisals`),
            "saliency", "swaps", "sensitivity", "removals", "flow_removals", "oracle".
        layers: The selection of layers that it was published with.
        measure: Maps rollouts to the features by which tokens are chosen, without a gradient. It
            raises `ValueError` if something that it needs is missing.
        choose: Maps features, rollouts and the share of competing tokens to choose to the boost of
            each token, float32: from 0 to 1 (`coupled`: to 1.5; `gated`: from −1), and 0 for tokens
            that do not compete. It chooses the `⌈share · n⌉` of a row's `n` competing tokens with
            the highest scores, the earlier among equals, and never a token whose score is 0. It
            raises `ValueError` if a score is negative or not finite.
        formula: The score in words or symbols.
        source: The publication of the score.
        cost: What it costs in addition to the forward pass that trains.
        preset: The preset of the graph that it reads, a key of `options.PRESETS`; None for the
            options with which the graph was read.
        factors: For a product, the scorers whose scores are multiplied.
        steps: Steps of a scorer that hides the tokens that it has chosen; 0 for all others.
    """

    name: str
    needs: frozenset[str]
    layers: str
    measure: Callable[[Rollouts], Features]
    choose: Choose
    formula: str
    source: str
    cost: str
    preset: str | None = None
    factors: tuple[Scorer, ...] = ()
    steps: int = 0

    def boost(self, rollouts: Rollouts, top_fraction: float) -> Boost:
        """The boost of each token, by both steps."""
        return self.choose(self.measure(rollouts), rollouts, top_fraction)

    def choices(
        self, features: Features, rollouts: Rollouts, top_fraction: float
    ) -> tuple[Boost, Mapping[int, Exception]]:
        """The boost of each token, and the error of each row whose scores are invalid.

        Such a row has a boost of 0 everywhere.
        """
        try:
            return self.choose(features, rollouts, top_fraction), {}
        except ValueError as error:
            wrong = (~features.isfinite() | (features < 0)) & rollouts.competing
            rows = wrong.any(0).any(-1)
            if not bool(rows.any()):
                raise
            errors = dict.fromkeys(rows.nonzero()[:, 0].tolist(), error)
            sound = features.masked_fill(rows[:, None], 0.0)
            return self.choose(sound, rollouts, top_fraction), errors

    @property
    def parts(self) -> tuple[Scorer, ...]:
        """The factors of a product; otherwise the scorer alone."""
        return self.factors or (self,)

    @property
    def graph(self) -> bool:
        """Whether it reads the graph of the flow, which depends on the preset."""
        return bool(self.needs & {"flow", "attention"})


def find_scorer(name: str) -> Scorer:
    """The scorer of a name such as `flow`, `flow:sharp` or `flow*entropy`.

    The part before a colon is a key of `SCORERS`, the part after it a key of `options.PRESETS` that
    says how to make the graph; without it, the options of the tracer or the trainer do. `causal`
    and `flow:causal` take eight steps, `causal:3` and `flow:causal:3` three. Scores joined by `*`
    are multiplied.

    Raises:
        ValueError: There is no such scorer or preset, the scorer reads no graph, or the scores
            cannot be multiplied.

    Examples:
        >>> find_scorer("flow:sharp*entropy").preset
        'sharp'
    """
    factors = tuple(_one(part.strip()) for part in name.split("*"))
    return factors[0] if len(factors) == 1 else _product(factors)


def lowest(scorer: Scorer) -> Scorer:
    """The scorer that chooses the tokens with the lowest scores instead of the highest.

    Raises:
        ValueError: The scorer chooses in another way than by the highest score.
    """
    if scorer.choose is not top:
        raise ValueError(
            f"the scorer {scorer.name!r} does not choose by the highest score, so it has no bottom"
        )
    return replace(scorer, choose=bottom)


def top(features: Features, rollouts: Rollouts, top_fraction: float) -> Boost:
    """The boost of the tokens with the highest scores."""
    return _top(features[0], rollouts, top_fraction).float()


def bottom(features: Features, rollouts: Rollouts, top_fraction: float) -> Boost:
    """The boost of the tokens with the lowest scores, the earlier among equals.

    Nothing is chosen in rollouts whose scores are all 0.

    Raises:
        ValueError: A score is negative or not finite.
    """
    _top(features[0], rollouts, top_fraction)  # refuses invalid scores
    competing, size = rollouts.competing, rollouts.competing.shape[-1]
    score = features[0].masked_fill(~competing, torch.inf)
    turned = (size - score.argsort(dim=-1, stable=True).argsort(dim=-1)).float()
    scored = (features[0].masked_fill(~competing, 0.0) > 0).any(-1, keepdim=True)
    return _top(turned * scored, rollouts, top_fraction).float()


def every(features: Features, rollouts: Rollouts, top_fraction: float) -> Boost:
    """The boost of all tokens with a score above 0, whatever the share."""
    return ((features[0] > 0) & rollouts.competing).float()


def coupled(features: Features, rollouts: Rollouts, top_fraction: float) -> Boost:
    """The boost by the third strategy of arXiv 2510.13554, up to 1.5; see `coupled_boost`."""
    influence, distance, step = features
    anchors = _top(influence, rollouts, top_fraction)
    found = Rhythm(influence=influence, distance=distance, step=step)
    return coupled_boost(found, anchors, rollouts.competing)


def gated(features: Features, rollouts: Rollouts, top_fraction: float) -> Boost:
    """The boost with which `gamma=2` gives the weights of `outcome_gate`: from −1 upwards.

    Tokens of the answer and behind it keep the weight 1.
    """
    _top(features[0], rollouts, top_fraction)  # refuses invalid scores
    answer = rollouts.answer[:, rollouts.prompt_length :]
    weighed = rollouts.competing & (answer.cumsum(-1) == 0) & answer.any(-1, keepdim=True)
    return outcome_gate(features[0], weighed, top_fraction) - 1.0


def shuffled(features: Features, rollouts: Rollouts, top_fraction: float) -> Boost:
    """The choice of `flow` or `reach`, permuted among tokens of the same role and position.

    A bin holds either the answer's tokens or the other tokens in one tenth of a rollout. In each
    bin as many tokens are chosen as by the score, but at random: if the score does no better than
    this, it only knows where in a rollout to look. Completions of up to ten competing tokens have
    at most one in each tenth, so that their choice is that of the score.
    """
    score, draws = features
    chosen = _top(score, rollouts, top_fraction)
    answer = rollouts.answer[:, rollouts.prompt_length :]
    return permute_within(role_and_position(rollouts.competing, answer), chosen, draws).float()


def _top(
    score: Float[Tensor, "batch completion"], rollouts: Rollouts, top_fraction: float
) -> Bool[Tensor, "batch completion"]:
    competing = rollouts.competing
    return top_tokens(score.masked_fill(~competing, 0.0), competing, top_fraction=top_fraction)


FREE = "none"
READS = "reading attention, no pass"
FLOWS = "reading attention and solving, no pass"
IN_STEPS = "eight more forward and backward passes"
PREDECESSOR = "arXiv 2510.13554"


def _scorer(
    name: str,
    measure: Callable[[Rollouts], Features],
    *needs: str,
    formula: str,
    source: str,
    cost: str,
    layers: str = "middle",
    choose: Choose = top,
    steps: int = 0,
) -> Scorer:
    return Scorer(
        name=name,
        needs=frozenset(needs),
        layers=layers,
        measure=measure,
        choose=choose,
        formula=formula,
        source=source,
        cost=cost,
        steps=steps,
    )


_ALL = (
    _scorer("flow", measures.flow, "flow", formula="throughput f = h ⊙ g",
            source="FlowTracer, arXiv 2606.10646", cost=FLOWS),
    _scorer("reach", measures.reach, "flow", formula="h = 1[target] + Wᵀ h",
            source="FlowTracer, section 3", cost=FLOWS),
    _scorer("attention", measures.attention, "attention",
            formula="mean of W[q, ·] over the target's rows q",
            source="the first hop of the flow", cost=READS),
    _scorer("attention_power", measures.attention_power, "attention",
            formula="mean row of the target, times W", source="FlashTrace, arXiv 2602.01914",
            cost=READS),
    _scorer("rollout", measures.rollout, "heads", layers="all",
            formula="r ← ½ r + ½ r A, from the last layer to the first",
            source="Abnar & Zuidema 2020, arXiv 2005.00928", cost="reading all layers, no pass"),
    _scorer("fai", measures.fai, "heads", layers="middle:5",
            formula="mean attention from 10 to 50 tokens ahead, global heads",
            source=f"{PREDECESSOR}, second strategy", cost=READS),
    _scorer("waad", measures.waad, "heads", layers="middle:5",
            formula="change of the mean distance that local heads look back",
            source=f"{PREDECESSOR}, first strategy", cost=READS),
    _scorer("coupled", measures.rhythm, "heads", layers="middle:5", choose=coupled,
            formula="FAI, shared with introductory tokens", source=f"{PREDECESSOR}, third strategy",
            cost=READS),
    _scorer("grad_x_input", measures.grad_x_input, "saliency",
            formula="‖∂ log p(answer) / ∂x‖ · ‖x‖ at the embedding x",
            source="Li et al. 2016, arXiv 1506.01066", cost="one more forward and backward pass"),
    _scorer("counterfactual", measures.counterfactual, "swaps",
            formula="max(0, log p(answer) − log p(answer, token swapped for the likeliest other))",
            source="the exact definition, for small models", cost="a forward pass for every token"),
    _scorer("causal", measures.causal, "removals", layers="all", steps=STEPS,
            formula="how early it is chosen by Σ a (∂o·v − ∂o·o)/(1 − a), then hidden",
            source="this package: attention edges removed to first order", cost=IN_STEPS),
    _scorer("oar", measures.oar, "sensitivity", choose=gated,
            formula="abs(∂ KL / ∂x · x) under noise at the embedding x, through a gate",
            source="OAR-G, arXiv 2601.07408", cost="two more forward passes and a backward pass"),
    _scorer("entropy", measures.entropy, "entropy", formula="H of the policy at the token",
            source="arXiv 2506.01939; baseline of both papers", cost=FREE),
    _scorer("surprisal", measures.surprisal, "surprisal", formula="−log p(token)",
            source="Hale 2001", cost=FREE),
    _scorer("oracle", measures.oracle, "oracle", choose=every,
            formula="1 where `flow_oracle` matches; all of these are chosen",
            source="whoever knows the task", cost=FREE),
    _scorer("random", measures.random, formula="a draw", source="chance", cost=FREE),
    _scorer("shuffled", measures.flow_and_chance, "flow", choose=shuffled,
            formula="flow's choice, permuted within role and tenth",
            source="control: flow's roles and positions, random tokens", cost=FLOWS),
    _scorer("shuffled_reach", measures.reach_and_chance, "flow", choose=shuffled,
            formula="reach's choice, permuted within role and tenth",
            source="control: reach's roles and positions, random tokens", cost=FLOWS),
    _scorer("uniform", measures.nothing, formula="0", source="plain GRPO", cost=FREE),
)  # fmt: skip
SCORERS: Mapping[str, Scorer] = MappingProxyType({scorer.name: scorer for scorer in _ALL})
"""Every scorer by its name."""


def _one(name: str) -> Scorer:
    base, colon, preset = name.partition(":")
    if base not in SCORERS:
        raise ValueError(f"scorer must be one of {', '.join(SCORERS)}, got {base!r}")
    scorer = SCORERS[base]
    if not colon:
        return scorer
    if scorer.steps:
        return _in_steps(scorer, name, preset)
    if preset.partition(":")[0] == "causal":
        return _flow_in_steps(scorer, name)
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r} in {name!r}")
    if not scorer.graph:
        reading = ", ".join(one.name for one in _ALL if one.graph)
        raise ValueError(
            f"a preset says how the graph of {reading} is made, and {base!r} reads none; "
            f"leave out {colon + preset!r}"
        )
    layers = PRESETS[preset].get("layers", scorer.layers)
    return replace(scorer, name=name, preset=preset, layers=layers)


def _flow_in_steps(scorer: Scorer, name: str) -> Scorer:
    """The scorer `flow` with the preset `causal`."""
    if scorer.name != "flow":
        raise ValueError(
            f"the preset 'causal' is for 'flow', which then chooses in steps, and {name!r} does "
            "not; choose 'flow:causal' or 'causal'"
        )
    known = _scorer("flow:causal", measures.flow_causal, "flow_removals", layers="all", steps=STEPS,
                    formula="how early it is chosen by the flow along the edges of `causal`",
                    source="this package", cost=IN_STEPS)  # fmt: skip
    known, (_, colon, steps) = replace(known, preset="causal"), name[5:].partition(":")
    return _in_steps(known, name, steps) if colon else known


def _in_steps(scorer: Scorer, name: str, steps: str) -> Scorer:
    if not (steps.isascii() and steps.isdecimal() and int(steps) > 0):
        raise ValueError(
            f"a whole number of steps from 1 on may follow {scorer.name!r}, as in "
            f"'{scorer.name}:3', got {steps!r} in {name!r}"
        )
    cost = f"{int(steps)} more forward and backward passes"
    return replace(scorer, name=name, steps=int(steps), cost=cost)


def _product(factors: tuple[Scorer, ...]) -> Scorer:
    name = "*".join(factor.name for factor in factors)
    own = [factor.name for factor in factors if factor.choose is not top]
    if own:
        raise ValueError(f"{own[0]!r} does not choose by its score, and cannot be multiplied")
    read = {"flow", "attention", "heads", "flow_removals"}
    attentive = [one for one in factors if one.needs & read]
    layers = {one.layers for one in attentive} or {"middle"}
    presets = {one.preset for one in factors if one.graph or one.preset} or {None}
    steps = {one.steps for one in factors if one.steps}
    if len(steps) > 1:
        raise ValueError(
            f"the factors of {name!r} take {sorted(steps)} steps; choose the same for all"
        )
    if len(layers) > 1 or len(presets) > 1:
        raise ValueError(
            f"the factors of {name!r} read other layers or other graphs: {sorted(layers)}, presets "
            f"{sorted(map(str, presets))}; choose ones that read the same"
        )
    return Scorer(
        name=name,
        needs=frozenset().union(*(factor.needs for factor in factors)),
        layers=layers.pop(),
        measure=lambda rollouts: multiplied([one.measure(rollouts) for one in factors]),
        choose=top,
        formula=" · ".join(factor.formula for factor in factors),
        source=" and ".join(factor.source for factor in factors),
        cost="; ".join(dict.fromkeys(factor.cost for factor in factors)),
        preset=presets.pop(),
        factors=factors,
    )


def multiplied(features: Sequence[Features]) -> Features:
    """The product of scores, each of which is one feature."""
    return reduce(torch.mul, features)
