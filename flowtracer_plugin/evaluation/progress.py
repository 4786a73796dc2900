"""How far a long run is, and how long the rest will take: a bar, or a line for each step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from tqdm import tqdm

Say = Callable[[str], object]
"""Is called with a line of text."""

Tick = Callable[[int], object]
"""Is called with the number of steps that were just done."""


class Progress:
    """Shows the steps of a run. After the first one it says how long the whole will take.

    In a terminal there is a bar, and a line after the first step; elsewhere a line for each step.

    Args:
        unit: What a step is called, such as `"example"`.
        total: Number of all steps.
        done: How many of them an earlier run has done.
        progress: Show a bar, as a terminal can.
        say: Gets the lines where there is no bar; without it there are none.
        clock: The time in seconds.
    """

    def __init__(
        self,
        unit: str,
        total: int,
        *,
        done: int = 0,
        progress: bool = False,
        say: Say | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._unit, self._total, self._before, self._done = unit, total, done, done
        self._clock, self._began, self._say = clock, clock(), say
        self._bar: tqdm[Any] = tqdm(
            total=total, initial=done, unit=unit, disable=not progress, dynamic_ncols=True
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, result: str) -> None:
        """Count a step that has come to a result, such as `"row 3 measured"`."""
        self._done += 1
        fresh, passed = self._done - self._before, self._clock() - self._began
        left = (self._total - self._done) * passed / fresh
        line = (
            f"{self._unit} {self._done} of {self._total}: {result}; {_time(passed)} so far, about "
            f"{_time(left)} left"
        )
        self._bar.update()
        if self._bar.disable:
            if self._say is not None:
                self._say(line)
        elif fresh == 1:
            self._bar.write(line, file=self._bar.fp)

    @contextmanager
    def inner(self, unit: str, total: int) -> Iterator[Tick]:
        """A second bar for the parts of one step, by `inner_bar`."""
        with inner_bar(unit, total, shown=not self._bar.disable) as tick:
            yield tick


@contextmanager
def inner_bar(unit: str, total: int, *, shown: bool) -> Iterator[Tick]:
    """A bar that disappears when its work is done, for as long as the `with` block runs."""
    with tqdm(total=total, unit=unit, leave=False, dynamic_ncols=True, disable=not shown) as bar:
        yield bar.update


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
