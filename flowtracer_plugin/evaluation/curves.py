"""Deletion and insertion: the answer as ever more of a score's top is taken away, or given back.

After RISE (Petsiuk et al. 2018): a score that knows what the answer stands on loses it early when
its top is deleted first, and wins it back early when its top is inserted first. Tokens are taken
away by cutting attention to them, not by other tokens in their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from flowtracer_plugin.credit.token_scores import TOKEN_SCORES, TokenScore, read_text
from flowtracer_plugin.evaluation.faithfulness import (
    KnockOutOptions,
    Mask,
    Scores,
    candidate_tokens,
    checked_scores,
    ranking,
    unique_sets,
)
from flowtracer_plugin.evaluation.knockout import knock_out
from flowtracer_plugin.text.spans import special_ids
from flowtracer_plugin.trace.flow_trace import FlowTrace
from flowtracer_plugin.trace.tracer import FlowTracer

STEPS = 10
"""Of a curve, beside its beginning."""

MOST = 0.5
"""Share of the candidates that is deleted: far beyond it every text is strange to the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """How the answer falls and rises along the ranking of one score.

    Both are log-probabilities of the answer, scaled so that the whole text has 1 and the text
    without any candidate 0, and kept within that.

    Attributes:
        score: Its name; `random` is the mean of draws.
        shares: How much of the candidates is deleted, or inserted.
        deletion: With the top deleted, at each share; what was lost once stays lost.
        insertion: With nothing but the top, at each share; what was won once stays won.
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

    Of `options` count the rows, the first of the gaps, the draws and the seed.

    Raises:
        TooFewTokensError: There are fewer than 10 candidates.
        KnockOutError: The model's attention cannot be cut.
        ValueError: `steps` is below 1, taking all candidates away does not make the answer less
            likely, or as `measure_knock_outs`.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps!r}")
    options = options or KnockOutOptions()
    special = np.isin(trace.token_ids, sorted(special_ids(tracer.require_tokenizer())))
    among = candidate_tokens(trace, special, gap=options.gaps[0])
    text = read_text(tracer, trace)
    values = {name: checked_scores(name, score(text)) for name, score in scores.items()}
    rng = np.random.default_rng([options.seed, *trace.token_ids.tolist()])
    orders = {name: [score] for name, score in values.items()}
    orders["random"] = [rng.permutation(len(among)).astype(float) for _ in range(options.draws)]
    sizes = np.round(np.linspace(0, MOST, steps + 1) * among.sum()).astype(int)
    names = [name for name, drawn in orders.items() for _ in drawn]
    sets = [mask for drawn in orders.values() for one in drawn for mask in _sets(one, among, sizes)]
    unique, place = unique_sets([*sets, among])
    ids, answer = torch.from_numpy(trace.token_ids), torch.from_numpy(trace.spans.answer)
    found = knock_out(tracer.model, ids, answer, unique, rows=options.rows, batch_size=batch_size)
    drop = found.drop.double().numpy()[place]
    if drop[-1] <= 0:
        raise ValueError(
            f"the answer {trace.spans.answer_text!r} is no less likely without any of the "
            f"{int(among.sum())} tokens before it: there is nothing to lose along a curve"
        )
    heights = np.clip(1 - drop[:-1] / drop[-1], 0, 1).reshape(len(names), 2, steps + 1)
    shares = tuple((sizes / among.sum()).tolist())
    return tuple(
        _curve(name, shares, heights[[other == name for other in names]]) for name in orders
    )


def _sets(scores: Scores, among: Mask, sizes: np.ndarray) -> list[Mask]:
    """What is hidden at each step of the deletion, then of the insertion."""
    order = ranking(scores, among)
    deleted = np.zeros((len(sizes), len(among)), bool)
    for row, size in zip(deleted, sizes, strict=True):
        row[order[:size]] = True
    return [*deleted, *(among & ~deleted)]


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
