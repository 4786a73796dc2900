"""Who works: this process, several processes of this machine, or workers on Ray.

Work is a function of a state, such as a loaded model, and a task. A worker makes its state once,
with its first task.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from threading import Thread
from typing import Any, Protocol, TypeVar

ENGINES = ("processes", "ray")
"""Processes of this machine, or Ray."""

State = TypeVar("State")
StateOut = TypeVar("StateOut", covariant=True)
Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """Who works.

    Attributes:
        name: `"processes"`, on this machine, or `"ray"`.
        workers: How many. One of `"processes"` is this process.
        gpus_per_worker: GPUs that Ray gives each worker; two workers share a GPU with 0.5.
        address: A running Ray cluster, such as `"auto"` or `"10.0.0.1:6379"`. Without one the
            Ray to which the process is connected is used, else one is started on this machine.
    """

    name: str = "processes"
    workers: int = 1
    gpus_per_worker: float = 0.0
    address: str | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: There is no such engine, a number is out of range, or an option is for Ray.
            ModuleNotFoundError: Ray is missing; the extra `ray` installs it.
        """
        if self.name not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {self.name!r}")
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers!r}")
        if self.gpus_per_worker < 0:
            raise ValueError(f"gpus_per_worker must be at least 0, got {self.gpus_per_worker!r}")
        if self.name == "ray":
            from flowtracer_plugin.bulk import ray_actors  # noqa: F401 - says now what is missing
        elif self.gpus_per_worker or self.address is not None:
            raise ValueError(
                "gpus_per_worker and address are for Ray: set engine='ray', or leave them out"
            )

    @property
    def here(self) -> bool:
        """Whether this process itself works; what it gets need not be pickled."""
        return self.name == "processes" and self.workers == 1


class Pool(Protocol[StateOut]):
    """Workers that keep their states from run to run."""

    def run(
        self, do: Callable[[StateOut, Task], Result], tasks: Iterable[Task]
    ) -> Iterator[Result]:
        """The result of each task, in the order in which they get done.

        Few tasks are taken from `tasks` before they are needed. An error of a task is raised here.

        Raises:
            RuntimeError: Workers died, more often than they are replaced.
        """


@contextmanager
def open_pool(make: Callable[[], State], engine: Engine) -> Iterator[Pool[State]]:
    """A pool of workers, which end with the context.

    Args:
        make: Makes the state of a worker; it is pickled, as are functions, tasks and results,
            unless `engine.here`.
        engine: Who works.

    Raises:
        ValueError: Ray has fewer GPUs than were asked for.
        ConnectionError: There is no Ray at the address.
    """
    if engine.here:
        yield _Here(make)
    elif engine.name == "ray":
        from flowtracer_plugin.bulk.ray_actors import open_actors

        with open_actors(make, engine.workers, engine.gpus_per_worker, engine.address) as actors:
            yield actors
    else:
        with _Processes.started(make, engine.workers) as processes:
            yield processes


def run_tasks(
    make: Callable[[], State],
    do: Callable[[State, Task], Result],
    tasks: Iterable[Task],
    *,
    engine: Engine,
) -> Iterator[Result]:
    """The results of tasks, by a pool that is opened for them alone."""
    with open_pool(make, engine) as pool:
        yield from pool.run(do, tasks)


class _Held:
    """A state that is made when it is first asked for."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def get(self) -> Any:
        if not hasattr(self, "_state"):
            self._state = self._make()
        return self._state


class _Here:
    """This process as a pool."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._held = _Held(make)

    def run(self, do: Callable[[Any, Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        for task in tasks:
            yield do(self._held.get(), task)


class _Processes:
    """Processes of this machine as a pool."""

    def __init__(self, pool: ProcessPoolExecutor, workers: int) -> None:
        self._pool, self._workers = pool, workers

    @classmethod
    @contextmanager
    def started(cls, make: Callable[[], Any], workers: int) -> Iterator[_Processes]:
        import torch

        threads = max(1, torch.get_num_threads() // workers)
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, spawn, initializer=_begin, initargs=(make, threads))
        try:
            yield cls(pool, workers)
        finally:
            pool.shutdown(cancel_futures=True)

    def run(self, do: Callable[[Any, Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        given = iter(tasks)
        try:
            # Few tasks wait in the queue, so that those of all are not in memory at once.
            waiting = self._submitted(do, given, self._workers + 1)
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
                waiting |= self._submitted(do, given, len(done))
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process has died, as it does when it is killed or memory runs out; what "
                "is in files is kept: run the same command again, perhaps with fewer workers"
            ) from error

    def _submitted(
        self, do: Callable[[Any, Any], Any], tasks: Iterator[Any], count: int
    ) -> set[Future[Any]]:
        return {self._pool.submit(_call, do, task) for task in islice(tasks, count)}


class _Process:
    """What a worker process holds."""

    held: _Held


def _begin(make: Callable[[], Any], threads: int) -> None:
    import torch

    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _Process.held = _Held(make)  # made later: errors here would only say that the process has died


def _end_with_parent() -> None:
    """End this process once the one that started it has ended, as after kill -9."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(do: Callable[[Any, Any], Any], task: Any) -> Any:
    return do(_Process.held.get(), task)
