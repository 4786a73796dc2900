"""Files that survive a crash: written whole, or record by record as JSON lines.

A record file begins with its settings; an interrupted run with the same settings continues it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a crash leaves either the old file or the new one.

    Links are followed, and an existing file keeps its permissions. `path` may also be a device or a
    pipe, which is not replaced.

    Raises:
        IsADirectoryError: `path` is a directory.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(f"wanted the name of a file, found the directory {str(path)!r}")
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile, whose files only their owner can read.
    temporary = path.parent / f".{token_hex(8)}.part"
    try:
        with temporary.open("xb") as file:
            file.write(content)
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class RecordFile:
    """A file of records; without a path, records are not kept.

    An incomplete last line, as a crash leaves it, is dropped.

    Args:
        path: A new file, or one that an earlier run with the same settings wrote.
        kind: The name of the file's format.
        version: The version of this format.
        settings: All settings on which the results depend, as plain values.

    Attributes:
        records: The records that the file already held.

    Raises:
        ValueError: The file has another format or version, or holds other settings.
    """

    def __init__(
        self, path: Path | None, kind: str, version: int, settings: Mapping[str, Any]
    ) -> None:
        self._path = path
        header = {"format": kind, "version": version, **settings}
        self.records: list[dict[str, Any]] = []
        if path is None:
            return
        lines = _whole_lines(path)
        if not lines:
            write_atomically(path, _line(header))
            return
        try:
            held, *self.records = [json.loads(line) for line in lines]
            if held["format"] != kind or held["version"] != version:
                raise ValueError(f"its first line is {lines[0][:80]!r}")
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(
                f"cannot go on with {str(path)!r}: wanted results of the format {kind} "
                f"{version}, {error}; write to another file"
            ) from error
        _check_settings(path, held, json.loads(json.dumps(settings)))

    def add(self, record: Mapping[str, Any]) -> None:
        """Append one record, which is in the file when this returns."""
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(_line(record))


def _whole_lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        write_atomically(path, whole)
    return whole.splitlines()


def _check_settings(path: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differ = [
        f"{name} is {held.get(name)!r} there and {value!r} now"
        for name, value in wanted.items()
        if held.get(name) != value
    ]
    if differ:
        raise ValueError(
            f"{str(path)!r} holds results with other settings: {'; '.join(differ)}; give the same "
            "ones, or write to another file"
        )


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"
