"""Which attention heads pay the edges into one token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True, kw_only=True, slots=True)
class PayingHead:
    """One head's part of the flow into a token.

    Attributes:
        layer: The number of its layer.
        head: Its number in the layer.
        share: Its share of the flow into the token.
        source: The earlier token with most of that flow.
        source_share: That token's share of the flow that the head pays.
    """

    layer: int
    head: int
    share: float
    source: int
    source_share: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenHeads:
    """What each head pays into one token; `FlowTracer.heads` makes it.

    Attributes:
        token: The number of the token.
        layers: The number of each layer, in the order of the first axis of the arrays.
        edges: The weight of the edge from each earlier token. Its sum over layers and heads is the
            edge of the trace, `trace.attention[token, :token]`. It is 0 for heads that the trace
            does not average, and where a layer has fewer heads than another.
        flow: The flow on each of these edges, a share of the unit that flows to the answer.
    """

    token: int
    layers: tuple[int, ...]
    edges: Float[np.ndarray, "layer head source"]
    flow: Float[np.ndarray, "layer head source"]

    @property
    def shares(self) -> Float[np.ndarray, "layer head"]:
        """Each head's share of the flow along edges into the token; 0 if there is no flow."""
        paid = self.flow.sum(-1)
        total = paid.sum()
        return paid / total if total > 0 else paid

    def strongest(self, count: int = 10) -> tuple[PayingHead, ...]:
        """The heads that pay most of the flow into the token, the strongest first.

        Raises:
            ValueError: `count` is below 1.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count!r}")
        shares = self.shares
        order = np.argsort(-shares, axis=None, kind="stable")[: np.count_nonzero(shares)]
        found = []
        for place in order[:count].tolist():
            row, head = divmod(place, shares.shape[1])
            paid = self.flow[row, head]
            source = int(paid.argmax())
            found.append(
                PayingHead(
                    layer=self.layers[row],
                    head=head,
                    share=float(shares[row, head]),
                    source=source,
                    source_share=float(paid[source] / paid.sum()),
                )
            )
        return tuple(found)
