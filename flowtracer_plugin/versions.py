"""Which versions of the libraries underneath work, asked before anything of them is used."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

WINDOW: Mapping[str, str] = {
    "nnsight": ">=0.8,<0.9",
    "torch": ">=2.6,<2.16",
    "transformers": ">=5.21,<5.25",
}
"""What the tests have passed with, from the lowest to the highest: `docs/versions.md`."""

ANY_VERSION = "FLOWTRACER_ANY_VERSION"
"""The environment variable that lets other versions pass, with a warning, if it is 1."""


class UnsupportedVersionError(RuntimeError):
    """A library is installed in a version that this package was not tested with."""


def fits(found: str, wanted: str) -> bool:
    """Whether a version is in a window.

    Builds such as `2.13.0+cpu` count as their release. A development build counts as what it leads
    to: one of 5.24.1 fits below 5.25, one of 5.25.0 does not.
    """
    try:
        return SpecifierSet(wanted).contains(Version(found), prereleases=True)
    except InvalidVersion:
        return False


@cache
def check_versions() -> None:
    """Raise unless every library is in its window. Asked once per process.

    Raises:
        UnsupportedVersionError: One is not, and the environment variable is not set.
    """
    found = {name: _installed(name) for name in WINDOW}
    outside = [name for name, have in found.items() if not have or not fits(have, WINDOW[name])]
    if not outside:
        return
    listed = "; ".join(
        f"wanted {name}{WINDOW[name]}, found {found[name] or 'none'}" for name in outside
    )
    if os.environ.get(ANY_VERSION) == "1":
        warnings.warn(f"untested versions, as {ANY_VERSION}=1 allows: {listed}", stacklevel=2)
        return
    install = " ".join(f"'{name}{WINDOW[name]}'" for name in outside)
    raise UnsupportedVersionError(
        f"{listed}; run: pip install {install}, or set the environment variable {ANY_VERSION}=1 "
        "to try what is installed"
    )


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
