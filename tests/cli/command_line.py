"""The command line in tests: run here or in a process, and what mistakes look like."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flowtracer_plugin as ft
from flowtracer_plugin.cli import commands as cli

EVERYTHING = r"re:(?s)(.+)"


class Ran:
    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err
        # what a box around a message breaks into lines is one sentence
        self.said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", err).split())


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_here(monkeypatch, capsys, *arguments, stdin=""):
    """What `flowtracer ARGUMENTS` does, without its start-up time."""
    monkeypatch.setattr(sys, "argv", ["flowtracer", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    with pytest.raises(SystemExit) as left:
        cli.main()
    output = capsys.readouterr()
    return Ran(left.value.code or 0, output.out, output.err)


def in_a_process(*arguments, encoding="utf-8", **environment):
    return subprocess.run(
        [sys.executable, "-m", "flowtracer_plugin", *map(str, arguments)],
        capture_output=True,
        encoding=encoding,
        check=False,
        cwd=Path(ft.__file__).parent.parent,
        env={**os.environ, **environment},
    )


def assert_failed(ran, code, *parts):
    """One sentence on stderr, no traceback."""
    assert ran.code == code
    assert ran.out == ""
    assert "Traceback" not in ran.err
    for part in parts:
        assert part in ran.said, ran.said
    if code == 1:
        first, second, *rest = ran.err.splitlines()
        assert first.startswith("error: ")
        assert second == "(--traceback shows where it arose)"
        assert not rest
