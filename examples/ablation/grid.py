"""Runs in worker processes, one file each; a run whose file exists is not made again."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from examples.ablation.plan import ARMS, TASKS, TUNED, Plan
from flowtracer_plugin.files import write_atomically

Stage = Literal["tune", "gate", "compare"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What identifies a run of a task's recipe.

    The learning rate is the tuned one, without the arm's factor.
    """

    task: str
    stage: Stage
    arm: str
    seed: int
    learning_rate: float

    def file(self, folder: Path) -> Path:
        name = f"{self.arm}-{self.learning_rate:g}-{self.seed}.json"
        return folder / self.task / self.stage / name


def run_all(runs: Sequence[Run], plan: Plan, folder: Path, workers: int) -> list[dict[str, Any]]:
    """The records of the runs; missing ones are made first.

    Raises:
        RuntimeError: A worker died.
    """
    missing = [run for run in runs if not run.file(folder).exists()]
    title = f"{runs[0].task}: {runs[0].stage}" if runs else None
    with tqdm(total=len(runs), initial=len(runs) - len(missing), desc=title, unit="run") as bar:
        for _ in _made(missing, plan, folder, workers):
            bar.update()
    return [json.loads(run.file(folder).read_text()) for run in runs]


def _made(runs: Sequence[Run], plan: Plan, folder: Path, workers: int) -> Iterator[Run]:
    # "spawn": torch's threads do not survive a fork
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=quiet) as pool:
        waiting = {pool.submit(make, run, plan, folder): run for run in runs}
        try:
            for done in as_completed(waiting):
                _raise_error(done, waiting[done])
                yield waiting[done]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _raise_error(done: Future[None], run: Run) -> None:
    """Raise the run's error, if there was one, with what to do or the run's name."""
    error = done.exception()
    if isinstance(error, BrokenProcessPool):
        raise RuntimeError(
            "a worker process died; if it printed no error above, it probably ran out of memory. "
            "The same command continues where this one stopped: try it with fewer --workers"
        ) from error
    if error is not None:
        error.add_note(f"in {run}")
        raise error


def quiet() -> None:
    """Silence libraries, and use one thread: on a model this small, threads wait for each other."""
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")


def make(run: Run, plan: Plan, folder: Path) -> None:
    """Make one run, and write its record to its file."""
    from examples.ablation.runs import rewards_of

    began = time.perf_counter()
    rewards = rewards_of(
        TASKS[run.task],
        next(arm for arm in (*ARMS, *TUNED) if arm.name == run.arm),
        plan,
        seed=run.seed,
        learning_rate=run.learning_rate,
        start=start_of(run.task, folder),
    )
    record = {
        **asdict(run),
        "rewards": [round(reward, 6) for reward in rewards],
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_atomically(run.file(folder), json.dumps(record, allow_nan=False).encode() + b"\n")


def start_of(task: str, folder: Path) -> Path:
    """The folder of the policy that all runs of a task start from."""
    return folder / task / "start"
