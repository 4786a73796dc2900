"""The summary of an audit: cosines, their differences with errors, and what each scorer chose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import t as student

from flowtracer_plugin.audit.run import BatchAudit
from flowtracer_plugin.evaluation.token_sets import CLASS_NAMES

GAMMAS = (1.5, 3.0, math.inf)
"""Weights of the chosen tokens: the paper's, a stronger one, and the chosen tokens alone."""

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A scorer's cosine with the reference, minus another scorer's in the same batches.

    Attributes:
        gamma: Weight of the chosen tokens; infinite if the others have weight 0.
        cosine: Mean of the scorer's cosine over the batches.
        mean: Mean of the differences.
        error: Standard error of that mean.
        low: Lower end of its 95 % interval, by Student's t.
        high: Upper end of that interval.
        p: Two-sided p-value of no difference, by Student's t.
    """

    gamma: float
    cosine: float
    mean: float
    error: float
    low: float
    high: float
    p: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerAudit:
    """The findings about one scorer.

    Attributes:
        scorer: Name of the scorer.
        differences: Its cosine minus that of uniform credit, for each gamma.
        over_random: Its cosine minus that of `random`, at the first gamma, if both were audited.
        over_one_hop: Its cosine minus that of `attention`, in the same way.
        signal: The chosen tokens' projection on the reference, as a share of that of all tokens.
            Shares of disjoint choices add up to 1; one can be above 1, or below 0.
        noise: Length of the chosen gradient orthogonal to the reference, as a share of that of
            all tokens. Where signal is above noise, the chosen tokens alone point closer to the
            reference than all tokens do. A gamma near 1 already helps where signal is above the
            square of noise, if the noise of the other tokens is independent.
        chosen: Share of the tokens that are chosen.
        entropy: Mean entropy of the chosen tokens, in nats.
        answer: Share of the chosen tokens that belong to the answer.
        classes: Share of the chosen tokens in each class.
    """

    scorer: str
    differences: tuple[Difference, ...]
    over_random: Difference | None
    over_one_hop: Difference | None
    signal: float
    noise: float
    chosen: float
    entropy: float
    answer: float
    classes: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditSummary:
    """The findings of an audit.

    Attributes:
        batches: Number of batches with signal.
        cosine: Cosine of uniform credit with the reference, the mean over the batches.
        tokens: Number of tokens that scorers could choose.
        entropy: Mean entropy of these tokens, in nats.
        classes: Share of these tokens in each class.
        scorers: The findings about each scorer, in the order of the audit.
    """

    batches: int
    cosine: float
    tokens: int
    entropy: float
    classes: dict[str, float]
    scorers: tuple[ScorerAudit, ...]


def summarise_audit(
    batches: Sequence[BatchAudit], *, gammas: Sequence[float] = GAMMAS
) -> AuditSummary:
    """The means over all batches, each with the same weight.

    Differences are taken within batches. The batches of one half share a reference, so the errors
    say how other batches would differ with the same references.

    Raises:
        ValueError: There are fewer than two batches.
    """
    if len(batches) < 2:
        raise ValueError(
            f"wanted at least 2 batches in which rewards differ, found {len(batches)}; take more "
            "prompts or completions"
        )
    tokens = sum(batch.tokens for batch in batches)
    classes = np.sum([batch.classes for batch in batches], axis=0) / max(tokens, 1)
    return AuditSummary(
        batches=len(batches),
        cosine=float(_uniform(batches).mean()),
        tokens=tokens,
        entropy=sum(batch.entropy for batch in batches) / max(tokens, 1),
        classes=dict(zip(CLASS_NAMES, classes.tolist(), strict=True)),
        scorers=tuple(_scorer(name, batches, gammas) for name in batches[0].tilts),
    )


def _scorer(name: str, batches: Sequence[BatchAudit], gammas: Sequence[float]) -> ScorerAudit:
    tilts = [batch.tilts[name] for batch in batches]
    own = np.array([tilt.with_reference for tilt in tilts])
    whole = np.array([batch.with_reference for batch in batches])
    across = np.array([tilt.squared for tilt in tilts]) - own**2
    whole_across = np.array([batch.squared for batch in batches]) - whole**2
    chosen = sum(tilt.chosen for tilt in tilts)
    classes = np.sum([tilt.classes for tilt in tilts], axis=0) / max(chosen, 1e-12)
    return ScorerAudit(
        scorer=name,
        differences=tuple(_difference(name, None, batches, gamma) for gamma in gammas),
        over_random=_versus("random", name, batches, gammas[0]),
        over_one_hop=_versus("attention", name, batches, gammas[0]),
        signal=float(own.sum() / whole.sum()),
        noise=math.sqrt(max(0.0, float(across.sum() / whole_across.sum()))),
        chosen=chosen / max(1, sum(batch.tokens for batch in batches)),
        entropy=sum(tilt.entropy for tilt in tilts) / max(chosen, 1e-12),
        answer=sum(tilt.answer for tilt in tilts) / max(chosen, 1e-12),
        classes=dict(zip(CLASS_NAMES, classes.tolist(), strict=True)),
    )


def _versus(
    other: str, name: str, batches: Sequence[BatchAudit], gamma: float
) -> Difference | None:
    if other == name or other not in batches[0].tilts:
        return None
    return _difference(name, other, batches, gamma)


def _difference(
    name: str, other: str | None, batches: Sequence[BatchAudit], gamma: float
) -> Difference:
    """The difference from another scorer, or from uniform credit."""
    cosines = tilted_cosines(name, batches, gamma)
    others = _uniform(batches) if other is None else tilted_cosines(other, batches, gamma)
    differences = cosines - others
    size = len(differences)
    mean, error = float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(size))
    reach = float(student.ppf((1 + CONFIDENCE) / 2, size - 1)) * error
    p = 1.0 if error == 0 else float(2 * student.sf(abs(mean) / error, size - 1))
    return Difference(
        gamma=gamma,
        cosine=float(cosines.mean()),
        mean=mean,
        error=error,
        low=mean - reach,
        high=mean + reach,
        p=p,
    )


def tilted_cosines(
    name: str, batches: Sequence[BatchAudit], gamma: float
) -> Float[np.ndarray, " batch"]:
    """The cosine of `g(1) + (gamma − 1) · g(boost)` with the reference; 0 for an empty gradient."""
    found = []
    for batch in batches:
        tilt = batch.tilts[name]
        plain, more = (0.0, 1.0) if math.isinf(gamma) else (1.0, gamma - 1.0)
        along = plain * batch.with_reference + more * tilt.with_reference
        squared = (
            plain * batch.squared + 2 * plain * more * tilt.with_uniform + more**2 * tilt.squared
        )
        found.append(along / math.sqrt(squared) if squared > 0 else 0.0)
    return np.array(found)


def _uniform(batches: Sequence[BatchAudit]) -> Float[np.ndarray, " batch"]:
    return np.array([batch.with_reference / math.sqrt(batch.squared) for batch in batches])


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """The p-values of several tests, adjusted for their number by Holm's step-down method.

    Examples:
        >>> [round(p, 4) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, so_far = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = so_far
    return tuple(adjusted)
