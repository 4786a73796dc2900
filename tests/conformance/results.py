"""The table of measurements: one row for each type of model and backend."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Literal

RESULTS = Path(__file__).with_name("results.csv")

Status = Literal["passed", "refused", "failed"]
NO_ATTENTION = "NoAttentionError"
"""Begins the note of a type that carries information in a recurrent state only."""
FORWARD = "attends forward"
"""Ends the note of a type whose queries see later tokens, so that there is no flow to trace."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The result for one type of model on one backend.

    Attributes:
        type: The key in transformers' mapping of causal language models.
        adapter: Name of the adapter that read it; empty if none did.
        backend: The backend of the reader.
        layers: How many layers were compared.
        difference: Largest absolute difference of a probability; empty if none was compared.
        status: `passed`; `refused` with a typed error, by design; or `failed`.
        note: The error, or a remark for readers of the table.
        transformers: Version of transformers.
    """

    type: str
    adapter: str
    backend: str
    layers: int
    difference: str
    status: Status
    note: str
    transformers: str


COLUMNS = tuple(field.name for field in fields(Row))


def read_rows(path: Path = RESULTS) -> tuple[Row, ...]:
    """The rows of a table that `write_rows` wrote; empty if there is no file."""
    if not path.exists():
        return ()
    with path.open(newline="", encoding="utf-8") as file:
        return tuple(
            Row(**{**line, "layers": int(line["layers"])}) for line in csv.DictReader(file)
        )


def write_rows(rows: Iterable[Row], path: Path = RESULTS) -> None:
    """Write the table to `path`, all of it or none."""
    beside = path.with_suffix(".tmp")
    with beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(astuple(row) for row in rows)
    beside.replace(path)


def merged(old: Iterable[Row], new: Iterable[Row]) -> tuple[Row, ...]:
    """`old` with `new` rows in the place of theirs, sorted by type and backend."""
    rows = {(row.type, row.backend): row for row in (*old, *new)}
    return tuple(rows[key] for key in sorted(rows))
