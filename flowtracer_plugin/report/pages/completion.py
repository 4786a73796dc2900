"""One completion on the page of a group: its pieces with their credit, and its ribbon."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

from flowtracer_plugin.flow.arrays import check_readable
from flowtracer_plugin.report.display import Piece, piece_starts, shorten, shown_text
from flowtracer_plugin.report.drawing import RIBBON_HEIGHT, bars_path
from flowtracer_plugin.text.visible import visible

P = TypeVar("P", bound=Piece)

LEVELS = 3
"""Shades of colour on each side of zero."""

MAX_BARS = 480
_LOWEST_BAR = 12


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CompletionView:
    """One completion of a prompt and the credit of its tokens.

    Attributes:
        tokens: The text, cut into tokens as `decode_tokens(...).pieces` does.
        weights: The factor by which each token's advantage is multiplied; 1 is plain credit.
        throughput: The share of the flow through each token; all 0 if no flow was traced.
        advantage: The advantage of the completion, before weighting.
        rewards: The reward of each reward function, or None if a function gave none. A trainer that
            weights its functions passes weighted rewards: the page orders completions by their sum.
        answer: Which tokens are the answer's.
        competing: False for tokens that a tool wrote: they get no credit.
        hubs: The tokens that get numbers: those with the most flow, in descending order.
        note: A remark on the completion, such as "no answer found: plain credit".

    Raises:
        TypeError: An array cannot be read, such as a masked one.
        ValueError: Lengths differ, a number is not finite, a weight or a throughput is negative, or
            a hub is not among the tokens or is listed twice.
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
        """Raise ValueError if the page could not show this; see the class."""
        length = len(self.tokens)
        for name in ("weights", "throughput", "answer", "competing"):
            check_readable(name, getattr(self, name))
            shape = np.shape(getattr(self, name))
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
        """The sum of the rewards, or None if no function gave one."""
        given = [float(one) for one in self.rewards.values() if one is not None]
        finite = [one for one in given if math.isfinite(one)]
        return math.fsum(finite) if finite else None

    @property
    def credit(self) -> Float[np.ndarray, " token"]:
        """Advantage times weight for each token; 0 for a tool's tokens."""
        # In double precision, so that the shade does not depend on the caller's rounding.
        return np.where(self.competing, float(self.advantage) * self.weights.astype(float), 0.0)

    @property
    def weighted(self) -> Bool[np.ndarray, " token"]:
        """Which tokens have more than plain credit."""
        return (self.weights > 1) & self.competing

    @property
    def answer_text(self) -> str:
        """The text of the answer's tokens, on one line; empty if there is no answer."""
        text = "".join(self.tokens[token] for token in np.flatnonzero(self.answer).tolist())
        return shorten(visible(text.replace("\n", "⏎")), 40)


@dataclass(frozen=True, kw_only=True)
class GroupCredit:
    """How a group's tokens got their credit, for the head of its page.

    Attributes:
        scorer: The name of the score by which tokens are chosen.
        gamma: The factor of the chosen tokens' advantage, at the step of the page.
        share: The share of a completion's tokens that is chosen.
    """

    scorer: str
    gamma: float
    share: float

    @property
    def by_flow(self) -> bool:
        """Whether the throughput that a page shows is the score, but for the preset."""
        return self.scorer.partition(":")[0] == "flow" and "*" not in self.scorer


def credit_levels(credit: Float[np.ndarray, " token"], largest: float) -> Int[np.ndarray, " token"]:
    """The shade of each credit, from `-LEVELS` to `LEVELS`; 0 means no credit.

    `largest` is the absolute credit that gets the strongest shade.
    """
    if not largest:
        return np.zeros(credit.shape, np.int64)
    # Rounded, so that two thirds of the largest (plain credit beside a weight of 1.5) is shade 2.
    steps = np.ceil(np.round(LEVELS * np.abs(credit) / largest, 6))
    return (np.sign(credit) * steps).astype(np.int64)


def level_class(level: int) -> str:
    """The CSS class of a shade: `p1` to `p3`, `n1` to `n3`, or none."""
    return f"{'p' if level > 0 else 'n'}{abs(level)}" if level else ""


@dataclass(frozen=True, kw_only=True)
class CreditPiece(Piece):
    """A piece of a completion, with the largest values of its tokens.

    Attributes:
        level: Its shade.
        weight: The weight of its credit.
        throughput: The flow through it.
        weighted: Whether it has more than plain credit.
        answer: Whether it is part of the answer.
        tool: Whether a tool wrote it.
        hub: Its number among the tokens with the most flow; 0 if it has none.
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
        """Its CSS classes."""
        marks = {"more": self.weighted, "answer": self.answer, "tool": self.tool}
        names = [level_class(self.level), *(name for name, marked in marks.items() if marked)]
        return " ".join(filter(None, [*names, self.glue if self.answer else ""]))


def cut_pieces(view: CompletionView, largest: float) -> tuple[CreditPiece, ...]:
    """The whole completion in pieces; `largest` is the credit that gets the strongest shade."""
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
class Excerpt(Generic[P]):
    """A text in pieces; a long text lacks its middle.

    Attributes:
        parts: The pieces of the text, in two parts if the middle is left out.
        stop: The token after the last one of the text.
    """

    parts: tuple[tuple[P, ...], ...]
    stop: int

    @property
    def gap(self) -> tuple[int, int] | None:
        """The first and the last token that are left out; None if all are shown."""
        if len(self.parts) < 2:
            return None
        before, after = self.parts
        stop = after[0].first if after else self.stop
        return (before[-1].last + 1 if before else 0, stop - 1)

    @property
    def shown(self) -> int:
        """The number of tokens that are shown."""
        return sum(piece.last + 1 - piece.first for piece in self.pieces)

    @property
    def pieces(self) -> list[P]:
        """The pieces of both parts."""
        return [piece for part in self.parts for piece in part]

    def texts(self, tokens: Sequence[str]) -> list[str]:
        """The exact text of each piece, given the tokens of the whole text."""
        return ["".join(tokens[piece.first : piece.last + 1]) for piece in self.pieces]


def ends_of(pieces: tuple[P, ...], most: int) -> tuple[tuple[P, ...], ...]:
    """All pieces, or those within the first half and the last half of `most` tokens."""
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
    """A whole completion as bars; each bar is the token with the most flow in its bin.

    Heights are square roots, relative to the highest token outside the answer. The longest
    completion of a group fills the width, and the others a proportional part of it.

    Attributes:
        width: The width of the drawing.
        bars: An SVG path for each shade, by its CSS class; the empty class is no credit.
        weighted: An SVG path beneath the tokens with more than plain credit.
        answer: An SVG path beneath the answer.
        hubs: The position of each token that has a number.
    """

    width: int
    bars: dict[str, str]
    weighted: str
    answer: str
    hubs: tuple[float, ...]


def draw_credit(view: CompletionView, largest: float, longest: int) -> CreditRibbon:
    """The ribbon of a completion in a group whose longest completion has `longest` tokens."""
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
        weighted=weighted_path(view.weighted[best]),
        answer=answer_path(answer),
        hubs=tuple(round((hub + 0.5) * count / length, 2) for hub in view.hubs),
    )


def bar_starts(length: int, longest: int) -> Int[np.ndarray, " bar"]:
    """The first token of each bar of a text, if a text of `longest` tokens fills the width."""
    count = min(length, math.ceil(length * min(longest, MAX_BARS) / max(longest, 1)))
    return np.arange(count) * length // max(count, 1)


def weighted_path(bars: Bool[np.ndarray, " bar"]) -> str:
    """An SVG path beneath bars with more than plain credit, above that of the answer."""
    edges = np.flatnonzero(np.diff(bars.astype(int), prepend=0, append=0)).reshape(-1, 2).tolist()
    return "".join(f"M{start} 101h{stop - start}v3H{start}z" for start, stop in edges)


def answer_path(bars: Bool[np.ndarray, " bar"]) -> str:
    """An SVG path beneath the bars of an answer."""
    return "".join(f"M{bar} 106h1v10h-1z" for bar in np.flatnonzero(bars).tolist())


def _heights(view: CompletionView, tokens: list[int]) -> Int[np.ndarray, " bar"]:
    highest = float(view.throughput[~view.answer].max(initial=0.0)) or 1.0
    heights = RIBBON_HEIGHT * np.sqrt(np.minimum(view.throughput[tokens] / highest, 1))
    return np.maximum(np.rint(heights).astype(int), _LOWEST_BAR)
