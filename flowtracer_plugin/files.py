"""Files that survive a crash: written whole, or record by record as JSON lines.

A record file begins with its settings; an interrupted run with the same settings continues it.
Whatever is read is checked before it is used: its format, and the type of every value.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from secrets import token_hex
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

logger = logging.getLogger(__name__)

_LARGEST = 2**63
"""Whole numbers stay below it, so that arrays can hold them."""

_PART = ".part"

_LONGEST_HEADER = 2**20
"""The bytes that are read to tell a record file from others, which may be large."""


def write_atomically(path: Path, content: bytes, *, sync: bool = False) -> None:
    """Write `content` to `path` so that a crash leaves either the old file or the new one.

    Links are followed, and an existing file keeps its permissions. `path` may also be a device or a
    pipe, which is not replaced. With `sync` the file also survives a loss of power: it is on the
    disk before it gets its name, and has its name when this returns.

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
    temporary = _beside(path)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    logger.debug("wrote %d bytes to %s", len(content), path)
    if sync:
        _sync_names(path.parent)


def sync(path: Path) -> None:
    """Put a file that is written, and its name, on the disk, so that a loss of power keeps them."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    _sync_names(path.parent)


def _sync_names(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):  # elsewhere folders cannot be opened
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def write_first(path: Path, content: bytes) -> None:
    """Write `content` to `path` if nothing is there; of several processes, one does."""
    whole = _beside(path)
    try:
        write_atomically(whole, content, sync=True)
        path.hardlink_to(whole)
    except FileExistsError:
        pass
    except OSError:  # some network and memory card file systems have no hard links
        if not path.exists():
            whole.replace(path)
    finally:
        whole.unlink(missing_ok=True)


def remove_parts(folder: Path, *, older: float = 0.0) -> None:
    """Remove what crashes have left of files that were being written to `folder`.

    Only those that nobody has touched for `older` seconds, where others may still be writing.
    """
    for part in folder.glob(f".*{_PART}"):
        with suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime >= older:
                part.unlink(missing_ok=True)


def is_part(path: Path) -> bool:
    """Whether the file is one that is being written, or that a crash has left unfinished."""
    return path.name.startswith(".") and path.name.endswith(_PART)


def check_file(path: Path) -> None:
    """Check that `path` can be written, before the work whose result goes there.

    Only an attempt tells: permissions say nothing about a superuser, or about a file system that
    takes no files. The attempt leaves nothing behind.

    Raises:
        OSError: The file cannot be written. It is an `IsADirectoryError` if it is a folder.
    """
    real = Path(os.path.realpath(path))
    try:
        mode = _mode(real)
        if mode is not None and stat.S_ISDIR(mode):
            raise IsADirectoryError(
                f"cannot write {str(path)!r}: wanted the name of a file, found a folder; name a "
                "file in it"
            )
        if mode is None or stat.S_ISREG(mode):
            _try_folder(real.parent)
        if mode is not None and stat.S_ISREG(mode):
            real.open("ab").close()
        elif mode is not None and not os.access(real, os.W_OK):  # opening a pipe would wait
            raise PermissionError(None, "Permission denied")
    except IsADirectoryError:
        raise
    except OSError as error:
        raise OSError(
            f"cannot write {str(path)!r}: {_reason(error)}; name a file in a folder that you may "
            "write to"
        ) from error


def check_folder(path: Path) -> None:
    """Check that files can be written in the folder `path`, which need not exist yet.

    Raises:
        OSError: They cannot, or `path` is a file.
    """
    try:
        _try_folder(Path(os.path.realpath(path)))
    except OSError as error:
        raise OSError(
            f"cannot write to the folder {str(path)!r}: {_reason(error)}; name a folder that you "
            "may write to"
        ) from error


def _try_folder(folder: Path) -> None:
    place = next(one for one in (folder, *folder.parents) if _mode(one) is not None)
    attempt = _beside(place / "file")
    try:
        if place.is_dir() and not os.access(place, os.W_OK):
            raise PermissionError(None, "permission denied")
        attempt.open("xb").close()
        attempt.unlink()
    except OSError as error:
        reason = f"nothing can be made in {str(place)!r} ({error.strerror})"
        raise OSError(error.errno, reason) from error


def _mode(path: Path) -> int | None:
    """The type and permissions of what is at `path`; None if there is nothing."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _beside(path: Path) -> Path:
    """A new name in the same folder. Not tempfile, whose files only their owner can read."""
    return path.parent / f".{token_hex(8)}{_PART}"


class RecordFile:
    """A file of records; without a path, records are not kept.

    A file that is not of this format is left untouched. Only in a file of this format, settings and
    records, an incomplete record at its end, as a crash leaves it, is dropped.

    Args:
        path: A new or empty file, or one that an earlier run with the same settings wrote.
        kind: The name of the file's format.
        version: The version of this format.
        settings: All settings on which the results depend, as plain values.
        read: Makes a record of a plain value; it raises `ValueError` for what is none.

    Attributes:
        records: The records that the file already held.

    Raises:
        ValueError: The file has another format or version, holds other settings, or is damaged.
        OSError: The file cannot be read or written.
    """

    def __init__(
        self,
        path: Path | None,
        kind: str,
        version: int,
        settings: Mapping[str, Any],
        read: Callable[[Any], Any] = lambda record: typed(dict[str, Any], record),
    ) -> None:
        self._path = path
        self.records: list[Any] = []
        if path is None:
            return
        check_records(path, kind, version)
        content = path.read_bytes() if path.is_file() else b""  # a pipe holds no earlier results
        if not content:
            write_atomically(path, _line({"format": kind, "version": version, **settings}))
            return
        first, *lines = content.splitlines(keepends=True)
        check_settings(path, _header(path, first, kind, version), settings)
        kept = _whole_lines(lines)
        self.records += _records(path, kept, read)
        whole = b"".join([first, *kept])
        if not whole.endswith(b"\n"):
            whole += b"\n"
        if whole != content:
            write_atomically(path, whole)

    def add(self, record: Mapping[str, Any]) -> None:
        """Append one record, which is in the file when this returns."""
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(_line(record))


def read_records(
    path: Path,
    kind: str,
    version: int,
    settings: Mapping[str, Any],
    read: Callable[[Any], Any],
) -> list[Any]:
    """The records of a file to which another process may be writing, and which is left as it is.

    Raises:
        ValueError: As `RecordFile`.
        OSError: The file cannot be read.
    """
    first, *lines = path.read_bytes().splitlines(keepends=True) or [b""]
    check_settings(path, _header(path, first, kind, version), settings)
    return _records(path, _whole_lines(lines), read)


def _whole_lines(lines: list[bytes]) -> list[bytes]:
    """The lines without a last one of which only a part is written."""
    cut = bool(lines) and lines[-1].startswith(b"{") and not _is_whole(lines[-1])
    return lines[:-1] if cut else lines


def _records(path: Path, lines: list[bytes], read: Callable[[Any], Any]) -> list[Any]:
    numbered = enumerate(lines, 2)
    return [_record(path, number, line, read) for number, line in numbered if line.strip()]


def check_records(
    path: Path | None, kind: str, version: int, settings: Mapping[str, Any] | None = None
) -> None:
    """Check that `RecordFile` can be made of `path`, apart from its records.

    `settings` are those that are known already: more may be added until the file is made.

    Raises:
        ValueError: The file has another format or version, or holds other settings.
        OSError: The file cannot be read or written.
    """
    if path is None:
        return
    check_file(path)
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            held = _header(path, file.readline(_LONGEST_HEADER), kind, version)
        check_settings(path, held, settings or {})


def _header(path: Path, first: bytes, kind: str, version: int) -> dict[str, Any]:
    """The settings in the first line of a record file."""
    try:
        held: dict[str, Any] = typed(dict[str, Any], parsed(first))
        if held.get("format") == kind and held.get("version") == version:
            return held
        found = f"its first line is {first[:80]!r}"
    except ValueError as error:
        found = f"its first line is {first[:80]!r} ({error})"
    raise ValueError(
        f"cannot go on with {str(path)!r}: wanted results of the format {kind} {version}, {found}; "
        "it is left as it is, write to another file"
    )


def _record(path: Path, number: int, line: bytes, read: Callable[[Any], Any]) -> Any:
    try:
        return read(parsed(line))
    except ValueError as error:
        raise ValueError(
            f"cannot go on with {str(path)!r}: line {number} is damaged: {error}; it is left as it "
            "is, delete that line or write to another file"
        ) from error


def _is_whole(line: bytes) -> bool:
    """Whether this last line was written to its end; editors may drop the line break."""
    if line.endswith(b"\n"):
        return True
    try:
        parsed(line)
    except ValueError:
        return False
    return True


def check_settings(
    path: Path, held: Mapping[str, Any], settings: Mapping[str, Any], *, place: str = "file"
) -> None:
    """Check that the settings `held` at `path` are `settings`; others that are held may differ.

    Raises:
        ValueError: They are not; the message names both values of each, and the `place` to change.
    """
    wanted: Mapping[str, Any] = json.loads(json.dumps(settings))
    differ = [
        f"{name} is {one!r} there and {other!r} now"
        for name, one, other in _differences(held, wanted)
    ]
    if differ:
        raise ValueError(
            f"{str(path)!r} holds results with other settings: {'; '.join(differ)}; give the same "
            f"ones, or write to another {place}"
        )


def _differences(
    held: Mapping[str, Any], wanted: Mapping[str, Any], within: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """The name of each setting that differs, with both values; of groups, only what differs."""
    for name, value in wanted.items():
        there = held.get(name)
        if isinstance(there, dict) and isinstance(value, dict):
            keys = dict.fromkeys((*value, *there))
            yield from _differences(there, {key: value.get(key) for key in keys}, f"{name}.")
        elif there != value:
            yield f"{within}{name}", there, value


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def parsed(text: str | bytes) -> Any:
    """The value of a JSON text in UTF-8; a byte order mark is skipped.

    Raises:
        ValueError: It is no JSON, or is nested too deeply.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise ValueError(
                f"wanted text in UTF-8, found the byte 0x{byte:02x}; save the file as UTF-8"
            ) from error
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except RecursionError as error:
        raise ValueError("wanted plain values, found values nested too deeply") from error


def typed(kind: Any, value: Any, place: str = "it") -> Any:
    """The plain `value` as a `kind`: lists become tuples, and mappings become dataclasses.

    Args:
        kind: The annotation of a dataclass's field.
        value: What `parsed` gives.
        place: The name of the value in messages.

    Raises:
        ValueError: The value, or a value in it, has another type; a field is missing or unknown.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _typed_union(parts, value, place)
    if isinstance(kind, type) and is_dataclass(kind):
        return _typed_fields(kind, value, place)
    if origin is tuple and isinstance(value, list):
        same = len(parts) == 2 and parts[1] is Ellipsis
        kinds = parts[:1] * len(value) if same else parts
        if len(kinds) == len(value):
            pairs = zip(kinds, value, strict=True)
            return tuple(typed(one, of, f"{place}[{n}]") for n, (one, of) in enumerate(pairs))
    elif origin in (dict, Mapping) and isinstance(value, dict):
        return {name: typed(parts[1], of, f"{place}[{name!r:.40}]") for name, of in value.items()}
    elif kind is Any or _is_plain(kind, value):
        return float(value) if kind is float else value
    raise ValueError(f"{place} must be {_name(kind)}, found {value!r:.80}")


def _typed_union(kinds: tuple[Any, ...], value: Any, place: str) -> Any:
    problems = []
    for kind in kinds:
        try:
            return typed(kind, value, place)
        except ValueError as error:
            problems.append(error)
    # the deepest one is of the kind that the value comes closest to
    raise max(problems, key=lambda problem: len(str(problem).partition(" must be ")[0]))


def _typed_fields(kind: Any, value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{place} must be an object, found {value!r:.80}")
    hints = _hints(kind)
    needed = {one.name for one in fields(kind) if one.default is one.default_factory is MISSING}
    if missing := needed - value.keys():
        raise ValueError(f"{place} lacks {min(missing)!r}")
    if unknown := value.keys() - hints:
        raise ValueError(f"{place} has {min(unknown)!r:.80}, which is unknown")
    return kind(**{name: typed(hints[name], of, name) for name, of in value.items()})


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _is_plain(kind: Any, value: Any) -> bool:
    if kind in (int, float):
        numbers = (int,) if kind is int else (int, float)
        plain = isinstance(value, numbers) and not isinstance(value, bool)
        return plain and (abs(value) < _LARGEST if isinstance(value, int) else math.isfinite(value))
    return isinstance(kind, type) and isinstance(value, kind)


def _name(kind: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    by_origin = {tuple: "a list", dict: "an object", Mapping: "an object"}
    origin = get_origin(kind)
    return names.get(kind) or by_origin.get(cast("Any", origin)) or "null"
