"""What is said where a package of an extra is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def comes_with(extra: str, wish: str) -> Iterator[None]:
    """Name the extra that holds a package, if an import inside does not find it.

    Raises:
        ModuleNotFoundError: `wish` needs a package that is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{wish} needs {error.name}; run: pip install 'flowtracer-plugin[{extra}]'",
            name=error.name,
        ) from error
