"""Scorers: which tokens of a rollout get more credit, by flow or by one of its rivals.

A scorer maps a batch of completions to a boost, and `credit_weights` maps the boost to the weights
of the tokens' advantages, `1 + (gamma − 1) · boost`. `find_scorer` returns the scorer of a name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from types import MappingProxyType

import torch

from flowtracer_plugin.credit import measures
from flowtracer_plugin.credit.choosing import (
    LATE as LATE,
    Boost as Boost,
    Choose,
    Scorer as Scorer,
    bottom as bottom,
    coupled as coupled,
    every as every,
    gated,
    lowest as lowest,
    shuffled as shuffled,
    top,
)
from flowtracer_plugin.credit.measures import Features, Rollouts as Rollouts
from flowtracer_plugin.credit.own_scorers import (
    Measure,
    function_scorer,
    installed_names,
    own_scorer,
)
from flowtracer_plugin.credit.weights import credit_weights as credit_weights
from flowtracer_plugin.options import PRESETS
from flowtracer_plugin.trace.choice import STEPS


def find_scorer(name: str | Measure | Scorer) -> Scorer:
    """The scorer of a name such as `flow`, `flow:sharp` or `flow*entropy`, or of your own function.

    The part before a colon is a key of `SCORERS`, the part after it a key of `options.PRESETS` that
    says how to make the graph; without it, the options of the tracer or the trainer do. `causal`
    and `flow:causal` take eight steps, `causal:3` and `flow:causal:3` three. Scores joined by `*`
    are multiplied. An own scorer is named by its entry point or by its path,
    `package.module:function`; `docs/own_scorers.md` is the guide.

    Raises:
        ValueError: There is no such scorer or preset, the scorer reads no graph, or the scores
            cannot be multiplied.
        ScorerError: An own scorer cannot be imported, or several have this name.

    Examples:
        >>> find_scorer("flow:sharp*entropy").preset
        'sharp'
    """
    if isinstance(name, Scorer):
        return name
    if not isinstance(name, str):
        return function_scorer(name)
    factors = tuple(_one(part.strip()) for part in name.split("*"))
    return factors[0] if len(factors) == 1 else _product(factors)


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
    scorer = SCORERS.get(base)
    if scorer is None:
        # What follows the path of a function may be a preset.
        before, mark, last = name.rpartition(":")
        base, colon, preset = (before, mark, last) if last in PRESETS else (name, "", "")
        scorer = _own(base)
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


def _own(name: str) -> Scorer:
    scorer = own_scorer(name)
    if scorer is None:
        known = ", ".join([*SCORERS, *installed_names()])
        raise ValueError(
            f"scorer must be one of {known}, or the path package.module:function of your own "
            f"function, got {name!r}"
        )
    return scorer


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
        code=" ".join(factor.code for factor in factors if factor.code),
    )


def multiplied(features: Sequence[Features]) -> Features:
    """The product of scores, each of which is one feature."""
    return reduce(torch.mul, features)
