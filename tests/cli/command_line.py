"""The command line in tests: run in this process or in a new one, and the form of mistakes."""

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
        # The message as one sentence, without the box and the line breaks around it.
        self.said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", err).split())


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_here(monkeypatch, capsys, *arguments, stdin=""):
    """The result of `flowtracer ARGUMENTS`, without its start-up time."""
    monkeypatch.setattr(sys, "argv", ["flowtracer", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
    with pytest.raises(SystemExit) as left:
        cli.main()
    output = capsys.readouterr()
    return Ran(left.value.code or 0, output.out, output.err)


def in_a_process(*arguments, **environment):
    """The same in a new process: takes seconds, so only for what happens at its start or end."""
    ran = subprocess.run(
        [sys.executable, "-m", "flowtracer_plugin", *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        check=False,
        cwd=Path(ft.__file__).parent.parent,
        env={**os.environ, **environment},
    )
    return Ran(ran.returncode, ran.stdout, ran.stderr)


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
