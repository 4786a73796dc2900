"""Files that are looked at before they are touched, and places that are tried before the work."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from flowtracer_plugin.files import (
    RecordFile,
    check_file,
    check_folder,
    check_records,
    parsed,
    typed,
)

KIND, VERSION, SETTINGS = "flowtracer.test", 3, {"seed": 1, "percents": (5, 10)}
HEADER = b'{"format": "flowtracer.test", "version": 3, "seed": 1, "percents": [5, 10]}\n'


def number(record):
    return typed(dict[str, int], record)["number"]


def opened(path, settings=SETTINGS):
    return RecordFile(path, KIND, VERSION, settings, number)


FOREIGN = {
    "text without a line break": b"my only notes",
    "text with a last line": b"first line\nthe thesis, not yet saved",
    "lines": b"hello\nworld\n",
    "blank lines": b"\n\n",
    "binary": bytes(range(256)) * 3,
    "zeros": b"\0" * 4096,
    "UTF-16": HEADER.decode().encode("utf-16"),
    "other JSON lines": b'{"prompt": "2 + 2?"}\n{"prompt": "3 +',
    "a list": b"[1, 2]\n[3",
    "a number": b"7\n8",
    "null": b"null\nnu",
    "deep": b"[" * 100_000 + b"\nx",
    "another format": HEADER.replace(b"test", b"love") + b'{"number": 1}\n{"num',
    "another version": HEADER.replace(b"3", b"4") + b'{"number": 1}\n{"num',
    "half a first line": HEADER[:40],
    "a large line": b"x" * (2**20 + 1) + b"\nrest",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_refused_and_left_as_it_is(tmp_path, name):
    path = tmp_path / "mine.txt"
    path.write_bytes(FOREIGN[name])
    before = path.stat()
    for check in (lambda: opened(path), lambda: check_records(path, KIND, VERSION)):
        with pytest.raises(
            ValueError, match=r"mine\.txt'.*wanted results of the format flow"
        ) as no:
            check()
        assert "write to another file" in str(no.value)
    assert path.read_bytes() == FOREIGN[name]
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"number": "x"}', r"it\['number'\] must be a whole number, found 'x'"),
        (b'{"number": true}', "must be a whole number, found True"),
        (b'{"number": 1e999}', "must be a whole number, found inf"),
        (b"[1]", r"it must be an object, found \[1\]"),
        (b"nope", "Expecting value"),
        (b"\xff", "wanted text in UTF-8, found the byte 0xff"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_damaged_record_is_named_and_nothing_is_dropped(tmp_path, line, problem):
    path = tmp_path / "a.jsonl"
    content = HEADER + b'{"number": 1}\n' + line + b'\n{"number": 2}\n{"num'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.jsonl': line 3 is damaged: .*{problem}"):
        opened(path)
    assert path.read_bytes() == content


def test_a_last_line_that_never_was_a_record_stays(tmp_path):
    path = tmp_path / "a.jsonl"
    for line in (b"my notes on this run", b"\0" * 100, b"12"):
        path.write_bytes(HEADER + b'{"number": 1}\n' + line)
        with pytest.raises(ValueError, match=r"a\.jsonl': line 3 is damaged: .*; it is left as it"):
            opened(path)
        assert path.read_bytes() == HEADER + b'{"number": 1}\n' + line


def test_other_settings_drop_nothing_either(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(HEADER + b'{"num')
    with pytest.raises(ValueError, match="other settings: seed is 1 there and 2 now"):
        opened(path, {**SETTINGS, "seed": 2})
    assert path.read_bytes() == HEADER + b'{"num'


def test_a_cut_last_line_is_dropped_and_a_whole_one_kept(tmp_path):
    path, record = tmp_path / "a.jsonl", b'{"number": 12}'
    for length in range(len(record) + 1):
        path.write_bytes(HEADER + b'{"number": 1}\n' + record[:length])
        file = opened(path)
        whole = [12] if length == len(record) else []
        assert file.records == [1, *whole]
        file.add({"number": 7})
        assert opened(path).records == [1, *whole, 7]
    path.write_bytes(HEADER[:-1])
    opened(path).add({"number": 3})
    assert path.read_bytes() == HEADER + b'{"number": 3}\n'


def test_what_editors_change_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    content = b"\xef\xbb\xbf" + HEADER + b'\n{"number": 1}\n\n'
    path.write_bytes(content.replace(b"\n", b"\r\n"))
    assert opened(path).records == [1]


def test_a_new_or_an_empty_file_gets_the_settings(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name in ("empty", "new", "link", "folder/new"):
        assert opened(tmp_path / name).records == []
        assert (tmp_path / name).read_bytes() == HEADER
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == HEADER
    assert opened(None).records == []
    check_records(None, KIND, VERSION)
    check_records(tmp_path / "other", KIND, VERSION)
    assert not (tmp_path / "other").exists()


def test_a_link_to_a_foreign_file_and_a_folder_are_refused(tmp_path):
    (tmp_path / "notes").write_text("notes")
    (tmp_path / "link").symlink_to(tmp_path / "notes")
    with pytest.raises(ValueError, match="wanted results of the format"):
        opened(tmp_path / "link")
    assert (tmp_path / "notes").read_text() == "notes"
    with pytest.raises(IsADirectoryError, match="wanted the name of a file, found a folder"):
        opened(tmp_path)


def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        opened(tmp_path / "pipe").add({"number": 1})
        assert os.read(reader, 1000) == HEADER + b'{"number": 1}\n'
    finally:
        os.close(reader)


# --- places ---


def places(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "below").symlink_to(tmp_path / "file")
    return [
        (
            tmp_path / "file" / "x",
            f"nothing can be made in '{tmp_path / 'file'}' (Not a directory)",
        ),
        (tmp_path / "file" / "new" / "x", "(Not a directory)"),
        (tmp_path / "below" / "x", "(Not a directory)"),
        (tmp_path / ("x" * 300), "File name too long"),
        (Path("/proc/none.flow"), "nothing can be made in '/proc' (No such file or directory)"),
        (Path("/proc/new/none.flow"), "nothing can be made in '/proc' (No such file or directory)"),
    ]


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    for path, reason in places(tmp_path):
        with pytest.raises(OSError, match="name a file in a folder that you may write to") as no:
            check_file(path)
        assert str(no.value).startswith(f"cannot write {str(path)!r}: ")
        assert reason in str(no.value)
    with pytest.raises(IsADirectoryError, match="found a folder; name a file in it"):
        check_file(tmp_path)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["below", "file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    for path, reason in [*places(tmp_path), (tmp_path / "file", "(Not a directory)")]:
        with pytest.raises(OSError, match="name a folder that you may write to") as no:
            check_folder(path)
        assert str(no.value).startswith(f"cannot write to the folder {str(path)!r}: ")
        assert reason in str(no.value)
    assert (tmp_path / "file").read_text() == "old"


def test_a_read_only_file_system_is_noticed(tmp_path, monkeypatch):
    """Which a superuser's permissions do not show."""

    def refuse(path, mode="r", **_):
        assert "x" in mode
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OSError, match=r"nothing can be made in '.*' \(Read-only file system\)"):
        check_file(tmp_path / "x")
    with pytest.raises(OSError, match="Read-only file system"):
        check_folder(tmp_path / "new")


def test_the_attempt_leaves_nothing_behind(tmp_path):
    (tmp_path / "old").write_text("old")
    before = (tmp_path / "old").stat().st_mtime_ns
    for path in ("old", "new", "new/new/new", os.fsdecode(b"\xff")):
        check_file(tmp_path / path)
    check_folder(tmp_path)
    check_folder(tmp_path / "new" / "folder")
    check_file(Path("/dev/null"))
    assert list(tmp_path.iterdir()) == [tmp_path / "old"]
    assert (tmp_path / "old").read_text() == "old"
    assert (tmp_path / "old").stat().st_mtime_ns == before


# --- plain values ---


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Whole:
    part: Part
    pair: tuple[int, float]
    parts: Mapping[str, Part | None]
    either: str | tuple[tuple[int, int], ...] = "all"


GOOD = {
    "part": {"name": "a", "sizes": [1, 2]},
    "pair": [1, 2],
    "parts": {"x": None, "y": {"name": ""}},
    "either": [[1, 2]],
}


def test_plain_values_become_what_they_are_said_to_be():
    assert typed(Whole, GOOD) == Whole(
        part=Part(name="a", sizes=(1, 2)),
        pair=(1, 2),
        parts={"x": None, "y": Part(name="")},
        either=((1, 2),),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"part": None}, "part must be an object, found None"),
        ({"part": {}}, "part lacks 'name'"),
        ({"part": {"name": "a", "b": 1}}, "part has 'b', which is unknown"),
        ({"part": {"name": 1}}, "name must be text, found 1"),
        ({"part": {"name": "a", "sizes": "12"}}, "sizes must be a list, found '12'"),
        ({"part": {"name": "a", "sizes": [1, True]}}, r"sizes\[1\] must be a whole number"),
        ({"part": {"name": "a", "sizes": [1.0]}}, r"sizes\[0\] must be a whole number, found 1.0"),
        ({"part": {"name": "a", "sizes": [2**63]}}, "must be a whole number"),
        ({"pair": [1]}, r"pair must be a list, found \[1\]"),
        ({"pair": [1, float("nan")]}, r"pair\[1\] must be a number, found nan"),
        ({"parts": [1]}, "parts must be an object"),
        ({"parts": {"x": 3}}, r"parts\['x'\] must be an object, found 3"),
        ({"either": 3}, "either must be text, found 3"),
        ({"either": [[1, 2, 3]]}, r"either\[0\] must be a list"),
    ],
)
def test_values_of_another_type_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        typed(Whole, json.loads(json.dumps(GOOD | change)))


def test_json_is_read_with_a_byte_order_mark_and_never_too_deep():
    for text in ('\ufeff{"a": "é"}', b'\xef\xbb\xbf{"a": "\xc3\xa9"}', '{"a": "é"}'):
        assert parsed(text) == {"a": "é"}
    with pytest.raises(ValueError, match="nested too deeply"):
        parsed('{"a": ' * 100_000)
