"""Slow definitions of the differences between two sides, in exact fractions."""

from collections import Counter
from fractions import Fraction
from itertools import permutations


def exact(values):
    return [[Fraction(value) for value in row] for row in values]


def difference(rows, first, second, thing):
    sides = [[rows[text][thing] for text in side] for side in (first, second)]
    return sum(sides[0]) / len(first) - sum(sides[1]) / len(second)


def p_values(values, first, second):
    """The p-value of each thing, alone and corrected, counted over all orders of the texts."""
    rows, things = exact(values), range(len(values[0]))
    seen = [abs(difference(rows, first, second, thing)) for thing in things]
    alone, of_any, orders = Counter(), Counter(), 0
    for order in permutations((*first, *second)):
        orders += 1
        dealt = order[: len(first)], order[len(first) :]
        found = [abs(difference(rows, *dealt, thing)) for thing in things]
        for thing in things:
            alone[thing] += found[thing] >= seen[thing]
            of_any[thing] += max(found) >= seen[thing]
    return [
        [float(Fraction(counts[thing], orders)) for thing in things] for counts in (alone, of_any)
    ]


def shared(texts):
    """The largest length at which all texts begin alike."""
    fitting = range(min(map(len, texts)) + 1)
    return max(size for size in fitting if all(text[:size] == texts[0][:size] for text in texts))


def word_shares(pieces, flows, counted):
    """The share of each word in a text's flow; a token counts with the token that completes it."""
    tokens = zip(pieces, flows, counted, strict=True)
    own = [(piece, Fraction(flow)) for piece, flow, kept in tokens if kept]
    spelled = [place for place, (piece, _) in enumerate(own) if piece]
    shares = Counter()
    for place, (_, flow) in enumerate(own):
        later = [end for end in spelled if end >= place]
        if spelled:
            piece = own[later[0] if later else spelled[-1]][0]
            shares[piece.strip() or piece] += flow
    total = sum(shares.values())
    return {word: flow / total if total else Fraction(0) for word, flow in shares.items()}


def entering(edges, source, bounds, prompt, target):
    """Flow into the line of the first target and later lines: from the prompt, and in three thirds.

    `edges[later][earlier]` is the flow on an edge, `source` the injected flow.
    """
    start = next(first for first, stop in bounds if first <= min(target) < stop)
    line_of = {token: line for line in bounds for token in range(*line)}
    found = [0.0, 0.0, 0.0, 0.0]
    for later in range(start, len(source)):
        found[0] += source[later]
        for earlier in range(start):
            if earlier < prompt:
                found[0] += edges[later][earlier]
            else:
                middle = sum(line_of[earlier]) / 2
                found[1 + int(3 * (middle - prompt) / (start - prompt))] += edges[later][earlier]
    return found
