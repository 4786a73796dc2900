"""How two sides differ, on a page: the shared text in colour, its scale, and a table of words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int
from markupsafe import Markup

from flowtracer_plugin.comparison.permutation import Sides
from flowtracer_plugin.comparison.texts import Beginning, Word, least_texts
from flowtracer_plugin.report.display import Piece, number, piece_starts, shown_text
from flowtracer_plugin.report.pages.assets import embed
from flowtracer_plugin.report.pages.completion import LEVELS, Excerpt, ends_of, level_class

MOST_WORDS = 200

LEAST_TOP = 1.0
"""The least percentage points at which the strongest shade begins: differences of a fraction of a
point must not look like large ones."""


@dataclass(frozen=True, kw_only=True)
class SharedPiece(Piece):
    """A piece of the text that all texts share, with the numbers of its token that differs most.

    Attributes:
        token: The token that differs most.
        level: Its shade; above zero if the first side has more flow.
        style: Its other CSS class.
    """

    token: int
    level: int
    style: str

    @property
    def classes(self) -> str:
        """Its CSS classes."""
        return " ".join(filter(None, (level_class(self.level), self.style)))


@dataclass(frozen=True, kw_only=True)
class Reference:
    """How a page refers to a text: its label, its link, and whether it is right (None: unknown)."""

    label: str
    link: str
    right: bool | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Differences:
    """The differences between two sides, as pages show them.

    Attributes:
        names: The names of the sides.
        marks: The marks of right and wrong texts, or of those above and below.
        sides: The texts on each side; None if the highest and the lowest values are compared.
        references: How the page refers to each text.
        beginning: The beginning that all texts share.
        tokens: The tokens of one text, which starts with that beginning.
        excerpts: The beginning by part, such as prompt and response; parts without tokens are left
            out.
        scale: The CSS class and the range of each shade, from the lowest to the highest.
        words: The words that are listed.
        word_count: The number of all words with flow.
    """

    names: tuple[str, str]
    marks: tuple[str, str]
    sides: Sides | None
    references: Sequence[Reference]
    beginning: Beginning
    tokens: Sequence[str]
    excerpts: dict[str, Excerpt[SharedPiece]]
    scale: list[tuple[str, str]]
    words: tuple[Word, ...]
    word_count: int

    @property
    def least(self) -> int:
        """The least number of texts in which each word occurs."""
        return least_texts(len(self.references if self.sides is None else self.sides.members))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of texts on each side; empty if there are no sides."""
        return () if self.sides is None else (len(self.sides.first), len(self.sides.second))

    @property
    def data(self) -> Markup:
        """The names and the shared pieces, for the script of the page."""
        numbers = self.beginning.contrast.columns()
        shared = [
            {
                "text": "".join(self.tokens[piece.first : piece.last + 1]),
                "tokens": [piece.first, piece.last],
                "numbers": [_short(value) for value in numbers[piece.token].values()],
            }
            for excerpt in self.excerpts.values()
            for piece in excerpt.pieces
        ]
        return embed({"names": self.names, "shared": shared})


def show_differences(
    tokens: Sequence[str],
    parts: dict[str, tuple[int, int]],
    styles: Sequence[str],
    beginning: Beginning,
    words: tuple[Word, ...],
    sides: Sides | None,
    *,
    names: tuple[str, str],
    references: Sequence[Reference],
    most: int,
    marks: tuple[str, str] = ("✓", "✗"),
) -> Differences:
    """The differences in `beginning` and `words`, as pages show them.

    Args:
        tokens: The tokens of one text, which starts with the shared beginning.
        parts: The first token, and the token after the last, of each part of that beginning.
        styles: The CSS class of each token besides its shade.
        beginning: The difference of the flow through each token that all texts begin with.
        words: The difference of the flow through each word.
        sides: The texts on each side.
        names: The names of the sides.
        references: How the page refers to each text.
        most: The most tokens of a part that are shown; a longer part lacks its middle.
        marks: The marks of the texts that are right and of those that are not.
    """
    differences = beginning.contrast.difference
    bounds = shade_bounds(differences)
    levels = difference_levels(differences, bounds)
    return Differences(
        names=names,
        marks=marks,
        sides=sides,
        references=references,
        beginning=beginning,
        tokens=tokens,
        excerpts={
            name: Excerpt(
                parts=ends_of(_pieces(tokens, part, differences, levels, styles), most),
                stop=part[1],
            )
            for name, part in parts.items()
            if part[1] > part[0]
        },
        scale=difference_scale(bounds, both=sides is not None),
        words=with_flow(words)[:MOST_WORDS],
        word_count=len(with_flow(words)),
    )


def with_flow(words: tuple[Word, ...]) -> tuple[Word, ...]:
    """The words through which flow passes on at least one side."""
    return tuple(word for word in words if word.first or word.second)


def shade_bounds(differences: Float[np.ndarray, " thing"]) -> tuple[float, ...]:
    """The percentage points from which each shade counts, the weakest first; none without any.

    They are neighbours in …, 0.3, 1, 3, 10, …, since few tokens differ much, and linear steps would
    leave most blank. The strongest shade has the largest difference, and begins at 1 or above.
    """
    largest = 100 * float(np.abs(differences).max(initial=0.0))
    if not largest:
        return ()
    top = max(rung for rung in _RUNGS if rung <= max(largest * (1 + _ROUNDING), LEAST_TOP))
    place = _RUNGS.index(top)
    return _RUNGS[place - LEVELS + 1 : place + 1]


_RUNGS = 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0
_ROUNDING = 1e-6
"""The shade of a difference on a bound must not depend on its last bit."""


def difference_levels(
    differences: Float[np.ndarray, " thing"], bounds: Sequence[float]
) -> Int[np.ndarray, " thing"]:
    """The shade of each difference, from `-LEVELS` to `LEVELS`; `bounds` are of `shade_bounds`."""
    points = 100 * np.abs(differences) * (1 + _ROUNDING)
    levels = np.searchsorted(np.array(bounds), points, side="right")
    return (np.sign(differences) * levels).astype(np.int64)


def difference_scale(bounds: Sequence[float], *, both: bool) -> list[tuple[str, str]]:
    """The CSS class, and the range in percentage points, of each shade, from the lowest up.

    The shades below zero are left out unless `both` sides can have more.
    """
    if not bounds:
        return []
    words = [number(bound) for bound in bounds]
    ranges = [f"{low} to {high}" for low, high in pairwise(words)] + [f"{words[-1]} and more"]
    steps = [*enumerate(ranges, 1)]
    return [
        *((level_class(-level), text) for level, text in reversed(steps) if both),
        ("", f"below {words[0]}"),
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
