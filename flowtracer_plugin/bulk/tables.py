"""The tables of a traced data set: a row for each answer, and a row for each token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from flowtracer_plugin.bulk.rows import KindsSeen, as_json
from flowtracer_plugin.bulk.traced_row import TracedRow
from flowtracer_plugin.comparison.traces import origins, stops
from flowtracer_plugin.extras import comes_with

with comes_with("viz", "a table of traces"):
    import pyarrow
    import pyarrow.parquet

ANSWERS, TOKENS = "answers", "tokens"
"""The folders of the tables, and their names."""

BATCH_ROWS = 2**15
"""Rows of a table that are in memory at once where it is read piece by piece."""

_TOP = pyarrow.list_(
    pyarrow.struct(
        [("index", pyarrow.int32()), ("text", pyarrow.string()), ("throughput", pyarrow.float64())]
    )
)
_ANSWER_TYPES = {
    "id": pyarrow.string(),
    "row": pyarrow.int64(),
    "digest": pyarrow.string(),
    "prompt": pyarrow.string(),
    "question": pyarrow.string(),
    "response": pyarrow.string(),
    "generated": pyarrow.bool_(),
    "truncated": pyarrow.bool_(),
    "answer": pyarrow.string(),
    "rule": pyarrow.string(),
    "right_answer": pyarrow.string(),
    "correct": pyarrow.bool_(),
    "prompt_tokens": pyarrow.int32(),
    "response_tokens": pyarrow.int32(),
    "reasoning_share": pyarrow.float64(),
    "concentration": pyarrow.float64(),
    "question_reached": pyarrow.int32(),
    "stops": pyarrow.float64(),
    "from_prompt": pyarrow.float64(),
    "from_early": pyarrow.float64(),
    "from_middle": pyarrow.float64(),
    "from_late": pyarrow.float64(),
    "top_tokens": _TOP,
    "error": pyarrow.string(),
}
_TOKEN_TYPES = {
    "rollout": pyarrow.int64(),
    "index": pyarrow.int32(),
    "id": pyarrow.int64(),
    "text": pyarrow.string(),
    "part": pyarrow.string(),
    "throughput": pyarrow.float64(),
    "reach": pyarrow.float64(),
    "rank": pyarrow.int32(),
}
_CARRIED_TYPES = {
    "text": pyarrow.string(),
    "integer": pyarrow.int64(),
    "number": pyarrow.float64(),
    "boolean": pyarrow.bool_(),
    "json": pyarrow.string(),
}
_SURROGATE = re.compile("[\ud800-\udfff]")


def answer_schema(kinds: Mapping[str, str]) -> pyarrow.Schema:
    """The columns of the answers; `kinds` are those of the columns that are carried through.

    A carried column whose name is taken gets `data_` before it, again until the name is free.
    """
    names = carried_names(kinds)
    carried = [(names[name], _CARRIED_TYPES[kind]) for name, kind in kinds.items()]
    return pyarrow.schema([*_ANSWER_TYPES.items(), *carried])


def token_schema(scores: Iterable[str]) -> pyarrow.Schema:
    """The columns of the tokens; each score is a column with `score_` before its name."""
    more = [(f"score_{name}", pyarrow.float64()) for name in scores]
    return pyarrow.schema([*_TOKEN_TYPES.items(), *more])


def carried_names(names: Iterable[str]) -> dict[str, str]:
    """The name of each column of the data in the table of answers; no two are the same."""
    found: dict[str, str] = {}
    for name in sorted(names, key=lambda name: _whole(name) in _ANSWER_TYPES):  # free ones first
        new = _whole(name)
        while new in _ANSWER_TYPES or new in found.values():
            new = f"data_{new}"
        found[name] = new
    return found


def answer_record(result: TracedRow, kinds: Mapping[str, str]) -> dict[str, Any]:
    """One row of the table of answers."""
    record: dict[str, Any] = {
        "id": _whole(result.id),
        "row": result.row,
        "digest": result.digest or None,
        "prompt": _whole(result.prompt),
        "response": _whole(result.response),
        "generated": result.generated,
        "truncated": result.truncated,
        "right_answer": _whole(result.right_answer),
        "correct": result.correct,
        "error": _whole(result.error),
        "top_tokens": [],
    }
    names = carried_names(kinds)
    for name, kind in kinds.items():
        record[names[name]] = _carried(result.columns.get(name), kind)
    trace = result.trace
    if trace is None:
        return record
    length = trace.spans.prompt_length
    return record | {
        "question": _whole(trace.question_text),
        "answer": _whole(trace.spans.answer_text),
        "rule": _whole(trace.spans.rule),
        "prompt_tokens": length,
        "response_tokens": len(trace.tokens) - length,
        "reasoning_share": trace.reasoning_share,
        "concentration": result.concentration,
        "question_reached": trace.backbone.question_reached,
        "stops": stops(trace),
        **{f"from_{part}": share for part, share in asdict(origins(trace)).items()},
        "top_tokens": [
            {
                "index": token,
                "text": _whole(trace.tokens[token]),
                "throughput": float(trace.throughput[token]),
            }
            for token in result.top_tokens()
        ],
    }


def answer_table(records: Sequence[Mapping[str, Any]], kinds: Mapping[str, str]) -> pyarrow.Table:
    """The table of answers, in the order of the records."""
    return pyarrow.Table.from_pylist(list(records), schema=answer_schema(kinds))


def token_table(result: TracedRow, scores: Sequence[str]) -> pyarrow.Table:
    """The tokens of one result; none without a trace, and no values for scores that failed."""
    schema, trace = token_schema(scores), result.trace
    if trace is None:
        return schema.empty_table()
    count = len(trace.tokens)
    ranks = result.ranks
    columns = {
        "rollout": np.full(count, result.row),
        "index": np.arange(count),
        "id": trace.token_ids,
        "text": [_whole(text) for text in trace.tokens],
        "part": trace.spans.regions,
        "throughput": trace.throughput,
        "reach": trace.reach,
        "rank": pyarrow.array(ranks, mask=ranks == 0),
    }
    for name in scores:
        columns[f"score_{name}"] = result.scores.get(name, [None] * count)
    arrays = [pyarrow.array(columns[field.name]).cast(field.type) for field in schema]
    return pyarrow.table(arrays, schema=schema)


def joined(tables: Sequence[pyarrow.Table], schema: pyarrow.Schema) -> pyarrow.Table:
    """One table with the rows of all."""
    return pyarrow.concat_tables([schema.empty_table(), *tables]).combine_chunks()


def parquet_bytes(table: pyarrow.Table) -> bytes:
    """The table as a Parquet file."""
    content = BytesIO()
    with pyarrow.parquet.ParquetWriter(content, table.schema) as writer:
        if len(table):  # `datasets` cannot read a group of no rows
            writer.write_table(table)
    return content.getvalue()


@dataclass(frozen=True, eq=False)
class Results:
    """The finished shards of a traced data set. The tables are read on first use.

    Attributes:
        folder: The folder that `trace_dataset` wrote.
    """

    folder: Path

    @cached_property
    def answers(self) -> pyarrow.Table:
        """A row for each rollout, in the order of the data."""
        return self.read(ANSWERS)

    @cached_property
    def tokens(self) -> pyarrow.Table:
        """A row for each token of each traced rollout; `rollout` is the `row` of its answer."""
        return self.read(TOKENS)

    def read(self, table: str, columns: Sequence[str] | None = None) -> pyarrow.Table:
        """Some columns of a table, `"answers"` or `"tokens"`; all by default."""
        return pyarrow.concat_tables(file.read(columns) for file in self._files(table))

    def columns(self, table: str = ANSWERS) -> list[str]:
        """The names of a table's columns."""
        names: list[str] = next(self._files(table)).schema_arrow.names
        return names

    def batches(self, table: str, columns: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
        """Some columns of a table, `BATCH_ROWS` rows at a time: large tables fit in no memory."""
        for file in self._files(table):
            yield from file.iter_batches(BATCH_ROWS, columns=list(columns))

    def token_rows(self, columns: Sequence[str]) -> Iterator[tuple[int, pyarrow.Table]]:
        """The number of each traced rollout, and some columns of its tokens; one at a time."""
        held: list[pyarrow.RecordBatch] = []  # of one rollout, which may go on in the next batch
        number = -1
        for batch in self.batches(TOKENS, ["rollout", *columns]):
            numbers = batch["rollout"].to_numpy()
            cuts = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1))
            for start, stop in pairwise(cuts.tolist()):
                if held and numbers[start] != number:
                    yield number, pyarrow.Table.from_batches(held)
                    held = []
                number = int(numbers[start])
                held.append(batch.slice(start, stop - start))
        if held:
            yield number, pyarrow.Table.from_batches(held)

    def tokens_of(self, row: int, columns: Sequence[str]) -> pyarrow.Table:
        """Some columns of the tokens of one traced rollout."""
        chosen = [("rollout", "=", row)]
        return pyarrow.concat_tables(
            pyarrow.parquet.read_table(file, columns=list(columns), filters=chosen)
            for file in self._paths(TOKENS)
        )

    def _files(self, table: str) -> Iterator[pyarrow.parquet.ParquetFile]:
        return map(pyarrow.parquet.ParquetFile, self._paths(table))

    def _paths(self, table: str) -> Iterator[Path]:
        # A shard is finished when its answers are there; its tokens were written before them.
        names = sorted(path.name for path in (self.folder / ANSWERS).glob("*.parquet"))
        return (self.folder / table / name for name in names)

    def to_dataframe(self, table: str = ANSWERS) -> Any:
        """The answers, or with `"tokens"` the tokens, as a pandas DataFrame.

        Raises:
            ValueError: There is no such table.
            ModuleNotFoundError: pandas is missing; the extra `viz` installs it.
        """
        if table not in (ANSWERS, TOKENS):
            raise ValueError(f"wanted the table {ANSWERS!r} or {TOKENS!r}, got {table!r}")
        return getattr(self, table).to_pandas()


def read_results(folder: str | Path) -> Results:
    """The tables that `trace_dataset` or `flowtracer trace-data` wrote to `folder`.

    Shards that are not finished are left out.

    Raises:
        FileNotFoundError: No shard is finished there.
    """
    if not any((Path(folder) / ANSWERS).glob("*.parquet")):
        raise FileNotFoundError(
            f"no finished shard in {str(folder)!r}; wanted a folder that trace_dataset() or "
            "flowtracer trace-data wrote"
        )
    return Results(Path(folder))


def to_dataframe(results: Iterable[TracedRow]) -> Any:
    """The results of `trace_many` as a pandas DataFrame, with the columns of the answers' table.

    Raises:
        ModuleNotFoundError: pandas is missing; the extra `viz` installs it.
    """
    held = list(results)
    kinds = KindsSeen(())
    for result in held:
        kinds.add(result.columns)
    return answer_table([answer_record(one, kinds.found) for one in held], kinds.found).to_pandas()


def _carried(value: Any, kind: str) -> Any:
    if value is None:
        return None
    if kind == "json":
        return _whole(as_json(value))
    if kind == "text":
        return _whole(value)
    return float(value) if kind == "number" else value


def _whole(text: Any) -> Any:
    """The text with U+FFFD for half a surrogate pair, which Arrow's UTF-8 cannot hold."""
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text) if isinstance(text, str) else text
