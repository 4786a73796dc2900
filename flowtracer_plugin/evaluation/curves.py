"""How the answer's probability falls as a score's top is deleted, and rises as it is inserted.

After RISE (Petsiuk et al. 2018): if a score knows what the answer depends on, the probability falls
early when its top is deleted first, and rises early when it is inserted first. Tokens are removed
by cutting attention to them, not by replacing them with other tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from flowtracer_plugin.credit.token_scores import TOKEN_SCORES, TokenScore
from flowtracer_plugin.evaluation.ranked_tokens import KnockOutOptions
from flowtracer_plugin.evaluation.scored_example import ScoredExample
from flowtracer_plugin.evaluation.token_sets import Mask, Scores, top_and_bottom
from flowtracer_plugin.trace.flow_trace import FlowTrace
from flowtracer_plugin.trace.tracer import FlowTracer

STEPS = 10
"""Steps of a curve after its beginning."""

MOST = 0.5
"""Share of the candidates that is deleted; far beyond it, any text is out of distribution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """How the answer's log-probability falls and rises along the ranking of one score.

    Both curves are log-probabilities of the answer, scaled so that the whole text has 1 and the
    text without any candidate 0, and clipped to that range.

    Attributes:
        score: Its name; `random` is the mean over random orders.
        shares: Shares of the candidates that are deleted, or inserted.
        deletion: Lowest height so far with the top deleted, at each share.
        insertion: Highest height so far with nothing but the top, at each share.
        deletion_area: Mean height of the deletion curve: lower is better.
        insertion_area: Mean height of the insertion curve: higher is better.
    """

    score: str
    shares: tuple[float, ...]
    deletion: tuple[float, ...]
    insertion: tuple[float, ...]
    deletion_area: float
    insertion_area: float


def measure_curves(
    tracer: FlowTracer,
    trace: FlowTrace,
    options: KnockOutOptions | None = None,
    *,
    scores: Mapping[str, TokenScore] = TOKEN_SCORES,
    steps: int = STEPS,
    batch_size: int | None = None,
) -> tuple[Curve, ...]:
    """Deletion and insertion curves of every score, and of random orders, in one traced text.

    Only the rows, the first gap, the draws and the seed of `options` are used.

    Raises:
        TooFewTokensError: There are fewer than 10 candidates.
        KnockOutError: The model's attention cannot be cut.
        ValueError: `steps` is below 1, taking all candidates away does not make the answer less
            likely, or as `measure_knock_outs`.
    """
    example = ScoredExample(tracer=tracer, trace=trace, scores=scores, batch_size=batch_size)
    return example_curves(example, options or KnockOutOptions(), steps=steps)


def example_curves(
    example: ScoredExample, options: KnockOutOptions, *, steps: int = STEPS
) -> tuple[Curve, ...]:
    """`measure_curves` for an example that other protocols share."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps!r}")
    among = example.candidates(options.gaps[0])
    sizes = np.round(np.linspace(0, MOST, steps + 1) * among.sum()).astype(int)
    rng = example.rng(options.seed)
    orders = {name: [score] for name, score in example.values.items()}
    orders["random"] = [rng.permutation(len(among)).astype(float) for _ in range(options.draws)]
    sets = [
        [mask for order in drawn for mask in _sets(order, among, sizes)]
        for drawn in orders.values()
    ]
    *drops, [lost] = (drop for drop, *_ in example.knock_out([*sets, [among]], options.rows))
    if lost <= 0:
        raise ValueError(
            f"the answer {example.trace.spans.answer_text!r} is no less likely without any of the "
            f"{int(among.sum())} tokens before it, so its curves would mean nothing"
        )
    shares = tuple((sizes / among.sum()).tolist())
    return tuple(
        _curve(name, shares, np.clip(1 - drop / lost, 0, 1).reshape(-1, 2, steps + 1))
        for name, drop in zip(orders, drops, strict=True)
    )


def _sets(scores: Scores, among: Mask, sizes: np.ndarray) -> list[Mask]:
    """What is hidden at each step of the deletion, then of the insertion."""
    deleted = top_and_bottom(scores, among, sizes.tolist())["top"]
    return [*deleted, *(among & ~mask for mask in deleted)]


def _curve(
    name: str, shares: tuple[float, ...], heights: Float[np.ndarray, "draw 2 step"]
) -> Curve:
    deletion = np.minimum.accumulate(heights[:, 0], axis=1)
    insertion = np.maximum.accumulate(heights[:, 1], axis=1)
    width = shares[-1] - shares[0]
    areas = [float(np.trapezoid(part.mean(0), shares)) / width for part in (deletion, insertion)]
    return Curve(
        score=name,
        shares=shares,
        deletion=tuple(deletion.mean(0).tolist()),
        insertion=tuple(insertion.mean(0).tolist()),
        deletion_area=areas[0],
        insertion_area=areas[1],
    )
