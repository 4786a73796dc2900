"""Work that imports nothing heavy, so that workers for it start in a second."""

import os
import signal
import time


def worker_made(folder):
    """A state that says how often it was made, and by whom."""
    with (folder / f"made-{os.getpid()}").open("a") as file:
        file.write(".")
    return os.getpid()


def squared(pid, number):
    return pid, number * number


class NoRoomError(OSError):
    """An error with a type of its own."""


def failing(_state, task):
    raise NoRoomError(f"no room for {task}")


def dying(_state, _task):
    os.kill(os.getpid(), signal.SIGKILL)


class NeverStarted:
    """A worker on a machine that lacks something."""

    def __init__(self, *_):
        raise ImportError("no such library")

    def ready(self):
        """Never called."""


def nothing():
    """A state that takes no time to make."""


def slow(folder, _state, _task):
    """Say who works, then work for long."""
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(100)
