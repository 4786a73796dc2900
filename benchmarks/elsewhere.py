"""A way that runs in another Python environment, as its libraries conflict with the project's."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from signal import SIGKILL
from threading import Timer

ROOT = Path(__file__).parent.parent
LIMIT_SECONDS = 300.0


class UnbearableError(Exception):
    """A way takes more time or memory than is available; the message says which."""


class Elsewhere:
    """A way that another process runs on request.

    The process stays alive between runs, so that its way takes turns with ours at the cost of one
    line to it and one line back. It reads `run` or `peak`, and answers in JSON: `{"ok": value}` or
    `{"unbearable": reason}`.

    Args:
        command: Starts the process; its first answer says that it is ready.
        limit: Seconds that one run may take.

    Raises:
        UnbearableError: A run took longer, or memory was too small for it.
        RuntimeError: The process failed in another way; the terminal shows how.
    """

    def __init__(self, command: Sequence[str], *, limit: float = LIMIT_SECONDS) -> None:
        self._command, self._limit = command, limit

    def __call__(self) -> None:
        self._ask("run", self._limit)

    def peak(self) -> float:
        """The result of `peak_of`, which runs the way twice, in its process."""
        return self._ask("peak", 2 * self._limit)

    def close(self) -> int:
        """End the process; the next run starts another one. Returns its exit code."""
        process = self.__dict__.pop("_process")
        for pipe in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):
                pipe.close()
        return process.wait()

    @cached_property
    def _process(self) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        process = subprocess.Popen(self._command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeError(f"{' '.join(self._command)} ended before it was ready")
        return process

    def _ask(self, what: str, limit: float) -> float:
        process, started = self._process, time.perf_counter()
        assert process.stdin is not None
        assert process.stdout is not None
        watch = Timer(limit, process.kill)
        watch.start()
        process.stdin.write(f"{what}\n")
        process.stdin.flush()
        line = process.stdout.readline()
        watch.cancel()
        if not line:
            late, code = time.perf_counter() - started >= limit, self.close()
            if late:
                raise UnbearableError(f"took more than {limit:.0f} s")
            if code != -SIGKILL:
                raise RuntimeError(f"{' '.join(self._command)} failed with code {code}")
            raise UnbearableError("was killed, as the system does when memory runs out")
        answer = json.loads(line)
        if "unbearable" in answer:
            raise UnbearableError(answer["unbearable"])
        return answer["ok"]
