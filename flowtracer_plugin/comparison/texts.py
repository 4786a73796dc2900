"""How two groups of texts differ in what their flow passes: token by token, then word by word."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from flowtracer_plugin.comparison.permutation import Contrast, Sides, contrast

_SPELLED = 12  # tokens of a continuation


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """How some of the texts go on where not all do alike.

    Attributes:
        text: What they say next, as far as they agree; empty where they end.
        texts: Their numbers.
    """

    text: str
    texts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Beginning:
    """What all texts begin with.

    Attributes:
        length: In tokens.
        contrast: Of the flow through each of these tokens.
        continuations: How they go on, the way of most first; empty if all are the same to the end.
    """

    length: int
    contrast: Contrast
    continuations: tuple[Continuation, ...]


def contrast_beginning(
    ids: Sequence[Sequence[Hashable]],
    pieces: Sequence[Sequence[str]],
    flows: Sequence[Float[np.ndarray, " _"]],
    sides: Sides | None,
) -> Beginning:
    """The tokens that all texts begin with: how the flow through them differs, and what follows.

    Args:
        ids: What tells tokens apart, by text.
        pieces: The texts, cut into tokens.
        flows: Flow through each token.
        sides: What is compared with what.
    """
    length = shared_length(ids)
    return Beginning(
        length=length,
        contrast=contrast(np.array([flow[:length] for flow in flows]), sides),
        continuations=_continuations(ids, pieces, length),
    )


def shared_length(ids: Sequence[Sequence[Hashable]]) -> int:
    """How many tokens all texts begin with."""
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
    """Tokens that spell the same, without the blanks around them.

    Attributes:
        text: What they spell; blanks alone are kept.
        first: Mean share of the flow through a text's tokens that passes these, as in `Contrast`.
        second: The same of the other side.
        chance: As in `Contrast`.
        chance_of_any: As in `Contrast`, among the words that are listed.
        texts: How many texts have it, by side; of all, where there are no sides.
        tokens: How many tokens they have of it, likewise.
    """

    text: str
    first: float
    second: float
    chance: float | None
    chance_of_any: float | None
    texts: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def difference(self) -> float:
        """First minus second."""
        return self.first - self.second


def least_texts(compared: int) -> int:
    """In how many of the texts that are compared a word must be to be listed.

    What one of many says is mostly a matter of chance, and there is very much of it.
    """
    return 2 if compared > 2 else 1


def contrast_words(
    pieces: Sequence[Sequence[str]],
    flows: Sequence[Float[np.ndarray, " _"]],
    counted: Sequence[Bool[np.ndarray, " _"]],
    sides: Sides | None,
) -> tuple[Word, ...]:
    """The words that are in `least_texts` of those compared, the one that differs most first.

    Args:
        pieces: The texts, cut into tokens.
        flows: Flow through each token.
        counted: Which tokens count.
        sides: What is compared with what.
    """
    groups = [range(len(pieces))] if sides is None else [sides.first, sides.second]
    compared = {text for group in groups for text in group}
    # Texts that are on no side neither count nor bring words.
    rows = [list(_words(*text)) for text in zip(pieces, flows, counted, strict=True)]
    names, shares, tokens = _tables([row * (at in compared) for at, row in enumerate(rows)])
    kept = (tokens > 0).sum(0) >= least_texts(len(compared))
    names, tokens = [name for name, keep in zip(names, kept, strict=True) if keep], tokens[:, kept]
    columns = contrast(shares[:, kept], sides).columns()
    counts = [tokens[list(group)] for group in groups]
    words = (
        Word(
            text=name,
            **numbers,
            texts=tuple(int((count[:, at] > 0).sum()) for count in counts),
            tokens=tuple(int(count[:, at].sum()) for count in counts),
        )
        for at, (name, numbers) in enumerate(zip(names, columns, strict=True))
    )
    return tuple(sorted(words, key=lambda word: (-abs(word.difference), word.text)))


def _tables(
    rows: Sequence[Sequence[tuple[str, float]]],
) -> tuple[list[str], Float[np.ndarray, "text word"], Int[np.ndarray, "text word"]]:
    """The different words, the share of a text's flow that each has, and its number of tokens."""
    place: dict[str, int] = {}
    for word, _ in (entry for row in rows for entry in row):
        place.setdefault(word, len(place))
    shares = np.zeros((len(rows), len(place)))
    tokens = np.zeros((len(rows), len(place)), np.int64)
    for text, row in enumerate(rows):
        for word, flow in row:
            shares[text, place[word]] += flow
            tokens[text, place[word]] += 1
    total = shares.sum(1, keepdims=True)
    return list(place), shares / np.where(total > 0, total, 1), tokens


def _words(
    pieces: Sequence[str],
    flows: Float[np.ndarray, " token"],
    counted: Bool[np.ndarray, " token"],
) -> Iterator[tuple[str, float]]:
    """Word and flow of each token; one without text belongs to the character it is part of."""
    kept = np.flatnonzero(counted)
    ends = np.array([place for place, token in enumerate(kept.tolist()) if pieces[token]], np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)[: len(ends)]
    sums = np.add.reduceat(flows[kept], starts)
    for token, flow in zip(kept[ends].tolist(), sums.tolist(), strict=True):
        yield pieces[token].strip() or pieces[token], float(flow)
