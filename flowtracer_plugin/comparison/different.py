"""The most different rollouts of two groups, in pairs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from flowtracer_plugin.comparison.permutation import Sides, effects


@dataclass(frozen=True, kw_only=True, slots=True)
class Different:
    """The most different pairs of rollouts, one of each group.

    Attributes:
        measure: The measure by which they differ.
        pairs: Their numbers, that of the first group first; the most different pair is first.
        same_prompt: So many pairs, the first ones, are answers to one prompt.
    """

    measure: str
    pairs: tuple[tuple[int, int], ...]
    same_prompt: int


def most_different(
    values: Float[np.ndarray, "rollout measure"],
    names: Sequence[str],
    sides: Sides,
    prompts: Sequence[Hashable],
    count: int,
) -> Different:
    """The most different rollouts of two groups, in at most `count` pairs.

    They are ranked by one measure: that whose means differ most, in standard deviations. Of each
    prompt with rollouts in both groups, the one with the highest value in the group with the
    higher mean, and the one with the lowest in the other group, make a pair. Behind these pairs,
    the remaining rollouts are paired likewise across prompts: highest with lowest, and so on.

    Args:
        values: The measures of each rollout.
        names: The names of the measures.
        sides: The groups.
        prompts: The prompt of each rollout, or what stands for it.
        count: The most pairs.
    """
    first, second = list(sides.first), list(sides.second)
    found = effects(values, sides)
    best = int(np.abs(found).argmax())
    height = (values[:, best] * (-1.0 if found[best] < 0 else 1.0)).tolist()
    # Equal values are ordered by the number of the rollout.
    tops = sorted(first, key=lambda one: (-height[one], one))
    bottoms = sorted(second, key=lambda one: (height[one], one))
    top: dict[Hashable, int] = {}
    bottom: dict[Hashable, int] = {}
    for ends, ranked in ((top, tops), (bottom, bottoms)):
        for one in ranked:
            ends.setdefault(prompts[one], one)
    paired = [(one, bottom[prompt]) for prompt, one in top.items() if prompt in bottom]
    paired = [pair for pair in paired if height[pair[0]] > height[pair[1]]]
    paired.sort(key=lambda pair: (height[pair[1]] - height[pair[0]], pair))
    used = {one for pair in paired for one in pair}
    rest = zip(
        (one for one in tops if one not in used),
        (one for one in bottoms if one not in used),
        strict=False,
    )
    return Different(
        measure=names[best],
        pairs=(*paired, *rest)[:count],
        same_prompt=min(len(paired), count),
    )
