"""The error for a missing package that comes with an extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def comes_with(extra: str, wish: str) -> Iterator[None]:
    """A context whose ModuleNotFoundError names the extra that installs the missing package.

    `wish` names the feature that needs the package.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{wish} needs {error.name}; run: pip install 'flowtracer-plugin[{extra}]'",
            name=error.name,
        ) from error
