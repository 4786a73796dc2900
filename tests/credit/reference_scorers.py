"""Slow definitions of the scorers: plain loops in float64 over one rollout without its padding."""

import math
import statistics
from fractions import Fraction


def top(scores, competing, top_fraction):
    """1 for the highest scores of the competing tokens: earlier ones first, none that is 0."""
    counted = [i for i, counts in enumerate(competing) if counts]
    limit = math.ceil(Fraction(str(top_fraction)) * len(counted))
    chosen = sorted(counted, key=lambda i: (-scores[i], i))[:limit]
    return [float(i in chosen and scores[i] > 0) for i in range(len(scores))]


def rhythm(maps, prompt_length, window, horizon):
    """Equations 7 to 10 on the maps [query][key] of all heads: WAAD, FAI and Delta."""
    size, heads = len(maps[0]), range(len(maps))
    response = range(prompt_length, size)

    def distance(head):
        paid = sum(maps[head][t][s] * (t - s) for t in response for s in range(t + 1))
        return paid / max(len(response), 1)

    def mean(chosen, t, s):
        return sum(maps[head][t][s] for head in chosen) / len(chosen)

    count, distances = math.ceil(Fraction("0.3") * len(maps)), [distance(head) for head in heads]
    near = sorted(heads, key=lambda head: distances[head])[:count]
    far = sorted(heads, key=lambda head: -distances[head])[:count]
    waad = [sum(mean(near, t, s) * min(t - s, window) for s in range(t + 1)) for t in response]
    fai = []
    for s in response:
        ahead = [t for t in response if s + horizon[0] <= t <= s + horizon[1]]
        fai.append(sum(mean(far, t, s) for t in ahead) / max(len(ahead), 1))
    step = [abs(here - after) for here, after in zip(waad, [*waad[1:], *waad[-1:]], strict=True)]
    return waad, fai, step


def coupled(waad, step, anchors, competing, alpha, reach):
    """1 on anchors; an anchor that a step precedes gives the share `alpha` to that step."""
    counted = [i for i, counts in enumerate(competing) if counts]
    boost = [float(anchor) for anchor in anchors]
    led, leaders = [], set()
    for t in range(len(anchors)):
        before = [u for u in range(max(0, t - reach), t) if competing[u]]
        if not anchors[t] or not before:
            continue
        leader = max(before, key=lambda u: (step[u], -u))
        calm = waad[t] <= statistics.median_low(waad[i] for i in counted)
        if calm and step[leader] >= statistics.median_low(step[i] for i in counted):
            led.append(t)
            leaders.add(leader)
    for t in led:
        boost[t] -= alpha
    for u in leaders:
        boost[u] += alpha
    return boost


def bins(competing, answer):
    """Each competing token's bin: in the answer or not, and its tenth; None for the others."""
    counted = [i for i, counts in enumerate(competing) if counts]
    return [
        (bool(answer[i]), 10 * counted.index(i) // len(counted)) if i in counted else None
        for i in range(len(competing))
    ]


def permuted(groups, mask, draws):
    """Within each group, the first entry moves to the place of the smallest draw, and so on."""
    moved = [False] * len(mask)
    for group in set(groups):
        places = [i for i, other in enumerate(groups) if other == group]
        for source, place in zip(places, sorted(places, key=lambda i: draws[i]), strict=True):
            moved[place] = mask[source]
    return moved


def hops(attention, target, prompt_length, count):
    """Mean attention of the target's rows along all paths of `count` hops, without self-loops."""
    size = len(target)
    row = [t / max(sum(target), 1) for t in target]
    for _ in range(count):
        row = [sum(row[q] * attention[q][k] for q in range(k + 1, size)) for k in range(size)]
    return row[prompt_length:]


def rollout(layers, target, prompt_length):
    """Half of each row's share stays, half follows the layer's mean map, from the last layer on."""
    size = len(target)
    row = [t / max(sum(target), 1) for t in target]
    for layer in reversed(layers):
        row = [row[k] / 2 + sum(row[q] * layer[q][k] for q in range(size)) / 2 for k in range(size)]
    return row[prompt_length:]


def bottom(scores, competing, top_fraction):
    """1 for the lowest scores of the competing tokens, earlier ones first, if one is not 0."""
    counted = [i for i, counts in enumerate(competing) if counts]
    limit = math.ceil(Fraction(str(top_fraction)) * len(counted))
    chosen = sorted(counted, key=lambda i: (scores[i], i))[:limit]
    some = any(scores[i] > 0 for i in counted)
    return [float(some and i in chosen) for i in range(len(scores))]
