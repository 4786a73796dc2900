"""`compare_results`: two groups of a traced data set, whose tables are read piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from flowtracer_plugin.bulk.groups import CORRECT, Groups, group_rollouts, read_settings
from flowtracer_plugin.bulk.tables import ANSWERS, Results, read_results
from flowtracer_plugin.comparison.different import Different
from flowtracer_plugin.comparison.groups import (
    MOST_WORDS,
    PARTS,
    TENTHS,
    GroupComparison,
    ShownRollout,
)
from flowtracer_plugin.comparison.permutation import compare_measures
from flowtracer_plugin.comparison.texts import (
    Word,
    contrast_words,
    least_texts,
    word_table,
    words_of,
)

PAIRS = 20
"""Pairs of examples."""


def compare_results(
    results: Results | str | Path,
    by: str = CORRECT,
    *,
    groups: tuple[str, str] | None = None,
) -> GroupComparison:
    """The differences between the right and the wrong rollouts of a traced data set.

    The tables are read piece by piece, so that hundreds of thousands of rollouts take little
    memory. `flowtracer_plugin.report.write_group_comparison` writes its page.

    Args:
        results: What `trace_dataset` gave, or the folder that it wrote.
        by: The column of the answers that tells the groups: one with few values.
        groups: The two values, as text, that are compared; by default the only two that there are.

    Raises:
        FileNotFoundError: No shard is finished in the folder.
        ValueError: There is no such column, or there are not exactly two groups.
    """
    held = results if isinstance(results, Results) else read_results(results)
    settings = read_settings(held)
    found = group_rollouts(held, by, groups)
    parts, counts = _measured(held, found)
    values = np.concatenate([found.values, parts], axis=1)
    words, words_found = _words(held, found, counts)
    different = found.most_different(PAIRS)
    return GroupComparison(
        by=by,
        sides=found.sides,
        rows=found.rows,
        left_out=found.left_out,
        done=found.done,
        total=settings["rows"],
        settings=settings,
        values=values,
        measures=compare_measures(values, found.sides),
        words=words,
        words_found=words_found,
        different=different,
        examples=_examples(held, found, different),
    )


def _rollouts(results: Results, found: Groups, columns: list[str]) -> Iterator[tuple[int, Any]]:
    """The place of each compared rollout, and its tokens; in order."""
    place = {row: at for at, row in enumerate(found.rows.tolist())}
    for row, tokens in results.token_rows(columns):
        if row in place:
            yield place[row], tokens


def _measured(
    results: Results, found: Groups
) -> tuple[Float[np.ndarray, "rollout measure"], dict[str, tuple[int, float]]]:
    """The flow through parts and tenths; and of each word the rollouts and its share in them."""
    values = np.zeros((len(found.rows), len(PARTS) + len(TENTHS)))
    counts: dict[str, tuple[int, float]] = {}
    for at, tokens in _rollouts(results, found, ["text", "part", "throughput"]):
        part = np.array(tokens["part"].to_pylist())
        flow = tokens["throughput"].to_numpy()
        reasoning = part == "response"
        values[at, : len(PARTS)] = [flow[part == name[3:]].sum() for name in PARTS]
        values[at, len(PARTS) :] = tenths(flow[reasoning])
        own: dict[str, float] = {}
        for word, one in words_of(tokens["text"].to_pylist(), flow, reasoning):
            own[word] = own.get(word, 0.0) + one
        total = sum(own.values()) or 1.0
        for word, one in own.items():
            texts, share = counts.get(word, (0, 0.0))
            counts[word] = texts + 1, share + one / total
    return values, counts


def tenths(flow: Float[np.ndarray, " token"]) -> Float[np.ndarray, " tenth"]:
    """The share of the flow in each tenth of the tokens; zeros without flow."""
    places = len(TENTHS) * np.arange(len(flow)) // max(len(flow), 1)
    found = np.bincount(places, flow, len(TENTHS)).astype(float)  # whole numbers of nothing
    total = found.sum()
    return found / total if total > 0 else found


def _words(
    results: Results, found: Groups, counts: dict[str, tuple[int, float]]
) -> tuple[tuple[Word, ...], int]:
    """The words that are compared, and the number of all words in enough rollouts."""
    least = least_texts(len(found.rows))
    known = [word for word, (texts, _) in counts.items() if texts >= least]
    # By the flow in both groups together, so that the choice favours no difference.
    chosen = sorted(known, key=lambda word: (-counts[word][1], word))[:MOST_WORDS]
    rows = (
        words_of(tokens["text"].to_pylist(), tokens["throughput"].to_numpy(), _reasoning(tokens))
        for _, tokens in _rollouts(results, found, ["text", "part", "throughput"])
    )
    return contrast_words(word_table(rows, chosen), found.sides), len(known)


def _reasoning(tokens: Any) -> Bool[np.ndarray, " token"]:
    return np.array(tokens["part"].to_pylist()) == "response"


def _examples(
    results: Results, found: Groups, different: Different
) -> tuple[tuple[ShownRollout, ShownRollout], ...]:
    wanted = {int(found.rows[one]) for pair in different.pairs for one in pair}
    columns = ["row", "id", "prompt", "answer", "right_answer"]
    known: dict[int, ShownRollout] = {}
    for batch in results.batches(ANSWERS, columns):
        kept = np.flatnonzero(np.isin(batch["row"].to_numpy(), list(wanted)))
        known |= {
            one["row"]: ShownRollout(**one, page=page_of(results, one["row"]))
            for one in batch.take(kept).to_pylist()
        }
    return tuple(
        (known[int(found.rows[first])], known[int(found.rows[second])])
        for first, second in different.pairs
    )


def page_of(results: Results, row: int) -> Path | None:
    """The file of the page of a row, if it has one."""
    path = results.folder / "pages" / f"{row:08}.html"
    return path if path.exists() else None
