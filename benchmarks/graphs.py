"""Random attention for benchmarks of the flow, whose time does not depend on the numbers."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

Attention = Float[np.ndarray, "query key"]
Mask = Bool[np.ndarray, " token"]


def random_attention(tokens: int, *, density: float = 1.0, seed: int = 0) -> Attention:
    """Causal float32 attention with rows that sum to one and a share `density` of all edges."""
    rng = np.random.default_rng(seed)
    attention = rng.random((tokens, tokens), dtype=np.float32)
    if density < 1:
        attention *= rng.random((tokens, tokens), dtype=np.float32) < density
        # A token's attention to itself is not an edge, and keeps its row from being empty.
        np.fill_diagonal(attention, 1.0)
    attention = np.tril(attention)
    attention /= attention.sum(1, keepdims=True)
    return attention


def ends(tokens: int) -> tuple[Mask, Mask]:
    """Masks of a question in the first quarter, and of an answer of four tokens at the end."""
    place = np.arange(tokens)
    return (place > 0) & (place < tokens // 4), place >= tokens - 4
