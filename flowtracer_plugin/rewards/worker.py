"""The process that judges answers where a judgement can be stopped.

It imports math-verify's parser once. Where the system can fork, `python -m
flowtracer_plugin.rewards.worker sockets` takes sockets from its standard input, and a fork serves
each. A fork of that fork judges, so that a judgement without end costs that fork alone. Elsewhere,
with `pipes`, it judges what comes from its standard input itself.

A request is a line, the JSON list of the right answer, what was said and how many seconds it may
compute. The answer is a line, too: `true`, `false`, `null`, or `"refused"` for what takes too long
or too much memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys

from flowtracer_plugin.rewards.algebra import TooHugeError
from flowtracer_plugin.rewards.judge import equal_answers

SECONDS = 0.3
"""How long one judgement may compute: of a core where the system can fork, else on the clock."""
MEMORY = 2**30
"""Bytes of address space that a judging process may use."""
FORKS = hasattr(os, "fork")
"""Whether this system can fork."""
SOCKETS, PIPES = "sockets", "pipes"
READY, REFUSED = b"ready\n", b'"refused"\n'

_WARM_UP = ("x^{2} + \\frac{\\sqrt{3}}{2}", "\\sin(2 x) + e^{x} - 3.5 \\pi"), ("x < 3", "2x < 6")


def patience(seconds: float) -> float:
    """How many seconds on the clock a judgement may take that may compute `seconds`.

    A fork counts the time of its core and ends itself, so this wait is for one that stands still,
    and is long: on a busy machine an easy judgement must not be refused. What cannot fork has no
    other limit than this one.
    """
    return 5.0 * seconds + 2.0 if FORKS else 1.25 * seconds + 0.1


def judged(request: bytes) -> bytes:
    """The answer to one request, as a line of JSON."""
    gold, said, _ = json.loads(request)
    try:
        verdict = equal_answers(gold, said)
    except (TooHugeError, MemoryError, RecursionError, OverflowError):
        return REFUSED
    return json.dumps(verdict).encode() + b"\n"


class ForkedJudge:
    """A fork of this process that judges, and that is replaced when it takes too long."""

    def __init__(self) -> None:
        self.pid = 0
        self._requests = self._answers = -1

    def judge(self, request: bytes) -> bytes:
        """The fork's answer, or `REFUSED` if it takes too long or dies."""
        if not self.pid:
            self._start()
        os.write(self._requests, request)
        answer, wait = b"", patience(json.loads(request)[2])
        while not answer.endswith(b"\n"):
            if not select.select([self._answers], [], [], wait)[0]:
                break
            part = os.read(self._answers, 65536)
            if not part:
                break
            answer += part
        if answer.endswith(b"\n"):
            return answer
        self.stop()
        return REFUSED

    def stop(self) -> None:
        """Kill the fork, if there is one, and wait for its end."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self._requests)
            os.close(self._answers)
            self.pid = 0

    def _start(self) -> None:
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(requests)
            os.close(answers)
            return
        try:
            os.close(self._requests)
            os.close(self._answers)
            _judge_all(requests, answers)
        finally:
            os._exit(0)


def _judge_all(requests: int, answers: int) -> None:
    import resource

    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with os.fdopen(requests, "rb") as lines:
        for line in lines:
            signal.setitimer(signal.ITIMER_PROF, json.loads(line)[2])
            answer = judged(line)
            signal.setitimer(signal.ITIMER_PROF, 0)
            os.write(answers, answer)


def serve(connection: socket.socket) -> None:
    """Answer each request that comes over a socket, until there are no more."""
    fork = ForkedJudge()
    with connection.makefile("rb") as requests:
        for line in requests:
            connection.sendall(fork.judge(line))
    fork.stop()


def serve_sockets(control: socket.socket) -> None:
    """Fork for each socket that comes over another one, and serve it there."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the forks that have ended need no wait
    while True:
        _, found, *_ = socket.recv_fds(control, 1, 1)
        if not found:
            return
        if not os.fork():
            try:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                control.close()
                serve(socket.socket(fileno=found[0]))
            finally:
                os._exit(0)
        os.close(found[0])


def main() -> None:
    """Serve standard input, with nothing else on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    for pair in _WARM_UP:  # the parser learns its grammar as it reads
        equal_answers(*pair)
    if sys.argv[1:] == [SOCKETS]:
        with socket.socket(fileno=0) as control:
            control.sendall(READY)
            serve_sockets(control)
        return
    with os.fdopen(os.dup(1), "wb", buffering=0) as answers:
        os.dup2(2, 1)
        answers.write(READY)
        for line in sys.stdin.buffer:
            answers.write(judged(line))


if __name__ == "__main__":
    main()
