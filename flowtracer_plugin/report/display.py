"""What a reader sees of the tokens: whole characters, steps of heat, marks."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from flowtracer_plugin.result.trace_data import TraceData
from flowtracer_plugin.text.spans import Region
from flowtracer_plugin.text.visible import visible

HEAT_SHARES = (0.40, 0.25, 0.15, 0.08, 0.03)
"""A token's heat is the number of these top shares that it belongs to, from 0 to 5; the widest one
is the share of tokens that the paper gives more credit."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A token, or the tokens that spell one character together.

    Attributes:
        first: Its first token.
        last: Its last token.
        text: What it decodes to, made visible.
    """

    first: int
    last: int
    text: str

    @property
    def lines(self) -> list[str]:
        """The text, split where it holds line breaks."""
        return self.text.split("\n")

    @property
    def inline(self) -> str:
        """The text on one line."""
        return self.text.replace("\n", "⏎")


@dataclass(frozen=True, kw_only=True)
class Unit(Piece):
    """A piece of a trace.

    Attributes:
        index: Its number in reading order.
        region: Where it lies.
        throughput: Flow that passes through it.
        rank: Place by throughput among the prompt's or the response's units; the first is 1.
        heat: From 0, for the most part of the text, to 5.
    """

    index: int
    region: Region
    throughput: float
    rank: int
    heat: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """A trace's tokens as they are shown.

    Attributes:
        trace: What is shown.
        starts: First token of each unit.
        prompt_units: How many of the units are the prompt's.
    """

    trace: TraceData
    starts: Int[np.ndarray, " unit"]
    prompt_units: int

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """In reading order."""
        throughput = self.throughput
        ranks, heats = self._ranks_and_heats(throughput)
        stops = [*self.starts[1:].tolist(), len(self.trace.tokens)]
        regions = self.trace.spans.regions
        return tuple(
            Unit(
                index=index,
                first=first,
                last=stop - 1,
                text=shown_text(self.trace.tokens[first:stop]),
                region="answer" if "answer" in regions[first:stop] else regions[stop - 1],
                throughput=float(throughput[index]),
                rank=int(ranks[index]),
                heat=int(heats[index]),
            )
            for index, (first, stop) in enumerate(zip(self.starts.tolist(), stops, strict=True))
        )

    @cached_property
    def throughput(self) -> Float[np.ndarray, " unit"]:
        """What passes through each unit: through its tokens, but for what they hand each other."""
        through = np.add.reduceat(self.trace.throughput, self.starts)
        if len(self.starts) == len(self.trace.tokens):
            return through
        edges = self.trace.backbone.sources
        inside = self.unit_numbers[edges.token] == self.unit_numbers[:, None]
        return through - np.add.reduceat((edges.flow * inside).sum(1), self.starts)

    @cached_property
    def unit_numbers(self) -> Int[np.ndarray, " token"]:
        """The number of the unit that each token is part of."""
        return np.searchsorted(self.starts, np.arange(len(self.trace.tokens)), side="right") - 1

    @property
    def prompt(self) -> tuple[Unit, ...]:
        """The prompt's units."""
        return self.units[: self.prompt_units]

    @property
    def response(self) -> tuple[Unit, ...]:
        """The response's units."""
        return self.units[self.prompt_units :]

    def unit_of(self, token: int) -> Unit:
        """The unit that a token is part of."""
        return self.units[int(np.searchsorted(self.starts, token, side="right")) - 1]

    def units_of(self, tokens: Sequence[int]) -> tuple[Unit, ...]:
        """The units that ascending `tokens` are part of, each once."""
        return tuple(dict.fromkeys(map(self.unit_of, tokens)))

    def context(self, unit: Unit, width: int = 6) -> tuple[str, str]:
        """What is written before and after a unit, on one line."""
        before = self.units[max(unit.index - width, 0) : unit.index]
        after = self.units[unit.index + 1 : unit.index + 1 + width]
        return "".join(one.inline for one in before), "".join(one.inline for one in after)

    def heats(self, scores: Float[np.ndarray, " token"]) -> Int[np.ndarray, " unit"]:
        """How the text is shaded by another score of its tokens; characters have their sum."""
        return self._ranks_and_heats(np.add.reduceat(scores, self.starts))[1]

    def _ranks_and_heats(
        self, throughput: Float[np.ndarray, " unit"]
    ) -> tuple[Int[np.ndarray, " unit"], Int[np.ndarray, " unit"]]:
        ranks, heats = np.zeros_like(self.starts), np.zeros_like(self.starts)
        for part in (slice(self.prompt_units), slice(self.prompt_units, None)):
            order = np.argsort(-throughput[part], kind="stable")
            ranks[part][order] = np.arange(1, len(order) + 1)
            # Rounded, as credit.top_tokens does: 0.4 · 5 must not be more than 2.
            limits = np.ceil(np.round(np.multiply(HEAT_SHARES, len(order)), 9))
            heats[part] = (ranks[part][:, None] <= limits).sum(1) * (throughput[part] > 0)
        return ranks, heats


def read(trace: TraceData) -> Reading:
    """The tokens of `trace` as units; prompt and response have their own."""
    length = trace.spans.prompt_length
    prompt = piece_starts(trace.tokens[:length])
    response = piece_starts(trace.tokens[length:]) + length
    return Reading(trace=trace, starts=np.concatenate([prompt, response]), prompt_units=len(prompt))


def piece_starts(tokens: Sequence[str]) -> Int[np.ndarray, " piece"]:
    """The first token of every piece of one text.

    A token without text joins the next one that has some, or the one before at the end.
    """
    stops = np.flatnonzero([bool(text) for text in tokens]) + 1
    return np.concatenate([[0], stops[:-1]]).astype(np.int64)[: len(tokens)]


def standouts(
    reading: Reading, scores: Float[np.ndarray, " token"], count: int
) -> tuple[tuple[Unit, float], ...]:
    """The `count` units of the reasoning that score highest, with their effective edges.

    `scores` are a backbone's `hubs` or `checkpoints`. Question and answer
    are left out: all flow starts in one and ends in the other, so that they would fill the list of
    every trace.
    """
    best: dict[int, tuple[Unit, float]] = {}
    for token in np.argsort(-scores, kind="stable").tolist():
        unit = reading.unit_of(token)
        if scores[token] > 0 and unit.region == "response":
            edges = float(scores[token] / reading.trace.throughput[token])
            best.setdefault(unit.index, (unit, edges))
        if len(best) == count:
            break
    return tuple(best.values())


def shown_text(tokens: Sequence[str]) -> str:
    """What the tokens of one piece spell together, made visible."""
    return visible("".join(tokens)) or "∅"


def direction(pieces: Iterable[Piece]) -> str:
    """`rtl` if the first letter of the pieces is written from right to left, otherwise `ltr`.

    Browsers do the same for `dir="auto"`, but again for every element that they add to the text.
    """
    for piece in pieces:
        for letter in piece.text:
            kind = unicodedata.bidirectional(letter)
            if kind in ("L", "R", "AL"):
                return "ltr" if kind == "L" else "rtl"
    return "ltr"


def shorten(text: str, limit: int = 60) -> str:
    """`text`, or its beginning and an ellipsis if it has more than `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def percent(share: float) -> str:
    """A share in per cent with three significant digits, never as an exponent."""
    number = float(f"{100 * share:.3g}")
    if 0 < number < 0.001:
        return "<\N{NO-BREAK SPACE}0.001\N{NO-BREAK SPACE}%"
    decimals = min(2 - int(np.floor(np.log10(number))), 3) if number else 0
    return f"{number:.{max(decimals, 0)}f}\N{NO-BREAK SPACE}%"


def number(value: float) -> str:
    """A number with three significant digits, below a thousandth with an exponent."""
    rounded = float(f"{abs(value):.3g}")
    if 0 < rounded < 1e-3:  # a row of zeros would not fit beside anything
        short = np.format_float_scientific(rounded, trim="-", exp_digits=1)
    else:
        short = np.format_float_positional(rounded, trim="-")
    return f"−{short}" if value < 0 and short != "0" else short


def signed(value: float) -> str:
    """A number with its sign, except for zero."""
    return f"+{number(value)}" if value > 0 else number(value)


def ranges(numbers: Sequence[int]) -> str:
    """Whole numbers in ascending order as `3–5, 8`."""
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    runs = [run.tolist() for run in np.split(np.array(numbers), cuts) if len(run)]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
