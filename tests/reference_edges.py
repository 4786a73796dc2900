"""The slow definition of edges between tokens that are not the plain mean of all heads."""

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

    The heads with the most attention from target rows to earlier reasoning tokens are averaged;
    each head's row is weighed by the lengths, and scaled back to the sum that it had.
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
    total = np.zeros_like(maps[0][0])
    for _, layer, head in chosen:
        rows = maps[layer][head].copy()
        if lengths is not None:
            for query in range(len(rows)):
                weighed = rows[query] * lengths[layer][head]
                if weighed.sum() > 0:
                    rows[query] = weighed * rows[query].sum() / weighed.sum()
        total += rows / len(chosen)
    return total, tuple(sorted((layer, head) for _, layer, head in chosen))
