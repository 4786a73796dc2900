"""Workers on Ray, which is started on this machine alone, or runs already, on one or many."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple

from flowtracer_plugin.extras import comes_with

with comes_with("ray", "the engine ray"):
    import ray
    from ray._private import ray_constants, worker as ray_worker
    from ray.exceptions import RayError, RayTaskError

logger = logging.getLogger(__name__)

TRIES = 4
"""How often a task is begun, which may kill workers by its need of memory; and how often workers
may fail to start before none takes their place."""

PATIENCE = 60
"""Seconds without any worker after which a log line says what is waited for."""

_ANSWER = 10
"""Seconds in which the address of a cluster must answer."""

_STORE = 200_000_000
"""Bytes of shared memory of a Ray that is started here; what is larger goes to the disk."""

_TOKEN = token_hex(32)
"""What one must know to give the workers tasks; Ray would write a token to the home folder."""


@contextmanager
def open_actors(
    make: Callable[[], Any], workers: int, gpus_per_worker: float, address: str | None
) -> Iterator[_Actors]:
    """A pool of actors, as `engines.open_pool`."""
    with _connected(workers, address) as threads:
        _check_room(workers, gpus_per_worker, growing=_address(address) is not None)
        remote: Any = ray.remote  # whose types know no classes
        kind = remote(num_cpus=1, num_gpus=gpus_per_worker)(_Worker)
        actors = _Actors(partial(kind.remote, str(Path.cwd()), threads), workers, make)
        try:
            yield actors
        finally:
            actors.end()


@contextmanager
def _connected(workers: int, address: str | None) -> Iterator[int | None]:
    """A connection to Ray. The value is how many threads a worker gets; None is Ray's choice."""
    if ray.is_initialized():
        if address is not None:
            raise ValueError(
                "this process is connected to Ray already, and its workers would run there: leave "
                "the address out, or call ray.shutdown() before"
            )
        yield None
    elif (there := _address(address)) is not None:
        with _silent():
            try:
                _check_answers(there)
                ray.init(address=there, log_to_driver=False, logging_level=logging.ERROR)
            except OSError as error:
                raise ConnectionError(
                    f"there is no Ray at {there!r}: {error}; ray start --head starts one, and this "
                    "must run on a machine of its cluster"
                ) from error
            try:
                yield None
            finally:
                ray.shutdown()
    else:
        with _local(workers):
            import torch

            yield max(1, torch.get_num_threads() // workers)


def _check_answers(address: str) -> None:
    """Check that somebody listens at an address such as 10.0.0.1:6379; Ray would try for minutes.

    Raises:
        OSError: Nobody does.
    """
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()


def _address(address: str | None) -> str | None:
    """The address that was given, or the one that Ray's own commands set for what they start."""
    return address or os.environ.get("RAY_ADDRESS") or None


@contextmanager
def _local(workers: int) -> Iterator[None]:
    """A Ray of this machine alone, with its files in a temporary folder."""
    place = tempfile.gettempdir()
    if len(place) > 25 and os.name == "posix":  # the paths of sockets have at most 103 bytes
        place = "/tmp"
    with (
        tempfile.TemporaryDirectory(prefix="ray-", dir=place, ignore_cleanup_errors=True) as folder,
        _private(),
        _silent(),
    ):
        try:
            # Ray replaces the address 127.0.0.1 by one that others can reach, unless this is off.
            with _changed(ray_constants, "ENABLE_RAY_CLUSTER", False):
                ray.init(
                    address="local",
                    num_cpus=workers,
                    include_dashboard=False,
                    object_store_memory=_STORE,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=folder,
                )
            yield
        finally:
            ray.shutdown()


@contextmanager
def _private() -> Iterator[None]:
    """Settings for what Ray starts, without those that the user has set; the old ones come back."""
    before = dict(os.environ)
    os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_TOKEN": _TOKEN, **before})
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            if name.startswith("RAY_") or name == "PYTHONBREAKPOINT":  # Ray sets it for workers
                del os.environ[name]


def _silent() -> Any:
    """Without what Ray prints to standard output, where results go."""
    return _changed(ray_worker, "_worker_logs_enabled", False)


@contextmanager
def _changed(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _check_room(workers: int, gpus_per_worker: float, *, growing: bool) -> None:
    """Check that all workers can start, so that nobody waits for what never comes."""
    cluster: Any = ray  # whose functions are not all typed
    have = cluster.cluster_resources()
    for kind, wanted in (("CPU", workers), ("GPU", workers * gpus_per_worker)):
        found = have.get(kind, 0)
        if wanted <= found:
            continue
        said = f"{workers} workers need {wanted:g} {kind}s, and Ray has {found:g}"
        if not growing:
            raise ValueError(f"{said}: take fewer workers, or less than a GPU for each")
        logger.warning("%s; the others start if the cluster grows", said)


class _Worker:
    """The process of a worker.

    Args:
        folder: The folder from which the names of files count.
        threads: How many threads PyTorch uses; None for as many as Ray has set.
    """

    def __init__(self, folder: str, threads: int | None) -> None:
        if Path(folder).is_dir():
            os.chdir(folder)
        if threads is not None:
            import torch

            torch.set_num_threads(threads)

    def ready(self) -> None:
        """Answer once the process runs."""

    def call(self, make: Callable[[], Any], do: Callable[[Any, Any], Any], task: Any) -> Any:
        """The result of a task."""
        if not hasattr(self, "_state"):
            self._state = make()
        return do(self._state, task)


class _Job(NamedTuple):
    task: Any
    tries: int


class _Jobs:
    """Tasks in their order; those that are put back come first."""

    def __init__(self, tasks: Iterable[Any]) -> None:
        self._tasks, self._again = iter(tasks), deque[_Job]()

    def take(self) -> _Job | None:
        """The next one, if there is any."""
        if self._again:
            return self._again.popleft()
        return next((_Job(task, 1) for task in self._tasks), None)

    def put_back(self, job: _Job, error: RayError) -> None:
        """Have a task done again, whose worker died with this error."""
        if job.tries == TRIES:
            raise RuntimeError(
                f"{TRIES} workers have died in the same place, as they do when memory runs out; "
                "what is in files is kept: run the same command again, perhaps with fewer workers "
                "or a smaller batch size"
            ) from error
        self._again.append(_Job(job.task, job.tries + 1))


class _Actors:
    """Actors, each of which has one task at a time.

    Another actor takes the place of one that dies, and its task is done again by whichever is free
    first, so that nothing waits for a machine that is gone, as Ray's own retries would.
    """

    def __init__(self, start: Callable[[], Any], workers: int, make: Callable[[], Any]) -> None:
        self._start, self._make = start, ray.put(make)
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._busy: dict[Any, tuple[Any, _Job]] = {}
        self._failed, self._patient = 0, True
        for _ in range(workers):
            self._add()

    def _add(self) -> None:
        actor = self._start()
        self._starting[actor.ready.remote()] = actor

    def end(self) -> None:
        """End all actors, whatever they do."""
        for actor in [
            *self._idle,
            *self._starting.values(),
            *(one for one, _ in self._busy.values()),
        ]:
            ray.kill(actor)

    def run(self, do: Callable[[Any, Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        jobs, held = _Jobs(tasks), ray.put(do)
        job = jobs.take()
        while job is not None or self._busy:
            while job is not None and self._idle:
                actor = self._idle.pop()
                self._busy[actor.call.remote(self._make, held, job.task)] = actor, job
                job = jobs.take()
            for answer in self._answers(waiting=job is not None):
                if answer in self._starting:
                    self._greet(answer)
                    continue
                actor, finished = self._busy.pop(answer)
                try:
                    result = ray.get(answer)
                except RayTaskError as error:
                    self._idle.append(actor)
                    raise error.cause from error
                except RayError as error:
                    ray.kill(actor)  # it may only be out of reach
                    self._add()
                    jobs.put_back(finished, error)
                else:
                    self._idle.append(actor)
                    yield result
            job = job or jobs.take()

    def _answers(self, *, waiting: bool) -> list[Any]:
        """Which calls are answered; those of new actors count if a task is waiting."""
        asked = [*self._busy, *(self._starting if waiting else ())]
        while True:
            answers, _ = ray.wait(asked, timeout=PATIENCE)
            if answers:
                return list(answers)
            if self._patient and not self._busy:
                self._patient = False
                logger.warning("no worker has started yet: Ray has no CPU or GPU free for one")

    def _greet(self, answer: Any) -> None:
        """Count an actor as idle, or have another take its place if it could not be started."""
        actor = self._starting.pop(answer)
        try:
            ray.get(answer)
        except RayError as error:
            self._failed += 1
            if self._failed < TRIES:
                self._add()
            elif not (self._idle or self._starting or self._busy):
                reason = str(error).strip().splitlines()[-1]
                raise RuntimeError(f"no worker can be started on Ray: {reason}") from error
        else:
            self._idle.append(actor)
