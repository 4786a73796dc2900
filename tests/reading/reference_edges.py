"""The slow definition of edges that are not the plain mean of all heads."""

from __future__ import annotations

import math

import numpy as np
import torch


def lengths_by_hand(projection, value, heads):
    """`‖W_O v‖`: each head's value alone, in its place, goes through the projection."""
    batch, groups, keys, width = value.shape
    found = np.zeros((batch, heads, keys))
    with torch.no_grad():
        nothing = projection(torch.zeros(heads * width, dtype=value.dtype))
        for b, h, k in np.ndindex(batch, heads, keys):
            alone = torch.zeros(heads * width, dtype=value.dtype)
            alone[h * width : (h + 1) * width] = value[b, h * groups // heads, k]
            found[b, h, k] = (projection(alone) - nothing).double().norm()
    return found


def edges_by_hand(maps, lengths, target, reasoning, share):
    """One text: maps [layer][head, query, key], lengths [layer][head, key] or None.

    The heads with the most attention from target rows to earlier reasoning tokens are averaged,
    each weighed by its lengths, and every row is scaled back to the sum that it had without these.
    """
    paid = []
    for layer, heads in enumerate(maps):
        for head, rows in enumerate(heads):
            pairs = ((q, k) for q in np.flatnonzero(target) for k in range(q) if reasoning[k])
            paid.append((sum(rows[q, k] for q, k in pairs), layer, head))
    ranked = sorted(paid, key=lambda one: (-one[0], one[1], one[2]))
    chosen = ranked[: math.ceil(round(share * len(ranked), 9))]
    if all(one[0] == 0 for one in paid):
        chosen = ranked
    total, before = np.zeros_like(maps[0][0]), np.zeros(len(target))
    for _, layer, head in chosen:
        rows = maps[layer][head]
        before += rows.sum(1) / len(chosen)
        total += (rows if lengths is None else rows * lengths[layer][head]) / len(chosen)
    for query, sum_before in enumerate(before):
        if total[query].sum() > 0:
            total[query] *= sum_before / total[query].sum()
    return total, tuple(sorted((layer, head) for _, layer, head in chosen))
