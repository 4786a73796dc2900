"""Troubles that end no run: they are logged once, and then counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from logging import Logger

AGAIN = (100, 10_000, 1_000_000)
"""How often a trouble has come when it is logged again."""


class Troubles:
    """Logs the first trouble of each kind with its error, and later ones only as a number.

    Args:
        logger: Receives a warning for the first trouble of a kind, and for some of the later ones.
    """

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, message: str, error: BaseException, *, kind: str | None = None) -> None:
        """Count a trouble, and log it if it is new; its kind is by default its message."""
        name = kind or message, type(error).__name__
        self._counts[name] += 1
        count = self._counts[name]
        if count == 1:
            self._logger.warning(
                "%s; the run goes on, and further troubles of this kind are counted",
                message,
                exc_info=error,
            )
        elif count in AGAIN:
            self._logger.warning("%s; this has happened %d times", message, count, exc_info=error)

    @contextmanager
    def caught(self, message: str, *, kind: str | None = None) -> Iterator[None]:
        """Run what only shows something: whatever it raises is a trouble, and ends nothing."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - what only shows must never end a run
            self.add(message, error, kind=kind)
