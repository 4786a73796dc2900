"""The error for a missing package that comes with an extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def install(extra: str) -> str:
    """The commands that install an extra, without and with the tested versions of a clone."""
    tested = "constraints-app.txt" if extra == "app" else "constraints.txt"
    return (
        f"pip install 'flowtracer-plugin[{extra}]', or in a clone: "
        f"pip install -c {tested} '.[{extra}]'"
    )


@contextmanager
def comes_with(extra: str, wish: str) -> Iterator[None]:
    """A context whose ModuleNotFoundError names the extra that installs the missing package.

    `wish` names the feature that needs the package.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{wish} needs {error.name}; run: {install(extra)}", name=error.name
        ) from error
