"""The rows of data by their numbers, read when they are asked for."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from flowtracer_plugin.bulk.examples import Columns
from flowtracer_plugin.text.data_sets import json_row, load_rows

_ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")

Row = Mapping[str, Any] | ValueError
"""A row, or why it cannot be read."""


class JsonLines(Sequence[Mapping[str, Any]]):
    """The rows of a file of JSON lines; only their places are held in memory.

    Args:
        path: The file. A byte order mark and empty lines are skipped.
        limit: How many rows are read.

    Raises:
        ValueError: There is no such file.
    """

    def __init__(self, path: Path, limit: int | None = None) -> None:
        if not path.is_file():
            raise ValueError(f"there is no file {str(path)!r}; wanted a JSON Lines file")
        self._path, self._places, self._lines = path, array("q"), array("q")
        place = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if limit is not None and len(self._places) == limit:
                    break
                if line.strip():
                    self._places.append(place)
                    self._lines.append(number)
                place += len(line)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Any]:
        """The rows; a damaged one is the error that says so."""
        return (read_row(self, number) for number in range(len(self)))

    def __getitem__(self, number: Any) -> Any:
        with self._path.open("rb") as file:
            file.seek(self._places[number])
            return json_row(file.readline(), self._lines[number], self._path)


def open_rows(
    data: Any, *, split: str = "train", config: str | None = None, limit: int | None = None
) -> Any:
    """The rows of a file, of a data set by its name or folder, or of a sequence, by number.

    Raises:
        ValueError: There is no such file, data set or split, or there are no rows.
        TypeError: `data` are no rows.
        ModuleNotFoundError: datasets is missing, and `data` names no file of JSON lines.
    """
    rows: Any
    if isinstance(data, str | Path):
        lines = Path(data).suffix.lower() == ".jsonl"
        rows = JsonLines(Path(data), limit) if lines else load_rows(str(data), split, config=config)
    elif isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise TypeError(
            f"wanted rows, such as a list of dicts or one split of a data set, got a "
            f"{type(data).__name__}; put a single row in a list"
        )
    else:
        if hasattr(data, "to_dict") and hasattr(data, "columns"):  # a pandas DataFrame
            data = data.to_dict("records")
        rows = data if hasattr(data, "__len__") and hasattr(data, "__getitem__") else list(data)
    if limit is not None and len(rows) > limit:
        rows = rows.select(range(limit)) if hasattr(rows, "select") else rows[:limit]
    if not len(rows):
        raise ValueError(f"there are no rows in {data!r:.80}")
    return rows


def read_row(rows: Any, number: int) -> Row:
    """The row of this number, or why it cannot be read."""
    try:
        return checked_row(rows[number], number)
    except ValueError as error:
        return error


def checked_row(row: Any, number: int) -> Row:
    """The row, or an error if it is no mapping."""
    if isinstance(row, Mapping | ValueError):
        return row
    return ValueError(
        f"row {number} of the data is not an object: {row!r:.80}; wanted such as {{'prompt': text}}"
    )


def chosen_columns(rows: Iterable[Row], columns: Columns) -> Columns:
    """The columns that the first readable row has.

    Raises:
        ValueError: No row can be read, or a column is missing.
    """
    problem: ValueError | None = None
    for row in rows:
        if not isinstance(row, ValueError):
            return columns.chosen(list(row))
        problem = problem or row
    raise ValueError(f"no row of the data can be read: {problem}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What one pass over all rows finds.

    Attributes:
        columns: The columns that hold prompts, responses and answers.
        kinds: The kind of each other column: text, integer, number, boolean, or json where values
            are of several kinds or are lists or objects.
        digest: A hash of all rows.
        answers: The number of rows with a right answer.
    """

    columns: Columns
    kinds: Mapping[str, str]
    digest: str
    answers: int


def survey(rows: Any, columns: Columns) -> Survey:
    """Read all rows once.

    Raises:
        ValueError: No row can be read, or a column is missing.
    """
    numbers = range(len(rows))
    chosen = chosen_columns((read_row(rows, number) for number in numbers), columns)
    digest, kinds, answers = blake2b(digest_size=16), KindsSeen(chosen.used), 0
    for number in numbers:
        row = read_row(rows, number)
        # Not the error's words, which name the file as it was named.
        known = f"damaged {number}" if isinstance(row, ValueError) else as_json(dict(row))
        digest.update(known.encode(errors="surrogatepass") + b"\n")
        kinds.add(row)
        if not isinstance(row, ValueError):
            answers += row.get(chosen.answer or "") is not None
    return Survey(columns=chosen, kinds=kinds.found, digest=digest.hexdigest(), answers=answers)


class KindsSeen:
    """The kinds of the columns that are carried through, as rows show them.

    Args:
        used: The names of other columns.
    """

    def __init__(self, used: Iterable[str | None]) -> None:
        self._used = set(used)
        self._seen: dict[str, set[str]] = {}

    def add(self, row: Row) -> None:
        """Look at one row."""
        for name, value in () if isinstance(row, ValueError) else row.items():
            if name not in self._used:
                kinds = self._seen.setdefault(str(name), set())
                if value is not None:
                    kinds.add(_kind(value))

    @property
    def found(self) -> Mapping[str, str]:
        """The kind of each column; text where all values are missing."""
        return {name: _joint(kinds) for name, kinds in self._seen.items()}


def _joint(kinds: set[str]) -> str:
    if len(kinds) < 2:
        return next(iter(kinds), "text")
    return "number" if kinds == {"integer", "number"} else "json"


def _kind(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return "integer" if -(2**63) <= value < 2**63 else "json"
    kinds = {bool: "boolean", float: "number", str: "text"}
    return kinds.get(type(value), "json")


def as_json(value: Any) -> str:
    """The value as JSON; what JSON has no name for, such as a date, becomes text."""
    return json.dumps(value, ensure_ascii=False, default=_as_text)


def _as_text(value: Any) -> str:
    """The value's text without its address in memory, which differs from run to run."""
    return _ADDRESS.sub("", str(value))


def windows(rows: Iterable[Any], size: int) -> Iterable[list[tuple[int, Row]]]:
    """Rows with their numbers, `size` at a time."""
    numbered = ((number, checked_row(row, number)) for number, row in enumerate(rows))
    while found := list(islice(numbered, size)):
        yield found
