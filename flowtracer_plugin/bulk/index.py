"""`index.html` beside the tables: the rollouts, sortable, with links to their pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import monotonic

from flowtracer_plugin.bulk.groups import read_settings
from flowtracer_plugin.bulk.tables import ANSWERS, Results
from flowtracer_plugin.report.pages.rollout_index import RolloutLine, write_rollout_index

_COLUMNS = (
    "row",
    "id",
    "prompt",
    "question",
    "answer",
    "correct",
    "response_tokens",
    "reasoning_share",
    "concentration",
    "error",
)

PAUSE = 20
"""While shards get done, the list is written anew after so many times as long as writing takes."""


def write_data_index(results: Results) -> Path:
    """Write the list of the finished rollouts to `index.html`, and return its path.

    The table is read piece by piece.
    """
    return write_rollout_index(
        results.folder / "index.html",
        _lines(results),
        title=f"Rollouts of {results.folder.resolve().name}",
        settings=read_settings(results),
    )


def _lines(results: Results) -> Iterator[RolloutLine]:
    pages = {path.stem for path in (results.folder / "pages").glob("*.html")}
    for batch in results.batches(ANSWERS, _COLUMNS):
        for row in batch.to_pylist():
            name = f"{row['row']:08}"
            row["prompt"] = row.pop("question") or row["prompt"]
            yield RolloutLine(**row, page=f"pages/{name}.html" if name in pages else None)


class FreshIndex:
    """Writes the list while the shards of a data set get done.

    The more shards there are, the longer that takes, so it is done for at most a twentieth of the
    time.
    """

    def __init__(self, results: Results) -> None:
        self._results = results
        self._due = 0.0

    def shard_done(self) -> None:
        """Write the list if it is due."""
        began = monotonic()
        if began >= self._due:
            write_data_index(self._results)
            self._due = monotonic() + PAUSE * (monotonic() - began)
