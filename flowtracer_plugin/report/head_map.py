"""The heads that pay the edges into one token, as a map of layers and heads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flowtracer_plugin.report.display import ShownTrace, Unit
from flowtracer_plugin.result.token_heads import PayingHead, TokenHeads

MOST_LISTED = 10
_WIDTH, _LARGEST, _SMALLEST = 720, 22, 7
"""The width of a map, and the sizes of its cells, in pixels."""

_LEAST = 5e-4
"""The least share that is drawn: a map of thousands of heads would be a large page."""


@dataclass(frozen=True, kw_only=True)
class HeadCell:
    """A head on the map.

    Attributes:
        row: The place of its layer.
        head: Its number.
        share: Its share of the flow into the token.
        strength: Its share divided by the largest share.
    """

    row: int
    head: int
    share: float
    strength: float


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadMap:
    """What a page shows of the heads that pay the edges into a token.

    Attributes:
        shown: The trace.
        heads: What the heads pay.
    """

    shown: ShownTrace
    heads: TokenHeads

    @property
    def unit(self) -> Unit:
        """The token."""
        return self.shown.unit_of(self.heads.token)

    @property
    def size(self) -> int:
        """The width and the height of a cell, in pixels."""
        return int(np.clip(_WIDTH // self.heads.edges.shape[1], _SMALLEST, _LARGEST))

    @property
    def columns(self) -> int:
        """The most heads of a layer."""
        return int(self.heads.edges.shape[1])

    @property
    def step(self) -> int:
        """Every how many layers and heads a number has room."""
        return -(-16 // self.size)

    @cached_property
    def cells(self) -> tuple[HeadCell, ...]:
        """The heads that pay something, by layer and head."""
        shares = self.heads.shares
        return tuple(
            HeadCell(
                row=row,
                head=head,
                share=float(shares[row, head]),
                strength=round(float(shares[row, head] / shares.max()), 3),
            )
            for row, head in np.argwhere(shares >= _LEAST).tolist()
        )

    @property
    def listed(self) -> tuple[tuple[PayingHead, Unit], ...]:
        """The heads that pay most, each with the token from which most of it comes."""
        strongest = self.heads.strongest(MOST_LISTED)
        return tuple((one, self.shown.unit_of(one.source)) for one in strongest)


def head_map(shown: ShownTrace, heads: TokenHeads) -> HeadMap:
    """The map of the heads.

    Raises:
        ValueError: They are not those of a token of this trace.
    """
    if not 0 < heads.token < len(shown.trace.tokens) or heads.flow.shape[-1] != heads.token:
        raise ValueError(
            f"wanted the heads of one of the {len(shown.trace.tokens)} tokens of this trace, found "
            f"those of token {heads.token} with {heads.flow.shape[-1]} earlier ones; make them "
            "with tracer.heads(trace, token)"
        )
    return HeadMap(shown=shown, heads=heads)
