"""Slow definitions of the method, step by step: loops in float64, for one graph."""

from itertools import combinations

import numpy as np


def reach(weight, answer, boundary="literal"):
    """h(i) = 1[i in A] + sum over k > i of W[i, k] h(k); 1 on the answer if it absorbs."""
    h = np.zeros(len(weight))
    for i in reversed(range(len(weight))):
        h[i] = float(answer[i])
        if not (answer[i] and boundary == "absorbing"):
            for k in range(i + 1, len(weight)):
                h[i] += weight[i, k] * h[k]
    return h


def conditioned(weight, answer, boundary="literal"):
    """P[i, k] = W[i, k] h(k) / h(i), and a last column for the sink: 1 / h(i) on the answer."""
    h = reach(weight, answer, boundary)
    size = len(weight)
    p = np.zeros((size, size + 1))
    for i in range(size):
        if h[i] > 0:
            p[i, size] = float(answer[i]) / h[i]
            if not (answer[i] and boundary == "absorbing"):
                for k in range(i + 1, size):
                    p[i, k] = weight[i, k] * h[k] / h[i]
    return p


def source(weight, question, answer, question_weights="uniform", boundary="literal"):
    """mu: one unit over the question tokens that reach the answer, equal or in proportion to h.

    Or over all tokens outside the answer, in proportion to the part of h that a walk back from the
    answer does not carry on to earlier tokens.
    """
    h = reach(weight, answer, boundary)
    share = []
    for k in range(len(weight)):
        if question_weights == "origins":
            before = [i for i in range(k) if not (answer[i] and boundary == "absorbing")]
            kept = max(0.0, 1.0 - sum(weight[i, k] for i in before))
            share.append(0.0 if answer[k] else h[k] * kept)
        else:
            one = h[k] if question_weights == "reach" else 1.0
            share.append(one if question[k] and h[k] > 0 else 0.0)
    return np.array(share) / sum(share)


def flow(attention, question, answer, question_weights="uniform", boundary="literal"):
    """Reach, source, throughput f, edge flow phi[k, i] and sink flow of [query, key] attention."""
    weight = np.triu(np.asarray(attention, dtype=np.float64).T, 1)
    p = conditioned(weight, answer, boundary)
    mu = source(weight, question, answer, question_weights, boundary)
    size = len(weight)
    f, phi = np.zeros(size), np.zeros((size, size))
    for k in range(size):
        f[k] = mu[k]
        for i in range(k):
            phi[k, i] = f[i] * p[i, k]
            f[k] += phi[k, i]
    return {
        "reach": reach(weight, answer, boundary),
        "source": mu,
        "throughput": f,
        "edge_flow": phi,
        "sink_flow": f * p[:, size],
    }


def throughput_by_paths(attention, question, answer):
    """Throughput from a list of all paths.

    The paths of one question token share its part of the unit in proportion to their products of
    attention. A path may pass through answer tokens, and ends at one.
    """
    size = len(attention)
    f = np.zeros(size)
    sources = []
    for start in np.flatnonzero(question):
        through = np.zeros(size)
        for length in range(size):
            for later in combinations(range(start + 1, size), length):
                path = (int(start), *later)
                if answer[path[-1]]:
                    hops = zip(path[1:], path[:-1], strict=True)
                    through[list(path)] += np.prod([attention[k][i] for k, i in hops])
        if through[start] > 0:
            sources.append(through / through[start])
    for through in sources:
        f += through / len(sources)
    return f


def pruned(attention, top_k=None, mass=None):
    """Off-diagonal attention with only the strongest edges of each row."""
    kept = np.zeros(np.shape(attention))
    for k, row in enumerate(np.asarray(attention, dtype=np.float64)):
        total, held = sum(row[:k]), 0.0
        for count, i in enumerate(sorted(range(k), key=lambda i: (-row[i], i))):
            if row[i] > 0 and (count < top_k if top_k else held < mass * total):
                kept[k, i] = row[i]
                held += row[i]
    return kept
