"""Does knocking out the tokens that a score ranks highest change the answer?

Attention to a share of the response's tokens is cut: to those with the highest scores, to those
with the lowest, and to random ones. If a score knows what the answer depends on, its top tokens
cost the answer more than random tokens do, and its bottom tokens cost it less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from flowtracer_plugin.credit.token_scores import TOKEN_SCORES, TokenScore
from flowtracer_plugin.evaluation.knockout import ROWS
from flowtracer_plugin.evaluation.scored_example import ScoredExample
from flowtracer_plugin.evaluation.token_sets import (
    ChosenSets,
    Mask,
    matched_draw,
    position_bins,
    ranking,
    set_size,
    token_classes,
    tops_and_bottoms,
)
from flowtracer_plugin.trace.flow_trace import FlowTrace
from flowtracer_plugin.trace.tracer import FlowTracer

PERCENTS = (1, 2, 5, 10, 20)
"""Shares of the candidates that are knocked out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KnockOutOptions:
    """Which tokens are knocked out, and how. Of equal scores, the earlier token ranks higher.

    Attributes:
        rows: Which tokens no longer see those that are knocked out: `"future"`, all later ones, or
            `"answer"`, those that predict the answer.
        percents: Shares of the candidates that are knocked out, rounded up to whole tokens.
        gaps: How many tokens right before the answer are not candidates: they often are a template
            such as "The answer is", whose loss hurts any answer. Each gap is measured.
        draws: Number of random sets for each control and share.
        matched: The score whose sets the controls `random_position` and `random_class` match.
        seed: Seed of the draws.
    """

    rows: str = "future"
    percents: tuple[int, ...] = PERCENTS
    gaps: tuple[int, ...] = (0, 5)
    draws: int = 3
    matched: str = "flow"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: A value is not among the choices.
        """
        if self.rows not in ROWS:
            raise ValueError(f"rows must be one of {', '.join(ROWS)}, got {self.rows!r}")
        if not self.percents or not all(0 < percent <= 100 for percent in self.percents):
            raise ValueError(f"percents must be from 1 to 100, got {self.percents!r}")
        if not self.gaps or not all(gap >= 0 for gap in self.gaps):
            raise ValueError(f"gaps must be 0 or more tokens, got {self.gaps!r}")
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """The effect of knocking out one kind of set, for each of the percents; a mean over draws.

    Attributes:
        gap: Number of tokens right before the answer that were not candidates.
        score: The score or control that chose the tokens.
        side: `"top"` or `"bottom"` of the score; `"top"` for controls.
        drop: How far the mean log-probability of the answer's tokens falls, in nats per token.
        flipped: Share of the sets under which the greedy answer changes.
        divergence: KL divergence of the next-token distribution where the answer is predicted, in
            nats.
    """

    gap: int
    score: str
    side: str
    drop: tuple[float, ...]
    flipped: tuple[float, ...]
    divergence: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Faithfulness:
    """The effects of all knock-outs on one answer.

    Attributes:
        answer_tokens: Number of the answer's tokens.
        log_prob: Their mean log-probability without a cut, in nats.
        predicted: Whether greedy decoding gives every answer token.
        candidates: Number of candidates, for each gap.
        effects: One for each gap, score or control, and side.
    """

    answer_tokens: int
    log_prob: float
    predicted: bool
    candidates: tuple[int, ...]
    effects: tuple[Effect, ...]


def measure_knock_outs(
    tracer: FlowTracer,
    trace: FlowTrace,
    options: KnockOutOptions | None = None,
    *,
    scores: Mapping[str, TokenScore] = TOKEN_SCORES,
    batch_size: int | None = None,
) -> Faithfulness:
    """The effects of knocking out every score's top and bottom, and random tokens, in one text.

    Args:
        tracer: The tracer that made the trace.
        trace: A trace that holds its attention, as with `wrap(..., mode="dense")`.
        options: Which tokens are knocked out, and how.
        scores: The scores by name. A score maps a `ScoredText` to one number for each token.
        batch_size: Cuts in one forward pass; as many as memory allows by default.

    Raises:
        TooFewTokensError: There are fewer than 10 candidates.
        KnockOutError: The model's attention cannot be cut.
        ValueError: The trace was streamed, `options.matched` is no score, or a score is not finite.
    """
    example = ScoredExample(tracer=tracer, trace=trace, scores=scores, batch_size=batch_size)
    return example_knock_outs(example, options or KnockOutOptions())


def example_knock_outs(example: ScoredExample, options: KnockOutOptions) -> Faithfulness:
    """`measure_knock_outs` for an example that other protocols share."""
    if options.matched not in example.scores:
        raise ValueError(
            f"controls are matched to one of the scores {', '.join(example.scores)}, got "
            f"{options.matched!r}"
        )
    candidates = [example.candidates(gap) for gap in options.gaps]
    sets = [
        (gap, chosen)
        for gap, among in zip(options.gaps, candidates, strict=True)
        for chosen in chosen_sets(example, among, options, gap)
    ]
    numbers = example.knock_out([one.masks for _, one in sets], options.rows)
    percents, baseline = len(options.percents), example.baseline
    return Faithfulness(
        answer_tokens=int(example.trace.spans.answer.sum()),
        log_prob=baseline.log_prob,
        predicted=baseline.predicted,
        candidates=tuple(int(among.sum()) for among in candidates),
        effects=tuple(
            _effect(gap, one, part, percents)
            for (gap, one), part in zip(sets, numbers, strict=True)
        ),
    )


def chosen_sets(
    example: ScoredExample, among: Mask, options: KnockOutOptions, gap: int
) -> list[ChosenSets]:
    """The candidates that each score and control chooses: one set for each percent."""
    counts = [set_size(int(among.sum()), percent) for percent in options.percents]
    sets = tops_and_bottoms(example.values, among, counts)
    order = ranking(example.values[options.matched], among)
    matched = [order[:count] for count in counts]
    groups = {
        "random": among.astype(np.int64) - 1,
        "random_position": position_bins(among),
        "random_class": np.where(among, token_classes(example.trace.tokens), -1),
    }
    rng = example.rng(options.seed, gap)
    for name, group in groups.items():
        draws = [matched_draw(one, group, rng) for one in matched for _ in range(options.draws)]
        sets.append(ChosenSets(name, "top", draws))
    return sets


def _effect(
    gap: int, chosen: ChosenSets, numbers: Float[np.ndarray, "3 mask"], percents: int
) -> Effect:
    drop, flipped, divergence = map(tuple, numbers.reshape(3, percents, -1).mean(-1).tolist())
    return Effect(
        gap=gap,
        score=chosen.score,
        side=chosen.side,
        drop=drop,
        flipped=flipped,
        divergence=divergence,
    )
