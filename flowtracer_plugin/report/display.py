"""A trace as readers see it: whole characters, shades by rank, and numbers in words."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import Literal

import numpy as np
import regex
from jaxtyping import Bool, Float, Int

from flowtracer_plugin.flow.backbone import StepGraph
from flowtracer_plugin.flow.river import River
from flowtracer_plugin.result.standouts import AUTO, of_kinds, standing_out, without_finding
from flowtracer_plugin.result.trace_data import TraceData
from flowtracer_plugin.text.spans import Region
from flowtracer_plugin.text.visible import visible

_CHARACTER = regex.compile(r"\X")
"""A character as readers see it: an extended grapheme cluster of Unicode's Annex 29."""

_BLANKS = {ord(" "): "␣", ord("\t"): "⇥"}

_MOST_LINES, _LINE = 14, 90
"""The lines that a page shows without folding a text, and about how many letters a line holds."""

_SHORT = 24
"""The most letters of a token in which no line begins."""

HEAT_SHARES = (0.40, 0.25, 0.15, 0.08, 0.03)
"""A token's heat, from 0 to 5, is the number of these top shares that it belongs to. The widest is
the share of tokens to which the paper gives more credit."""

REGION_CLASSES = {"answer": "answer", "prompt": "outside"}
"""The CSS class of tokens in a region, on all pages."""


QUESTION = {
    "auto": "what the user said in chat messages, else the prompt",
    "turns": "what the user said",
    "user": "the user's last message",
    "prompt": "the prompt without special tokens",
    "all": "the whole prompt",
    "mask": "the tokens that were chosen",
}
"""What counts as the question, in words, by the option `question` of a trace."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A token, or several tokens that together spell one character.

    Attributes:
        first: Index of its first token.
        last: Index of its last token.
        text: The decoded text, with invisible characters spelled out.
    """

    first: int
    last: int
    text: str

    @property
    def lines(self) -> list[str]:
        """The text, split at its line breaks."""
        return self.text.split("\n")

    @property
    def inline(self) -> str:
        """The text on one line."""
        return self.text.replace("\n", "⏎")

    @property
    def label(self) -> str:
        """The text on one line, or signs for blanks alone."""
        return self.inline if self.inline.strip() else self.inline.translate(_BLANKS)

    @property
    def glue(self) -> str:
        """The CSS class that keeps an answer's first blank and its first word on one line."""
        if "\n" in self.text or not self.text[:1].isspace():
            return ""
        return "blank" if self.text.isspace() else "word" if len(self.text) <= _SHORT else ""

    @property
    def word(self) -> str:
        """The text on one line without blanks around it, or the blanks alone as signs."""
        return self.inline.strip() or self.label


@dataclass(frozen=True, kw_only=True)
class Unit(Piece):
    """A piece of a trace, with its place and its flow.

    Attributes:
        index: Its number in reading order.
        region: The part of the text that it lies in.
        throughput: The flow through it.
        rank: Its rank by throughput within the prompt or the response; the highest is 1.
        heat: Its shade, from 0 (most of the text) to 5; see `HEAT_SHARES`.
    """

    index: int
    region: Region
    throughput: float
    rank: int
    heat: int

    @property
    def classes(self) -> str:
        """Its CSS classes on a page."""
        heat = f"h{self.heat}" if self.heat else None
        glue = self.glue if self.region == "answer" else None
        return " ".join(filter(None, (heat, REGION_CLASSES.get(self.region), glue)))


@dataclass(frozen=True, kw_only=True, eq=False)
class ShownTrace:
    """A trace in units, and what its pages and figures draw; each is computed once.

    Attributes:
        trace: The trace.
        starts: The first token of each unit.
        prompt_units: The number of units in the prompt.
    """

    trace: TraceData
    starts: Int[np.ndarray, " unit"]
    prompt_units: int

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """All units in reading order."""
        throughput = self.throughput
        ranks, heats = self._ranks_and_heats(throughput)
        stops = [*self.starts[1:].tolist(), len(self.trace.tokens)]
        regions = self.regions
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
        """The flow through each unit: through its tokens, minus the flow between these tokens."""
        through = np.add.reduceat(self.trace.throughput, self.starts)
        if len(self.starts) == len(self.trace.tokens):
            return through
        edges = self.trace.backbone.sources
        inside = self.unit_numbers[edges.token] == self.unit_numbers[:, None]
        return through - np.add.reduceat((edges.flow * inside).sum(1), self.starts)

    @cached_property
    def unit_numbers(self) -> Int[np.ndarray, " token"]:
        """The number of each token's unit."""
        return np.searchsorted(self.starts, np.arange(len(self.trace.tokens)), side="right") - 1

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        """The region of each token."""
        return self.trace.spans.regions

    @cached_property
    def steps(self) -> StepGraph:
        """The flow between lines or sentences."""
        return self.trace.steps()

    @cached_property
    def river(self) -> River:
        """The flow across each cut of the text."""
        return self.trace.river()

    @property
    def prompt(self) -> tuple[Unit, ...]:
        """The prompt's units."""
        return self.units[: self.prompt_units]

    @property
    def response(self) -> tuple[Unit, ...]:
        """The response's units."""
        return self.units[self.prompt_units :]

    @cached_property
    def empty(self) -> Bool[np.ndarray, " unit"]:
        """Which units are only blanks, marks of a template, or formatting."""
        kinds = of_kinds(self.trace.tokens, self.trace.spans)
        return np.logical_or.reduceat(kinds, self.starts)

    @cached_property
    def plain(self) -> Bool[np.ndarray, " unit"]:
        """Which of the `empty` units are no finding: a finding has more flow than all others.

        The others are those of the prompt, or of the response before the answer.
        """
        ends = self.trace.spans.answer | self.trace.spans.target
        inner = ~np.logical_or.reduceat(ends, self.starts)
        prompt = np.arange(len(self.starts)) < self.prompt_units
        plain = [
            without_finding(self.empty & part, self.throughput, inner & part)
            for part in (prompt, ~prompt)
        ]
        return plain[0] | plain[1]

    def unit_of(self, token: int) -> Unit:
        """The unit of a token."""
        return self.units[self.unit_numbers[token]]

    def units_of(self, tokens: Sequence[int]) -> tuple[Unit, ...]:
        """The units of `tokens` in their order, each once."""
        return tuple(dict.fromkeys(map(self.unit_of, tokens)))

    def context(self, unit: Unit, width: int = 6) -> tuple[str, str]:
        """The texts of the `width` units before and after a unit, each on one line."""
        before = self.units[max(unit.index - width, 0) : unit.index]
        after = self.units[unit.index + 1 : unit.index + 1 + width]
        return "".join(one.inline for one in before), "".join(one.inline for one in after)

    def heats(self, scores: Float[np.ndarray, " token"]) -> Int[np.ndarray, " unit"]:
        """The heat of each unit by another score; a unit's score is the sum over its tokens."""
        return self._ranks_and_heats(np.add.reduceat(scores, self.starts))[1]

    def _ranks_and_heats(
        self, scores: Float[np.ndarray, " unit"]
    ) -> tuple[Int[np.ndarray, " unit"], Int[np.ndarray, " unit"]]:
        """The rank and the heat of each unit; prompt and response are ranked separately."""
        ranks, heats = np.zeros_like(self.starts), np.zeros_like(self.starts)
        for part in (slice(self.prompt_units), slice(self.prompt_units, None)):
            order = np.argsort(-scores[part], kind="stable")
            ranks[part][order] = np.arange(1, len(order) + 1)
            # Rounded, as in credit.top_tokens, so that 0.4 · 5 is not more than 2.
            limits = np.ceil(np.round(np.multiply(HEAT_SHARES, len(order)), 9))
            heats[part] = (ranks[part][:, None] <= limits).sum(1) * (scores[part] > 0)
        return ranks, heats


def show(trace: TraceData) -> ShownTrace:
    """The trace in units; no unit holds tokens of both prompt and response."""
    length = trace.spans.prompt_length
    prompt = piece_starts(trace.tokens[:length])
    response = piece_starts(trace.tokens[length:]) + length
    return ShownTrace(
        trace=trace, starts=np.concatenate([prompt, response]), prompt_units=len(prompt)
    )


def piece_starts(tokens: Sequence[str]) -> Int[np.ndarray, " piece"]:
    """The first token of each piece of a text.

    Tokens that together spell one character as readers see it, such as an emoji of several or a
    letter with its accent, are one piece. A token without text joins the next token that has some;
    at the end it joins the last piece.
    """
    text, ends = "".join(tokens), np.cumsum([len(token) for token in tokens], dtype=np.int64)
    apart = np.diff(ends, prepend=0) > 0
    if not text.isascii() or "\r" in text:
        apart &= np.isin(ends, [one.end() for one in _CHARACTER.finditer(text)])
    stops = np.flatnonzero(apart) + 1
    return np.concatenate([[0], stops[:-1]]).astype(np.int64)[: len(tokens)]


def standouts(
    shown: ShownTrace, kind: Literal["hubs", "checkpoints"], count: int, skip: str = AUTO
) -> tuple[tuple[Unit, float], ...]:
    """The units of the strongest `count` hubs or checkpoints, and their effective edges.

    `skip` is that of `TraceData.hubs`.
    """
    trace, best = shown.trace, dict[int, tuple[Unit, float]]()
    scores = getattr(trace.backbone, kind)
    for token in standing_out(
        scores, trace.throughput, trace.tokens, trace.spans, skip=skip
    ).tolist():
        unit = shown.unit_of(token)
        if unit.region == "response":
            best.setdefault(unit.index, (unit, float(scores[token] / trace.throughput[token])))
        if len(best) == count:
            break
    return tuple(best.values())


def is_long(pieces: Sequence[Piece]) -> bool:
    """Whether a text takes so many lines on a page that it is folded."""
    lines = "".join(piece.text for piece in pieces).split("\n")
    return sum(1 + len(line) // _LINE for line in lines) > _MOST_LINES


def shown_text(tokens: Sequence[str]) -> str:
    """The text of a piece's tokens, with invisible characters spelled out."""
    return visible("".join(tokens)) or "∅"


def direction(pieces: Iterable[Piece]) -> str:
    """`rtl` if the first letter of the pieces is written from right to left, otherwise `ltr`.

    Browsers do the same for `dir="auto"`, but repeat it for each element that the text gains.
    """
    return written_direction("".join(piece.text for piece in pieces))


def written_direction(text: str) -> str:
    """`rtl` if the first letter of the text is written from right to left, otherwise `ltr`."""
    kinds = map(unicodedata.bidirectional, text)
    first = next((kind for kind in kinds if kind in ("L", "R", "AL")), "L")
    return "ltr" if first == "L" else "rtl"


def shorten(text: str, limit: int = 60) -> str:
    """`text`, cut to `limit` characters with an ellipsis if it is longer."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def model_label(name: str) -> str:
    """The name of a model in few words: of a folder on this machine, the last part of its path."""
    path = PurePath(name)
    return path.name if path.is_absolute() and path.name else name


def percent(share: float) -> str:
    """A share in per cent with three significant digits and no exponent."""
    number = float(f"{100 * share:.3g}")
    if 0 < number < 0.001:
        return "<\N{NO-BREAK SPACE}0.001\N{NO-BREAK SPACE}%"
    decimals = min(2 - int(np.floor(np.log10(number))), 3) if number else 0
    return f"{number:.{max(decimals, 0)}f}\N{NO-BREAK SPACE}%"


def number(value: float) -> str:
    """A number with three significant digits; below a thousandth it has an exponent."""
    rounded = float(f"{abs(value):.3g}")
    if 0 < rounded < 1e-3:  # a row of zeros would be too wide
        short = np.format_float_scientific(rounded, trim="-", exp_digits=1)
    else:
        short = np.format_float_positional(rounded, trim="-")
    return f"−{short}" if value < 0 and short != "0" else short


def p_value(value: float) -> str:
    """A p-value with two significant digits and no exponent."""
    return np.format_float_positional(float(f"{value:.2g}"), trim="-")


def points(share: float) -> str:
    """A difference of shares in percentage points, with its sign except for zero."""
    short = f"{100 * abs(share):.2f}"
    return f"{'−' if share < 0 else '+'}{short}" if float(short) else short


def signed(value: float) -> str:
    """A number with its sign, except for zero."""
    return f"+{number(value)}" if value > 0 else number(value)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending whole numbers as text, such as `3–5, 8`."""
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    runs = [run.tolist() for run in np.split(np.array(numbers), cuts) if len(run)]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
