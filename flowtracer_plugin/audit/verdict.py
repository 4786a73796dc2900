"""The summary of an audit in sentences, as a table and as one document."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from flowtracer_plugin.audit.sampling import Group
from flowtracer_plugin.audit.summary import AuditSummary, Difference, ScorerAudit, holm

RARE = 0.05
"""A difference counts if its adjusted p value is below this."""


def document(
    summary: AuditSummary, groups: Sequence[Group], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The summary as plain values for JSON; None stands for the infinite gamma."""
    return {"settings": settings, **_about(groups), **_finite(asdict(summary))}


def overview(summary: AuditSummary, groups: Sequence[Group]) -> Iterator[str]:
    """The lines that say how much signal the rollouts have."""
    about = _about(groups)
    yield (
        f"{about['with_signal']} of {about['prompts']} prompts got completions with different "
        f"rewards; mean reward {about['mean_reward']:.2f}"
    )
    yield (
        f"uniform credit: cosine {summary.cosine:.3f} with the other half's gradient, the mean of "
        f"{summary.batches} batches; {summary.tokens} tokens of {summary.entropy:.2f} nats"
    )


def table(summary: AuditSummary) -> list[list[str]]:
    """The rows of a table: heads, every scorer from the best down, and uniform credit."""
    gammas = [difference.gamma for difference in summary.scorers[0].differences]
    weights = ["only these" if math.isinf(gamma) else f"gamma {gamma:g}" for gamma in gammas]
    kinds = [kind for kind in summary.classes if kind != "space"]
    versus = ["− random", "− one hop"]
    shares = ["signal", "noise", "chosen", "nats", "answer"]
    return [
        ["scorer", *weights, *versus, *shares, *kinds],
        *(_row(one, kinds) for one in _best_first(summary.scorers)),
        [
            "uniform",
            *[""] * len([*weights, *versus]),
            *("1.00", "1.00", "100%", f"{summary.entropy:z.2f}", ""),
            *(f"{summary.classes[kind]:.0%}" for kind in kinds),
        ],
    ]


def verdict(summary: AuditSummary) -> Iterator[str]:
    """Lines that say which scorers differ from uniform credit, adjusted by Holm's method."""
    first = [one.differences[0] for one in summary.scorers]
    adjusted = holm([difference.p for difference in first])
    differ = [one for one, p in zip(summary.scorers, adjusted, strict=True) if p < RARE]
    better = [one.scorer for one in _best_first(differ) if one.differences[0].mean > 0]
    worse = [one.scorer for one in _best_first(differ) if one.differences[0].mean < 0]
    if better:
        yield f"closer to the reference than uniform credit: {', '.join(better)}"
    if worse:
        yield f"further from the reference than uniform credit: {', '.join(worse)}"
    if not differ:
        yield "none can be told from uniform credit"
    yield (
        f"({len(first)} scorers compared at gamma {first[0].gamma:g}, p below {RARE} after Holm; "
        "random and shuffled say what tilting alone does)"
    )


def _about(groups: Sequence[Group]) -> dict[str, Any]:
    rewards = [reward for group in groups for reward in group.rewards]
    return {
        "prompts": len(groups),
        "with_signal": sum(group.has_signal for group in groups),
        "mean_reward": sum(rewards) / len(rewards),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if value == math.inf else value


def _row(one: ScorerAudit, kinds: Sequence[str]) -> list[str]:
    shares = (one.answer, *(one.classes[kind] for kind in kinds))
    return [
        one.scorer,
        *map(_difference, (*one.differences, one.over_random, one.over_one_hop)),
        *(f"{one.signal:z.2f}", f"{one.noise:z.2f}", f"{one.chosen:.0%}", f"{one.entropy:z.2f}"),
        *(f"{share:.0%}" for share in shares),
    ]


def _difference(found: Difference | None) -> str:
    return "" if found is None else f"{found.mean:+.3f} ± {found.error:.3f}"


def _best_first(scorers: Sequence[ScorerAudit]) -> list[ScorerAudit]:
    return sorted(scorers, key=lambda one: -one.differences[0].mean)
