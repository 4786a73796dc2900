"""Is there a CUDA build of torch that `make gpu` must not replace, and can it be used?

`make gpu` asks before it installs anything, so only Python and pip are there. What is printed is a
constraint for pip: the version that stays, or nothing if there is no CUDA build.

    .venv-gpu/bin/python -m benchmarks.found_torch
"""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def main() -> None:
    found, cuda = installed()
    if cuda is None:
        return
    if refusal := refused(found, cuda, wanted()):
        sys.exit(refusal)
    print(f"torch=={found}")


def installed() -> tuple[str, str | None]:
    """The version of torch that can be imported here, and the version of CUDA that it is for."""
    try:
        import torch
    except ImportError:
        return "", None
    # What pip compares, which for some builds is not `torch.__version__`.
    return version("torch"), torch.version.cuda


def wanted() -> str:
    """The versions of torch that this package works with."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    needed = [Requirement(line) for line in project["dependencies"]]
    return next(str(one.specifier) for one in needed if one.name == "torch")


def refused(found: str, cuda: str, wanted: str) -> str | None:
    """Why pip would replace this torch, and what to do; None if it would not.

    Args:
        found: The version of torch.
        cuda: The version of CUDA that it is for.
        wanted: The versions that are wanted, as pip writes them.
    """
    # As pip does with what is installed, early builds of a version count as versions.
    if Requirement(f"torch{wanted}").specifier.contains(found, prereleases=True):
        return None
    return (
        f"found torch {found} for CUDA {cuda}, wanted torch{wanted}, and pip would install another "
        "torch in its place: install a CUDA build of such a version "
        "(https://pytorch.org/get-started), in an environment of its own if you need the one "
        "that is there, and run `make gpu PYTHON=ENVIRONMENT/bin/python`"
    )


if __name__ == "__main__":
    main()
