"""Which layers of a model are averaged."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import numpy as np


def select_layers(selection: str | Sequence[int], available: Sequence[int]) -> tuple[int, ...]:
    """The layer numbers that a selection means; `available` are the model's attention layers.

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
    third = round(len(available) / 3)
    bands = {
        "all": slice(None),
        "early": slice(0, third),
        "middle": slice(third, len(available) - third),
        "late": slice(len(available) - third, None),
    }
    wanted = re.fullmatch(rf"({'|'.join(bands)})(?::([1-9][0-9]*))?", selection)
    if wanted is None:
        raise ValueError(
            f"layers must be one of {', '.join(bands)}, such a name with a number as in "
            f"'middle:5', or layer numbers, got {selection!r}"
        )
    name, number = wanted.groups()
    # One or two layers have no thirds, so an empty third means all of them.
    band = tuple(available[bands[name]] or available)
    if number is None:
        return band
    picks = np.linspace(0, len(band) - 1, min(int(number), len(band))).round().astype(int)
    return tuple(band[pick] for pick in picks)


def layer_numbers(layers: int | Iterable[SupportsIndex]) -> tuple[int, ...]:
    """Layer numbers as plain integers, from any kind of integers, such as a numpy array."""
    numbers: Iterable[SupportsIndex] = [layers] if isinstance(layers, int) else layers
    return tuple(operator.index(number) for number in numbers)
