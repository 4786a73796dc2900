"""The attention of a trace that was made on an accelerator: it stays there until somebody reads it.

The map of all pairs of 8,192 tokens has 268 MB. Most traces are looked at through their backbone,
which is computed where the map is, so that the map need never be copied.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import numpy as np
from jaxtyping import Float
from torch import Tensor


class AttentionMap:
    """A map of all pairs of tokens, on the device or on the host, but not on both.

    Attributes:
        matrix: The map, where it is now.
    """

    def __init__(self, matrix: Float[Tensor, "query key"]) -> None:
        self.matrix: Float[Tensor, "query key"] | Float[np.ndarray, "query key"] = matrix

    def on_host(self) -> Float[np.ndarray, "query key"]:
        """The map as a numpy array; the device's memory is free after the first call."""
        held = self.matrix  # once, since another thread may copy it at the same time
        if isinstance(held, Tensor):
            held = self.matrix = held.cpu().numpy()
        return held

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled trace holds an array, as one that was made on the host does.
        return np.asarray, (self.on_host(),)


class OnDemand:
    """An attribute of a trace that takes a map or an array, and gives the array."""

    def __get__(self, trace: Any, _owner: type) -> Float[np.ndarray, "query key"] | None:
        if trace is None:
            raise AttributeError  # tells dataclasses that there is no default
        held = vars(trace)["attention"]
        return held.on_host() if isinstance(held, AttentionMap) else held

    def __set__(self, trace: Any, value: Any) -> None:
        vars(trace)["attention"] = value


def where_it_is(trace: Any) -> Float[Tensor, "query key"] | Float[np.ndarray, "query key"] | None:
    """The attention of a trace without a copy: on the device if it is still there."""
    held = vars(trace)["attention"]
    return held.matrix if isinstance(held, AttentionMap) else held


class LastMaps:
    """The maps of the traces that were made last; those of earlier traces leave the device.

    So a list of traces takes the memory of the host, and the device holds the maps of one pass.
    """

    def __init__(self) -> None:
        self._kept: WeakSet[AttentionMap] = WeakSet()

    def keep(self, matrix: Float[Tensor, "query key"]) -> AttentionMap:
        """The map of a new trace."""
        found = AttentionMap(matrix)
        self._kept.add(found)
        return found

    def release(self) -> None:
        """Copy the maps that somebody still holds to the host."""
        for one in list(self._kept):
            one.on_host()
        self._kept.clear()
