"""How two sides differ, as it is shown: a coloured text, its scale, and a table of words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from markupsafe import Markup

from flowtracer_plugin.comparison.permutation import Sides
from flowtracer_plugin.comparison.texts import Beginning, Word, least_texts
from flowtracer_plugin.report.display import Piece, number, piece_starts, shown_text
from flowtracer_plugin.report.pages.completion import LEVELS, Excerpt, ends_of, level_class
from flowtracer_plugin.report.pages.payload import embed

MOST_WORDS = 200

_STEP = 3.0
"""From one step of colour to the next: few tokens differ much, linear steps leave most blank."""


@dataclass(frozen=True, kw_only=True)
class SharedPiece(Piece):
    """A piece of a text that all have; of several tokens the one that differs most counts.

    Attributes:
        token: The token that counts.
        level: Step of colour; above zero where the first side has more.
        style: Its other style.
    """

    token: int
    level: int
    style: str

    @property
    def classes(self) -> str:
        """Its styles."""
        return " ".join(filter(None, (level_class(self.level), self.style)))


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedExcerpt(Excerpt):
    """A part of what all texts begin with."""

    parts: tuple[tuple[SharedPiece, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Person:
    """How a page refers to a text: what it calls it, where that leads, and whether it is right."""

    label: str
    link: str
    right: bool | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Differences:
    """What the pages show of two sides.

    Attributes:
        names: What the sides are called.
        sides: Which texts they are; None for the highest and the lowest.
        people: All texts.
        beginning: What all texts begin with.
        tokens: Its tokens.
        excerpts: Its text by part, such as prompt and response; parts without tokens are left out.
        scale: Style and numbers of each step of colour, from the lowest to the highest.
        words: Those that are listed.
        word_count: How many there are.
    """

    names: tuple[str, str]
    sides: Sides | None
    people: Sequence[Person]
    beginning: Beginning
    tokens: Sequence[str]
    excerpts: dict[str, SharedExcerpt]
    scale: list[tuple[str, str]]
    words: tuple[Word, ...]
    word_count: int

    @property
    def least(self) -> int:
        """In how many texts each word is at least."""
        return least_texts(len(self.people if self.sides is None else self.sides.members))

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many texts are on each side."""
        return () if self.sides is None else (len(self.sides.first), len(self.sides.second))

    @property
    def data(self) -> Markup:
        """What the script knows of the shared text's pieces."""
        pieces = [
            piece for excerpt in self.excerpts.values() for part in excerpt.parts for piece in part
        ]
        numbers = self.beginning.contrast.columns()
        return embed(
            {
                "names": self.names,
                "shared": [
                    {
                        "text": "".join(self.tokens[piece.first : piece.last + 1]),
                        "tokens": [piece.first, piece.last],
                        "numbers": [_short(value) for value in numbers[piece.token].values()],
                    }
                    for piece in pieces
                ],
            }
        )


def show_differences(
    tokens: Sequence[str],
    parts: dict[str, tuple[int, int]],
    styles: Sequence[str],
    beginning: Beginning,
    words: tuple[Word, ...],
    sides: Sides | None,
    *,
    names: tuple[str, str],
    people: Sequence[Person],
    most: int,
) -> Differences:
    """What is shown of `beginning` and `words`.

    Args:
        tokens: A text; what all begin with is its beginning.
        parts: First token, and the one after the last, of each part of that.
        styles: The style of every token besides its colour.
        beginning: How the flow through what all begin with differs.
        words: How the flow through words differs.
        sides: What is compared with what.
        names: What the sides are called.
        people: All texts.
        most: Tokens of a part that are shown; of more, the middle is left out.
    """
    differences = beginning.contrast.difference
    largest = float(np.abs(differences).max(initial=0.0))
    levels = difference_levels(differences, largest)
    return Differences(
        names=names,
        sides=sides,
        people=people,
        beginning=beginning,
        tokens=tokens,
        excerpts={
            name: SharedExcerpt(
                parts=ends_of(_pieces(tokens, bounds, differences, levels, styles), most),
                stop=bounds[1],
            )
            for name, bounds in parts.items()
            if bounds[1] > bounds[0]
        },
        scale=difference_scale(largest, both=sides is not None),
        words=words[:MOST_WORDS],
        word_count=len(words),
    )


def difference_levels(
    differences: Float[np.ndarray, " thing"], largest: float
) -> Int[np.ndarray, " thing"]:
    """Steps of colour from `-LEVELS` to `LEVELS`, each reaching down to a third of its top."""
    if not largest:
        return np.zeros(differences.shape, np.int64)
    ratio = np.maximum(np.abs(differences) / largest, _STEP ** -(LEVELS + 1))
    # Rounded: a difference that lies on a bound must not depend on the last bit.
    steps = LEVELS + np.ceil(np.round(np.log(ratio) / math.log(_STEP), 6))
    return (np.sign(differences) * np.maximum(steps, 0)).astype(np.int64)


def difference_scale(largest: float, *, both: bool) -> list[tuple[str, str]]:
    """Style, and percentage points, of each step of colour, from the lowest to the highest."""
    if not largest:
        return []
    bounds = [number(100 * largest / _STEP**below) for below in reversed(range(LEVELS + 1))]
    steps = [(level, f"{bounds[level - 1]} to {bounds[level]}") for level in range(1, LEVELS + 1)]
    return [
        *((level_class(-level), text) for level, text in reversed(steps) if both),
        ("", f"below {bounds[0]}"),
        *((level_class(level), text) for level, text in steps),
    ]


def _pieces(
    tokens: Sequence[str],
    bounds: tuple[int, int],
    differences: Float[np.ndarray, " token"],
    levels: Int[np.ndarray, " token"],
    styles: Sequence[str],
) -> tuple[SharedPiece, ...]:
    starts = (piece_starts(tokens[slice(*bounds)]) + bounds[0]).tolist()
    pieces = []
    for start, stop in zip(starts, [*starts[1:], bounds[1]], strict=True):
        token = start + int(np.abs(differences[start:stop]).argmax())
        pieces.append(
            SharedPiece(
                first=start,
                last=stop - 1,
                text=shown_text(tokens[start:stop]),
                token=token,
                level=int(levels[token]),
                style=styles[stop - 1],
            )
        )
    return tuple(pieces)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
