"""Judgements that always come back: in this process where they are easy, else in a worker.

Importing this module starts the worker, which needs a second until it can judge, and waits for
nothing; the first judgement that needs it waits for what is left of that second.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from flowtracer_plugin.rewards import worker
from flowtracer_plugin.rewards.algebra import TooHugeError
from flowtracer_plugin.rewards.judge import judged_by
from flowtracer_plugin.rewards.numerals import Exact

START_SECONDS = 60.0
"""How long a worker may take until it has imported everything."""
MOST_WORKERS = 8
"""How many threads are served at once; others wait."""

_LOG = logging.getLogger(__name__)


class RefusedError(Exception):
    """A judgement took too long or too much memory."""


def verdict(gold: str, said: str) -> bool | None:
    """As `equal_answers`, within 0.3 s of computing, in any thread and any fork of the process.

    Raises:
        RefusedError: The judgement would have taken longer; with `gold` against any other answer
            it would not.
    """
    try:
        return _judged(gold, said)
    except RefusedError:
        if not _readable(gold):
            return None
        raise


def _readable(gold: str) -> bool:
    try:
        _judged(gold, "0", worker.SECONDS / 3)
    except RefusedError:
        return False
    return True


def _judged(gold: str, said: str, seconds: float = worker.SECONDS) -> bool | None:
    try:
        return judged_by(_ELSEWHERE, gold, said)
    except _NeedsAlgebraError:
        return _pool.judge([gold, said, seconds])
    except (TooHugeError, RecursionError) as error:
        raise RefusedError from error


class _NeedsAlgebraError(Exception):
    """The judgement needs algebra, which this process does not do."""


class _Elsewhere:
    """An algebra that only says that it is needed."""

    def same_formula(self, one: str, other: str) -> bool:
        raise _NeedsAlgebraError

    def near(self, rounding: Exact, formula: str) -> bool:
        raise _NeedsAlgebraError

    def about(self, one: str, other: str) -> bool:
        raise _NeedsAlgebraError

    def same_equation(self, one: tuple[str, str], other: tuple[str, str]) -> bool:
        raise _NeedsAlgebraError

    def same_region(self, one: Sequence[Any], other: Sequence[Any]) -> bool:
        raise _NeedsAlgebraError


_ELSEWHERE = _Elsewhere()


class _Connection:
    """A fork of the worker, over a socket."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self.late = False
        """Whether it took so long that nobody waits for its answer any more."""

    def judge(self, request: Sequence[Any]) -> Any:
        """Its answer.

        Raises:
            EOFError: It has died, or is late.
        """
        # It keeps the limit itself; this is for one that was stopped, or a machine that stands.
        self._socket.settimeout(worker.patience(request[2]) + 0.1)
        answer = b""
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            while not answer.endswith(b"\n"):
                if not (part := self._socket.recv(4096)):
                    raise EOFError
                answer += part
        except OSError as error:
            self.late = isinstance(error, TimeoutError)
            raise EOFError from error
        return json.loads(answer)

    def stop(self) -> None:
        """End it; it sees that nobody asks any more."""
        self._socket.close()


class _Piped:
    """A worker over pipes, for itself: it is killed when it is late, and another one started."""

    def __init__(self) -> None:
        self._process = _started(worker.PIPES, subprocess.PIPE, subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self.late = False
        if self._line(START_SECONDS) != worker.READY:
            self.stop()
            raise OSError("the process that judges answers did not start")

    def judge(self, request: Sequence[Any]) -> Any:
        """Its answer.

        Raises:
            EOFError: It has died, or is late.
        """
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise EOFError from error
        line = self._line(worker.patience(request[2]))
        if not line.endswith(b"\n"):
            raise EOFError
        return json.loads(line)

    def _line(self, seconds: float) -> bytes:
        timer = threading.Timer(seconds, self._kill)
        timer.daemon = True
        timer.start()
        try:
            return self._answers.readline()
        finally:
            timer.cancel()

    def _kill(self) -> None:
        self.late = True
        self._process.kill()

    def stop(self) -> None:
        """End it and wait for it."""
        with contextlib.suppress(OSError):
            self._requests.close()
        self._process.kill()
        self._process.wait()
        self._answers.close()


class _Parent:
    """The worker of which each connection is a fork, and the socket that asks it for one.

    Forks of this process share it, since each asks with one message.
    """

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        self._control.settimeout(START_SECONDS)
        try:
            with theirs:
                self._process = _started(worker.SOCKETS, theirs, subprocess.DEVNULL)
        except BaseException:
            self._control.close()
            raise

    def wait(self) -> None:
        """Wait until it can judge.

        Raises:
            OSError: It did not start.
        """
        # The message stays where it is, for the forks of this process that wait for it, too.
        if self._control.recv(len(worker.READY), socket.MSG_PEEK) != worker.READY:
            raise OSError("the process that judges answers did not start")

    def connect(self) -> _Connection:
        """A fork of it.

        Raises:
            OSError: It has died.
        """
        mine, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self._control, [b"f"], [theirs.fileno()])
        except OSError:
            mine.close()
            raise
        return _Connection(mine)

    def stop(self) -> None:
        """End it and wait for it, unless it belongs to the process of which this one is a fork."""
        self._control.close()
        self._process.kill()
        self._process.wait()

    def lend(self) -> None:
        """Leave its end to the process that started it, of which this process is a fork."""
        self._process.returncode = 0


def _started(way: str, requests: Any, answers: int) -> subprocess.Popen[bytes]:
    if not sys.executable:
        raise OSError("there is no Python to start")
    path = os.pathsep.join(os.path.abspath(part) for part in sys.path)  # noqa: PTH100
    return subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", "-m", worker.__name__, way],
        env={**os.environ, "PYTHONPATH": path},
        stdin=requests,
        stdout=answers,
        stderr=subprocess.DEVNULL,
        bufsize=0,
    )


class _Pool:
    """The workers of this process: each serves one thread at a time."""

    def __init__(self, parent: _Parent | None = None) -> None:
        self._free = threading.BoundedSemaphore(MOST_WORKERS)
        self._idle: list[_Connection | _Piped] = []
        self._starting = threading.Lock()
        self._parent = parent
        self._cannot_start = False

    def start(self) -> None:
        """Begin to start a worker, and wait for nothing; `judge` says what fails."""
        if worker.FORKS and importlib.util.find_spec("latex2sympy2_extended"):
            with self._starting, contextlib.suppress(OSError):
                self._parent = self._parent or _Parent()

    def judge(self, request: Sequence[Any]) -> bool | None:
        """A worker's verdict, or this process's own if there can be no worker.

        Raises:
            RefusedError: It would take too long.
        """
        with self._free:
            try:
                answer = self._asked(request)
            except EOFError:  # somebody killed the worker, and maybe all that wait: one more
                self._end_idle()
                try:
                    answer = self._asked(request)
                except EOFError:
                    answer = "refused"
        if answer == "refused":
            raise RefusedError
        return answer

    def _asked(self, request: Sequence[Any]) -> Any:
        try:
            asked = self._worker()
        except OSError:
            return self._own(request)
        try:
            answer = asked.judge(request)
        except BaseException as error:  # an interrupt, too, leaves it with an answer to give
            asked.stop()
            if isinstance(error, EOFError) and asked.late:
                return "refused"
            raise
        self._idle.append(asked)
        return answer

    def _worker(self) -> _Connection | _Piped:
        if self._cannot_start:
            raise OSError
        with self._starting:
            with contextlib.suppress(IndexError):
                return self._idle.pop()
            if not worker.FORKS:
                return _Piped()
            if self._parent:
                with contextlib.suppress(OSError):  # somebody killed it
                    return self._connection(self._parent)
                self._parent.stop()
            self._parent = _Parent()
            return self._connection(self._parent)

    def _connection(self, parent: _Parent) -> _Connection:
        parent.wait()
        return parent.connect()

    def _own(self, request: Sequence[Any]) -> Any:
        if not self._cannot_start:
            self._cannot_start = True
            _LOG.warning(
                "no process can be started to judge answers, so this one judges them, without a "
                "limit of time; allow it to start %s to have one",
                sys.executable or "Python",
            )
        return json.loads(worker.judged(json.dumps(request).encode()))

    def _end_idle(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().stop()

    def close(self) -> None:
        """End all workers that judge nothing."""
        self._end_idle()
        if self._parent:
            self._parent.stop()
            self._parent = None

    def forked(self) -> _Pool:
        """The pool of a process that was just forked: the same worker, but no open questions."""
        for idle in self._idle:
            if isinstance(idle, _Connection):
                idle.stop()
        if self._parent:
            self._parent.lend()
        return _Pool(self._parent)


_pool = _Pool()
_pool.start()


def _forked() -> None:
    global _pool
    _pool = _pool.forked()


def _at_exit() -> None:
    _pool.close()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
