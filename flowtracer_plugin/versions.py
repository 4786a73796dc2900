"""The supported versions of the libraries, and their check before first use."""

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
"""The versions with which the tests have passed: see `docs/versions.md`."""

ANY_VERSION = "FLOWTRACER_ANY_VERSION"
"""If this environment variable is 1, other versions cause a warning and not an error."""


class UnsupportedVersionError(RuntimeError):
    """The installed version of a library was not tested with this package."""


def fits(found: str, wanted: str) -> bool:
    """Whether the version `found` is among those that `wanted` allows.

    A build such as `2.13.0+cpu` counts as its release, and a development build as the release that
    it precedes: `<5.25` allows a development build of 5.24.1, but not one of 5.25.0.
    """
    try:
        return SpecifierSet(wanted).contains(Version(found), prereleases=True)
    except InvalidVersion:
        return False


@cache
def check_versions() -> None:
    """Check the versions of all libraries, once per process.

    Raises:
        UnsupportedVersionError: A version is not supported, and the environment variable is not 1.
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
