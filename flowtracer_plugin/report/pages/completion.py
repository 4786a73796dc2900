"""One completion of a group as it is shown: its pieces with their credit, and a ribbon of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

from flowtracer_plugin.report.display import Piece, piece_starts, shorten, shown_text
from flowtracer_plugin.report.drawing import RIBBON_HEIGHT, bars_path
from flowtracer_plugin.text.visible import visible

P = TypeVar("P", bound=Piece)

LEVELS = 3
"""Steps of colour on each side of zero."""

MAX_BARS = 480
_LOWEST_BAR = 12


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CompletionView:
    """One completion of a prompt and the credit of its tokens.

    Attributes:
        tokens: The text, cut into tokens as `decode_tokens(...).pieces` does.
        weights: By how much the advantage of each token is multiplied; 1 is plain credit.
        throughput: Share of the flow through each token; 0 throughout where none was traced.
        advantage: Of the completion, before weighting.
        rewards: By reward function, None where one gave none. A trainer that weights its functions
            hands over weighted rewards, as the page orders completions by their sum.
        answer: The tokens of the answer.
        competing: False on the tokens that a tool wrote: they get no credit.
        hubs: Tokens to number: those that the most flow passes, in that order.
        note: What else there is to say, such as "no answer found: plain credit".

    Raises:
        ValueError: Lengths differ, a number is not finite, a weight or a throughput is negative, or
            a hub is not among the tokens or stands twice.
    """

    tokens: Sequence[str]
    weights: Float[np.ndarray, " token"]
    throughput: Float[np.ndarray, " token"]
    advantage: float
    rewards: Mapping[str, float | None]
    answer: Bool[np.ndarray, " token"]
    competing: Bool[np.ndarray, " token"]
    hubs: Sequence[int] = ()
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot be shown."""
        length = len(self.tokens)
        for name in ("weights", "throughput", "answer", "competing"):
            shape = getattr(self, name).shape
            if shape != (length,):
                raise ValueError(f"wanted {name} of {length} tokens, found the shape {shape}")
        for name in ("weights", "throughput"):
            if not bool(((getattr(self, name) >= 0) & (getattr(self, name) < math.inf)).all()):
                raise ValueError(f"{name} must be finite and not negative")
        if not math.isfinite(self.advantage):
            raise ValueError(f"the advantage must be finite, got {self.advantage!r}")
        if len({*self.hubs}) < len(self.hubs) or not all(0 <= hub < length for hub in self.hubs):
            raise ValueError(
                f"hubs must be different tokens from 0 to {length - 1}, got {list(self.hubs)}"
            )

    @property
    def reward(self) -> float | None:
        """Sum of the rewards; None where no function gave one."""
        given = [float(one) for one in self.rewards.values() if one is not None]
        finite = [one for one in given if math.isfinite(one)]
        return math.fsum(finite) if finite else None

    @property
    def credit(self) -> Float[np.ndarray, " token"]:
        """Advantage times weight, 0 on a tool's tokens."""
        # In double precision: a step of colour must not depend on the caller's rounding.
        return np.where(self.competing, float(self.advantage) * self.weights.astype(float), 0.0)

    @property
    def weighted(self) -> Bool[np.ndarray, " token"]:
        """Tokens with more than plain credit."""
        return (self.weights > 1) & self.competing

    @property
    def answer_text(self) -> str:
        """What the answer's tokens say, on one line; empty without an answer."""
        text = "".join(self.tokens[token] for token in np.flatnonzero(self.answer).tolist())
        return shorten(visible(text.replace("\n", "⏎")), 40)


def credit_levels(credit: Float[np.ndarray, " token"], largest: float) -> Int[np.ndarray, " token"]:
    """Steps of colour from `-LEVELS` to `LEVELS`; 0 is no credit at all."""
    if not largest:
        return np.zeros(credit.shape, np.int64)
    # Rounded: two thirds of the largest, plain credit beside 1.5, must not be a step too high.
    steps = np.ceil(np.round(LEVELS * np.abs(credit) / largest, 6))
    return (np.sign(credit) * steps).astype(np.int64)


def level_class(level: int) -> str:
    """The style of a step: `p1` to `p3`, `n1` to `n3`, or none."""
    return f"{'p' if level > 0 else 'n'}{abs(level)}" if level else ""


@dataclass(frozen=True, kw_only=True)
class CreditPiece(Piece):
    """A piece of a completion; of several tokens the one with the most credit counts.

    Attributes:
        level: Step of colour.
        weight: Weight of its credit.
        throughput: The largest of its tokens.
        weighted: Whether it has more than plain credit.
        answer: Whether it is part of the answer.
        tool: Whether a tool wrote it.
        hub: Its number among the hubs; 0 for none.
    """

    level: int
    weight: float
    throughput: float
    weighted: bool
    answer: bool
    tool: bool
    hub: int

    @property
    def classes(self) -> str:
        """Its styles."""
        marks = {"more": self.weighted, "answer": self.answer, "tool": self.tool}
        names = [level_class(self.level), *(name for name, marked in marks.items() if marked)]
        return " ".join(filter(None, names))


def cut_pieces(view: CompletionView, largest: float) -> tuple[CreditPiece, ...]:
    """The whole completion in pieces; `largest` is the credit that gets the strongest colour."""
    if not view.tokens:
        return ()
    starts = piece_starts(view.tokens)
    sign = np.sign(view.advantage)
    credit = sign * np.maximum.reduceat(np.abs(view.credit), starts)
    columns = zip(
        starts.tolist(),
        [*starts[1:].tolist(), len(view.tokens)],
        credit_levels(credit, largest).tolist(),
        np.maximum.reduceat(view.weights * view.competing, starts).tolist(),
        np.maximum.reduceat(view.throughput, starts).tolist(),
        *(
            np.logical_or.reduceat(mask, starts).tolist()
            for mask in (view.weighted, view.answer, view.competing)
        ),
        _hub_numbers(view, starts),
        strict=True,
    )
    return tuple(
        CreditPiece(
            first=first,
            last=stop - 1,
            text=shown_text(view.tokens[first:stop]),
            level=level,
            weight=weight,
            throughput=throughput,
            weighted=weighted,
            answer=answer,
            tool=not competing,
            hub=hub,
        )
        for first, stop, level, weight, throughput, weighted, answer, competing, hub in columns
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Excerpt:
    """Pieces of a text from its beginning and its end.

    Attributes:
        parts: The text in pieces, in two parts where the middle is left out.
        stop: The first token after the text.
    """

    parts: tuple[tuple[Piece, ...], ...]
    stop: int

    @property
    def gap(self) -> tuple[int, int] | None:
        """The first and the last token that the text leaves out."""
        if len(self.parts) < 2:
            return None
        before, after = self.parts
        stop = after[0].first if after else self.stop
        return (before[-1].last + 1 if before else 0, stop - 1)

    @property
    def shown(self) -> int:
        """Tokens in the text."""
        return sum(piece.last + 1 - piece.first for part in self.parts for piece in part)


def ends_of(pieces: tuple[P, ...], most: int) -> tuple[tuple[P, ...], ...]:
    """All pieces, or as many from the beginning and the end as have `most` tokens."""
    first, stop = (pieces[0].first, pieces[-1].last + 1) if pieces else (0, 0)
    if stop - first <= most:
        return (pieces,)
    head, tail = first + most - most // 2, stop - most // 2
    return (
        tuple(piece for piece in pieces if piece.last < head),
        tuple(piece for piece in pieces if piece.first >= tail),
    )


def _hub_numbers(view: CompletionView, starts: Int[np.ndarray, " piece"]) -> list[int]:
    numbers = [0] * len(starts)
    for number, hub in reversed(list(enumerate(view.hubs, start=1))):
        numbers[int(np.searchsorted(starts, hub, side="right")) - 1] = number
    return numbers


@dataclass(frozen=True, kw_only=True)
class CreditRibbon:
    """A whole completion as bars, each the token of its bin with the most flow.

    Heights are square roots, relative to the highest token before the answer. The longest
    completion of a group fills the width, the others their share of it.

    Attributes:
        width: Of the drawing.
        bars: An SVG path for each step of colour, by its style; the empty one is no credit.
        answer: An SVG path beneath the answer.
        hubs: Position of each hub.
    """

    width: int
    bars: dict[str, str]
    answer: str
    hubs: tuple[float, ...]


def draw_credit(view: CompletionView, largest: float, longest: int) -> CreditRibbon:
    """The ribbon of a completion in a group whose longest has `longest` tokens."""
    width, length = min(longest, MAX_BARS), len(view.tokens)
    first = bar_starts(length, longest)
    count = len(first)
    stops = [*first[1:].tolist(), length][:count]
    best = [
        start + int(view.throughput[start:stop].argmax())
        for start, stop in zip(first.tolist(), stops, strict=True)
    ]
    levels = credit_levels(view.credit, largest)[best]
    answer = np.logical_or.reduceat(view.answer, first) if count else np.zeros(0, bool)
    return CreditRibbon(
        width=max(width, 1),
        bars={
            level_class(level): bars_path(_heights(view, best), levels == level)
            for level in np.unique(levels).tolist()
        },
        answer=answer_path(answer),
        hubs=tuple(round((hub + 0.5) * count / length, 2) for hub in view.hubs),
    )


def bar_starts(length: int, longest: int) -> Int[np.ndarray, " bar"]:
    """First token of each bar of a text, where one of `longest` tokens would fill the width."""
    count = min(length, math.ceil(length * min(longest, MAX_BARS) / max(longest, 1)))
    return np.arange(count) * length // max(count, 1)


def answer_path(bars: Bool[np.ndarray, " bar"]) -> str:
    """An SVG path beneath the bars of an answer."""
    return "".join(f"M{bar} 106h1v10h-1z" for bar in np.flatnonzero(bars).tolist())


def _heights(view: CompletionView, shown: list[int]) -> Int[np.ndarray, " bar"]:
    highest = float(view.throughput[~view.answer].max(initial=0.0)) or 1.0
    heights = RIBBON_HEIGHT * np.sqrt(np.minimum(view.throughput[shown] / highest, 1))
    return np.maximum(np.rint(heights).astype(int), _LOWEST_BAR)
