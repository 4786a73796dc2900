"""Which layers are averaged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def select_layers(selection: str | Sequence[int], available: Sequence[int]) -> tuple[int, ...]:
    """The attention layers that a selection means; `available` are the model's, in order.

    Raises:
        ValueError: There is no such selection or layer.
    """
    if not isinstance(selection, str):
        missing = sorted(set(selection) - set(available))
        if missing or not len(selection):
            raise ValueError(
                f"layers {missing or 'of an empty selection'} have no attention to read; "
                f"this model's attention layers are {list(available)}"
            )
        return tuple(sorted(set(selection)))
    name, _, number = selection.partition(":")
    count = len(available)
    bands = {
        "all": slice(None),
        "early": slice(0, max(1, count // 3)),
        "middle": slice(count // 3, max(count // 3 + 1, 2 * count // 3)),
        "late": slice(2 * count // 3, None),
    }
    if name not in bands or (number and not number.isdecimal()) or number == "0":
        raise ValueError(
            f"layers must be one of {', '.join(bands)}, such a name with a number as in "
            f"'middle:5', or layer numbers, got {selection!r}"
        )
    band = tuple(available[bands[name]])
    if not number:
        return band
    picks = np.linspace(0, len(band) - 1, min(int(number), len(band))).round().astype(int)
    return tuple(band[pick] for pick in picks)
