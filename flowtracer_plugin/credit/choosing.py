"""What a scorer is: what it reads, how it measures tokens, and how it chooses among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowtracer_plugin.credit.controls import permute_within, role_and_position
from flowtracer_plugin.credit.measures import Features, Rollouts
from flowtracer_plugin.credit.outcome_gate import outcome_gate
from flowtracer_plugin.credit.rhythm import Rhythm, coupled_boost
from flowtracer_plugin.credit.weights import highest

Boost = Float[Tensor, "batch completion"]
Choose = Callable[[Features, Rollouts, float], Boost]

LATE = frozenset({"entropy", "surprisal"})
"""What is known only at the end of a forward pass."""


class InvalidScoreError(ValueError):
    """A score is negative or not a finite number at some tokens."""


class InvalidOwnScoreError(InvalidScoreError):
    """The invalid score is of an own scorer, which will give more of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scorer:
    """A way to choose the tokens that get more credit, in two steps.

    The first step needs what a forward pass computes, the second which tokens compete, which TRL
    says only after that pass.

    Attributes:
        name: The name by which `find_scorer` finds it.
        needs: The parts of `Rollouts` that it measures: "flow" (`throughput` and `reach`),
            "attention", "heads" (`calls`), "entropy" (`entropies`), "surprisal" (`surprisals`),
            "tokens", "saliency", "swaps", "sensitivity", "removals", "flow_removals", "oracle".
        layers: The selection of layers that it was published with.
        measure: Maps rollouts to the features by which tokens are chosen, without a gradient. It
            raises `ValueError` if something that it needs is missing.
        choose: Maps features, rollouts and the share of competing tokens to choose to the boost of
            each token, float32: from 0 to 1 (`coupled`: to 1.5; `gated`: from −1), and 0 for tokens
            that do not compete. It chooses the `⌈share · n⌉` of a row's `n` competing tokens with
            the highest scores, the earlier among equals, and never a token whose score is 0. It
            does not check the scores, for which the host would wait for the device.
        formula: The score in words or symbols.
        source: The publication of the score.
        cost: What it costs in addition to the forward pass that trains.
        preset: The preset of the graph that it reads, a key of `options.PRESETS`; None for the
            options with which the graph was read.
        factors: For a product, the scorers whose scores are multiplied.
        steps: Steps of a scorer that hides the tokens that it has chosen; 0 for all others.
        code: A hash of the source of an own scorer; empty for a built-in one.
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
    code: str = ""

    def boost(self, rollouts: Rollouts, top_fraction: float) -> Boost:
        """The boost of each token, by both steps.

        Raises:
            InvalidScoreError: A score is negative or not finite.
        """
        features = self.measure(rollouts)
        boost, wrong = self.choices(features, rollouts, top_fraction)
        if bool(wrong.any()):
            raise self.invalid(features, rollouts)
        return boost

    def choices(
        self, features: Features, rollouts: Rollouts, top_fraction: float
    ) -> tuple[Boost, Bool[Tensor, " batch"]]:
        """The boost of each token, and True for each row with an invalid score.

        Such a row has a boost of 0 everywhere, and `invalid` is its error.
        """
        rows = _wrong(features, rollouts).any(0).any(-1)
        sound = features.masked_fill(rows[:, None], 0.0)
        boost = self.choose(sound, rollouts, top_fraction)
        return boost.masked_fill(rows[:, None], 0.0), rows

    def invalid(self, features: Features, rollouts: Rollouts) -> InvalidScoreError:
        """The error of scores of which some are invalid."""
        return self.invalid_score(float(features[_wrong(features, rollouts)][0]))

    def invalid_score(self, value: float) -> InvalidScoreError:
        """The error of one invalid score."""
        kind = InvalidOwnScoreError if self.code else InvalidScoreError
        return kind(f"the scores of {self.name!r} must be finite and not negative, got {value}")

    @property
    def parts(self) -> tuple[Scorer, ...]:
        """The factors of a product; otherwise the scorer alone."""
        return self.factors or (self,)

    @property
    def graph(self) -> bool:
        """Whether it reads the graph of the flow, which depends on the preset."""
        return bool(self.needs & {"flow", "attention"})


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
    """
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
    return highest(score.masked_fill(~competing, 0.0), competing, top_fraction)


def _wrong(features: Features, rollouts: Rollouts) -> Bool[Tensor, "feature batch completion"]:
    """True for the scores of competing tokens by which nothing can be chosen."""
    return (~features.isfinite() | (features < 0)) & rollouts.competing
