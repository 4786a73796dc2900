"""Does knocking out the tokens that a score ranks on top change the answer?

Attention to a share of the response's tokens is cut, those with the highest and those with the
lowest scores, and compared with what chance would have chosen. A score that knows what the answer
stands on hurts it more with its top than chance does, and less with its bottom.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from flowtracer_plugin.credit.token_scores import TOKEN_SCORES, TokenScore, read_text
from flowtracer_plugin.evaluation.knockout import ROWS, knock_out
from flowtracer_plugin.text.spans import special_ids
from flowtracer_plugin.trace.flow_trace import FlowTrace
from flowtracer_plugin.trace.tracer import FlowTracer

PERCENTS = (1, 2, 5, 10, 20)
"""Shares of the candidates that are knocked out."""

CONTROLS = ("random", "random_position", "random_class")
"""Sets that chance chooses: of all candidates, or as many as a score did of those at a like
distance to the answer, or of the same class of token."""

BINS = 10
"""Parts of the candidates, by their distance to the answer."""

FEWEST = 10
"""Candidates below which shares of them mean nothing."""

Mask = Bool[np.ndarray, " token"]
Scores = Float[np.ndarray, " token"]


class TooFewTokensError(ValueError):
    """A response has hardly any tokens before its answer that could be knocked out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KnockOutOptions:
    """What is knocked out, and how. Of equal scores, the earlier token ranks higher.

    Attributes:
        rows: From which tokens those that are knocked out are hidden: `"future"`, all later ones,
            or `"answer"`, those that predict the answer.
        percents: How many of the candidates, rounded up.
        gaps: How many tokens right before the answer are no candidates: they often are a template
            such as "The answer is", whose loss hurts whatever the answer. Each gap is measured.
        draws: Of each control.
        matched: The score that the matched controls are matched to.
        seed: Of the draws.
    """

    rows: str = "future"
    percents: tuple[int, ...] = PERCENTS
    gaps: tuple[int, ...] = (0, 5)
    draws: int = 20
    matched: str = "flow"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that no option has.

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
    """What knocking out one kind of set did, for each of the percents; of draws, their mean.

    Attributes:
        gap: Tokens before the answer that were no candidates.
        score: By what the tokens were chosen: the name of a score or of a control.
        side: Its `"top"` or its `"bottom"`; for controls it is `"top"`.
        drop: Of the mean log-probability of the answer's tokens, in nats per token.
        flipped: Share of the sets under which the greedy answer changed.
        divergence: KL divergence of the next-token distribution where the answer is predicted.
    """

    gap: int
    score: str
    side: str
    drop: tuple[float, ...]
    flipped: tuple[float, ...]
    divergence: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Faithfulness:
    """What became of one answer.

    Attributes:
        answer_tokens: Tokens of the answer.
        log_prob: The mean of theirs without a cut, in nats.
        predicted: Whether the model would have given this answer, token by token.
        candidates: How many tokens competed, for each gap.
        effects: Of every score and control.
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
    """Knock out the top and the bottom of every score in one traced text, and what chance chooses.

    Args:
        tracer: Of the model that the trace is of.
        trace: With its attention, `wrap(..., mode="dense")`.
        options: What is knocked out.
        scores: By name. A score is a function of `ScoredText` to one number for each token.
        batch_size: Cuts in one forward pass; as many as memory allows by default.

    Raises:
        TooFewTokensError: There are fewer than 10 candidates.
        KnockOutError: The model's attention cannot be cut.
        ValueError: The trace was streamed, `options.matched` is no score, or a score is not finite.
    """
    options = options or KnockOutOptions()
    if options.matched not in scores:
        raise ValueError(
            f"controls are matched to one of the scores {', '.join(scores)}, got "
            f"{options.matched!r}"
        )
    special = np.isin(trace.token_ids, sorted(special_ids(tracer.require_tokenizer())))
    candidates = [candidate_tokens(trace, special, gap=gap) for gap in options.gaps]
    text = read_text(tracer, trace)
    values = {name: checked_scores(name, score(text)) for name, score in scores.items()}
    sets = [
        chosen
        for gap, among in zip(options.gaps, candidates, strict=True)
        for chosen in chosen_sets(values, among, trace, options, gap)
    ]
    ids, answer = torch.from_numpy(trace.token_ids), torch.from_numpy(trace.spans.answer)
    unique, place = unique_sets([mask for chosen in sets for mask in chosen.masks])
    found = knock_out(tracer.model, ids, answer, unique, rows=options.rows, batch_size=batch_size)
    numbers = [
        part.double().numpy()[place] for part in (found.drop, found.flipped, found.divergence)
    ]
    return Faithfulness(
        answer_tokens=int(answer.sum()),
        log_prob=found.log_prob,
        predicted=found.predicted,
        candidates=tuple(int(among.sum()) for among in candidates),
        effects=_effects(sets, numbers, len(options.percents)),
    )


def candidate_tokens(trace: FlowTrace, special: Mask, *, gap: int) -> Mask:
    """Response tokens before the answer that are not special, without the last `gap` before it.

    Raises:
        TooFewTokensError: There are fewer than 10 of them.
    """
    spans, place = trace.spans, np.arange(len(trace.token_ids))
    first = int(spans.answer.argmax())
    among = spans.response & ~special & (place < first - gap)
    if among.sum() < FEWEST:
        raise TooFewTokensError(
            f"only {int(among.sum())} tokens of the response could be knocked out, {gap} before "
            f"the answer {spans.answer_text!r} left out; wanted at least {FEWEST}"
        )
    return among


class ChosenSets(NamedTuple):
    """Sets of tokens that one score or control chose, for each of the percents in turn."""

    gap: int
    score: str
    side: str
    masks: list[Mask]


def chosen_sets(
    scores: Mapping[str, Scores],
    among: Mask,
    trace: FlowTrace,
    options: KnockOutOptions,
    gap: int,
) -> list[ChosenSets]:
    """Top and bottom of every score, and the draws of the controls, among the candidates."""
    counts = [set_size(int(among.sum()), percent) for percent in options.percents]
    ranked = {name: ranking(score, among) for name, score in scores.items()}
    size = len(among)
    sets = []
    for name, order in ranked.items():
        top = [_mask(order[:count], size) for count in counts]
        bottom = [_mask(order[len(order) - count :], size) for count in counts]
        sets += [ChosenSets(gap, name, "top", top), ChosenSets(gap, name, "bottom", bottom)]
    matched = [ranked[options.matched][:count] for count in counts]
    rng = np.random.default_rng([options.seed, gap, *trace.token_ids.tolist()])
    groups = {
        "random": among.astype(np.int64) - 1,
        "random_position": position_bins(among),
        "random_class": np.where(among, token_classes(trace.tokens), -1),
    }
    for name, group in groups.items():
        draws = [matched_draw(one, group, rng) for one in matched for _ in range(options.draws)]
        sets.append(ChosenSets(gap, name, "top", draws))
    return sets


def set_size(candidates: int, percent: int) -> int:
    """`⌈percent · candidates / 100⌉`.

    Examples:
        >>> set_size(70, 10), set_size(71, 10)
        (7, 8)
    """
    return -(-candidates * percent // 100)


def ranking(scores: Scores, among: Mask) -> Int[np.ndarray, " candidate"]:
    """The candidates' places, the highest score first, of equal ones the earlier."""
    places = np.flatnonzero(among)
    return places[np.argsort(-scores[places], kind="stable")]


def position_bins(among: Mask) -> Int[np.ndarray, " token"]:
    """Which tenth of the candidates each is in, by distance to the answer; −1 for other tokens.

    Tenths differ by at most one token in size.
    """
    number = among.cumsum() - 1
    return np.where(among, BINS * number // max(int(among.sum()), 1), -1)


CLASS_NAMES = ("number", "operator", "punctuation", "space", "word")
"""Classes of tokens."""


def token_classes(tokens: Sequence[str]) -> Int[np.ndarray, " token"]:
    """Number of each token's class, its place in `CLASS_NAMES`."""
    return np.array([_class(token) for token in tokens])


_CLASSES = (
    re.compile(r".*\d.*", re.DOTALL),
    re.compile(r"\s*[-+*/=<>^%×÷−]+\s*"),
    re.compile(r"\s*[^\w\s]+\s*"),
    re.compile(r"\s*"),
)


def _class(token: str) -> int:
    found = (at for at, kind in enumerate(_CLASSES) if kind.fullmatch(token))
    return next(found, len(_CLASSES))


def matched_draw(
    chosen: Int[np.ndarray, " chosen"],
    groups: Int[np.ndarray, " token"],
    rng: np.random.Generator,
) -> Mask:
    """As many tokens of every group as were chosen of it; group −1 is left out."""
    drawn = np.zeros(len(groups), bool)
    for group, count in zip(*np.unique(groups[chosen], return_counts=True), strict=True):
        members = np.flatnonzero(groups == group)
        drawn[rng.choice(members, size=count, replace=False)] = True
    return drawn


def checked_scores(name: str, scores: Scores) -> Scores:
    """The scores of a text.

    Raises:
        ValueError: One is not finite.
    """
    if not np.isfinite(scores).all():
        raise ValueError(f"the score {name!r} is not finite at some tokens")
    return scores


def _mask(places: Int[np.ndarray, " chosen"], size: int) -> Mask:
    mask = np.zeros(size, bool)
    mask[places] = True
    return mask


def unique_sets(masks: Sequence[Mask]) -> tuple[torch.Tensor, Int[np.ndarray, " mask"]]:
    """Each set once, and where each of the given ones is among them."""
    unique, place = np.unique(np.stack(masks), axis=0, return_inverse=True)
    return torch.from_numpy(unique), place.reshape(-1)


def _effects(
    sets: Sequence[ChosenSets], numbers: Sequence[Float[np.ndarray, " set"]], percents: int
) -> tuple[Effect, ...]:
    effects, at = [], 0
    for chosen in sets:
        here = slice(at, at + len(chosen.masks))
        at = here.stop
        means = [tuple(part[here].reshape(percents, -1).mean(1).tolist()) for part in numbers]
        drop, flipped, divergence = means
        effects.append(
            Effect(
                gap=chosen.gap,
                score=chosen.score,
                side=chosen.side,
                drop=drop,
                flipped=flipped,
                divergence=divergence,
            )
        )
    return tuple(effects)
