"""A trace as a table of its tokens, in Parquet."""

from __future__ import annotations

import json
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from flowtracer_plugin.files import write_atomically
from flowtracer_plugin.result.document import about, token_columns, token_fields
from flowtracer_plugin.result.trace_data import TraceData

METADATA = "flowtracer.trace"
"""The key of the file's metadata that holds the fields of the whole trace, as JSON."""

_TYPES = {
    "integer": pyarrow.int64(),
    "number": pyarrow.float64(),
    "boolean": pyarrow.bool_(),
    "string": pyarrow.string(),
}
_SURROGATE = re.compile("[\ud800-\udfff]")


def write_table(trace: TraceData, path: Path) -> Path:
    """Write `token_table(trace)` to `path`, whole or not at all, and return `path`."""
    content = BytesIO()
    pyarrow.parquet.write_table(token_table(trace), content)
    write_atomically(path, content.getvalue())
    return path


def token_table(trace: TraceData) -> pyarrow.Table:
    """A table with one row per token: the fields of a token in `json_schema()`.

    Arrow's strings are UTF-8, which cannot hold half a surrogate pair; U+FFFD replaces each half.
    """
    columns = token_columns(trace)
    columns["text"] = [_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text) for text in trace.tokens]
    fields = [
        pyarrow.field(name, _TYPES[kind], nullable=False, metadata={"description": description})
        for name, (kind, description) in token_fields().items()
    ]
    schema = pyarrow.schema(fields, metadata={METADATA: json.dumps(about(trace))})
    return pyarrow.table(columns, schema=schema)


def token_frame(trace: TraceData) -> Any:
    """`token_table(trace)` as a pandas DataFrame."""
    return token_table(trace).to_pandas()
