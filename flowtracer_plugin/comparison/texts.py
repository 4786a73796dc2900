"""How the flow differs between two groups of texts, token by token and word by word."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from flowtracer_plugin.comparison.permutation import Contrast, Sides, compare_sides

_SPELLED = 12  # tokens of a continuation


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """The text that follows the shared beginning in some of the texts.

    Attributes:
        text: The text that comes next in all of these texts; empty if they end.
        texts: The numbers of these texts.
    """

    text: str
    texts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Beginning:
    """The shared beginning of all texts.

    Attributes:
        length: Its length in tokens.
        contrast: The differences of the flow through each of its tokens.
        continuations: The different continuations, the most frequent first; empty if all texts are
            identical.
    """

    length: int
    contrast: Contrast
    continuations: tuple[Continuation, ...]


def compare_beginnings(
    ids: Sequence[Sequence[Hashable]],
    pieces: Sequence[Sequence[str]],
    flows: Sequence[Float[np.ndarray, " _"]],
    sides: Sides | None,
) -> Beginning:
    """The shared beginning of all texts: how the flow through it differs, and what follows it.

    Args:
        ids: For each text, its tokens as values that can be compared.
        pieces: For each text, the text of its tokens.
        flows: For each text, the flow through its tokens.
        sides: The groups that are compared.
    """
    length = shared_length(ids)
    return Beginning(
        length=length,
        contrast=compare_sides(np.array([flow[:length] for flow in flows]), sides),
        continuations=_continuations(ids, pieces, length),
    )


def shared_length(ids: Sequence[Sequence[Hashable]]) -> int:
    """The number of tokens with which all texts begin."""
    columns = enumerate(zip(*ids, strict=False))
    differing = (place for place, column in columns if len(set(column)) > 1)
    return next(differing, min(map(len, ids)))


def _continuations(
    ids: Sequence[Sequence[Hashable]], pieces: Sequence[Sequence[str]], length: int
) -> tuple[Continuation, ...]:
    ways: dict[tuple[Hashable, ...], list[int]] = {}
    for text, row in enumerate(ids):
        ways.setdefault(tuple(row[length : length + 1]), []).append(text)
    if len(ways) == 1:
        return ()
    found = []
    for texts in ways.values():
        stop = min(shared_length([ids[text] for text in texts]), length + _SPELLED)
        spelled = "".join(pieces[texts[0]][length:stop])
        found.append(Continuation(text=spelled, texts=tuple(texts)))
    return tuple(sorted(found, key=lambda way: (-len(way.texts), way.texts)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Word:
    """All tokens with the same text, apart from whitespace around it.

    Attributes:
        text: Their text; a token of only whitespace keeps it.
        first: Mean share of the flow through a text's tokens that passes these, as in `Contrast`.
        second: The same for the second side.
        p: As in `Contrast`.
        p_corrected: As in `Contrast`, among the compared words.
        texts: The number of texts with such a token, by side; without sides, of all texts.
        tokens: The number of such tokens, in the same form.
    """

    text: str
    first: float
    second: float
    p: float | None
    p_corrected: float | None
    texts: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def difference(self) -> float:
        """First minus second."""
        return self.first - self.second


def least_texts(compared: int) -> int:
    """The number of compared texts that must have a word for it to be listed.

    Many texts contain very many words that only one of them has, mostly by chance.
    """
    return 2 if compared > 2 else 1


def compare_words(
    pieces: Sequence[Sequence[str]],
    flows: Sequence[Float[np.ndarray, " _"]],
    counted: Sequence[Bool[np.ndarray, " _"]],
    sides: Sides | None,
) -> tuple[Word, ...]:
    """The words that are in at least `least_texts` texts, the largest difference first.

    Args:
        pieces: For each text, the text of its tokens.
        flows: For each text, the flow through its tokens.
        counted: For each text, the tokens that count.
        sides: The groups that are compared.
    """
    groups = [range(len(pieces))] if sides is None else [sides.first, sides.second]
    compared = {text for group in groups for text in group}
    # Texts on neither side do not count, and their words are not listed.
    rows = (
        words_of(*text) if at in compared else ()
        for at, text in enumerate(zip(pieces, flows, counted, strict=True))
    )
    table = word_table(rows)
    kept = np.flatnonzero((table.tokens > 0).sum(0) >= least_texts(len(compared)))
    return contrast_words(table.only(kept), sides)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WordTable:
    """The words of many texts.

    Attributes:
        names: All words.
        shares: The share of each text's flow through each word.
        tokens: The number of its tokens in each text.
    """

    names: tuple[str, ...]
    shares: sparse.csr_array
    tokens: sparse.csr_array

    def only(self, words: Int[np.ndarray, " kept"]) -> WordTable:
        """These words alone."""
        return WordTable(
            names=tuple(self.names[word] for word in words),
            shares=self.shares[:, words],
            tokens=self.tokens[:, words],
        )


def word_table(
    rows: Iterable[Iterable[tuple[str, float]]], known: Sequence[str] | None = None
) -> WordTable:
    """The words of texts, each of which is its words with their flow, as `words_of` gives it.

    Args:
        rows: The words of each text.
        known: The words that the table has; by default all. Shares are of the flow of all.
    """
    place = {word: at for at, word in enumerate(known or ())}
    bounds, words, shares, tokens = [0], array("i"), array("d"), array("i")
    for row in rows:
        flows: dict[str, list[float]] = {}
        for word, flow in row:
            flows.setdefault(word, []).append(flow)
        total = sum(map(sum, flows.values())) or 1.0
        for word, one in flows.items():
            at = place.setdefault(word, len(place)) if known is None else place.get(word)
            if at is not None:
                words.append(at)
                shares.append(sum(one) / total)
                tokens.append(len(one))
        bounds.append(len(words))
    shape = len(bounds) - 1, len(place)
    return WordTable(
        names=tuple(place),
        shares=sparse.csr_array((np.array(shares), np.array(words), bounds), shape),
        tokens=sparse.csr_array((np.array(tokens), np.array(words), bounds), shape),
    )


def contrast_words(table: WordTable, sides: Sides | None) -> tuple[Word, ...]:
    """The words of a table, the largest difference first."""
    columns = compare_sides(table.shares, sides).columns()
    groups = [slice(None)] if sides is None else [list(sides.first), list(sides.second)]
    tokens = [table.tokens[group] for group in groups]
    counts = [((one > 0).sum(0).tolist(), one.sum(0).tolist()) for one in tokens]
    words = (
        Word(
            text=name,
            **numbers,
            texts=tuple(texts[at] for texts, _ in counts),
            tokens=tuple(tokens[at] for _, tokens in counts),
        )
        for at, (name, numbers) in enumerate(zip(table.names, columns, strict=True))
    )
    return tuple(sorted(words, key=lambda word: (-abs(word.difference), word.text)))


def words_of(
    pieces: Sequence[str],
    flows: Float[np.ndarray, " token"],
    counted: Bool[np.ndarray, " token"],
) -> Iterator[tuple[str, float]]:
    """Word and flow of each token; a token without text counts with the token that completes it."""
    kept = np.flatnonzero(counted)
    ends = np.array([place for place, token in enumerate(kept.tolist()) if pieces[token]], np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)[: len(ends)]
    sums = np.add.reduceat(flows[kept], starts, dtype=float)
    for token, flow in zip(kept[ends].tolist(), sums.tolist(), strict=True):
        yield pieces[token].strip() or pieces[token], float(flow)
