"""The check of the installed TRL release, which runs before anything of TRL is imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from flowtracer_plugin.extras import install
from flowtracer_plugin.versions import fits

WANTED = ">=1.16,<1.17"
INSTALL = f"run: {install('trl')}"


def check_trl() -> None:
    """Refuse a TRL whose trainers are not known to work.

    Raises:
        ModuleNotFoundError: TRL is not installed.
        ImportError: Another release is installed.
    """
    try:
        installed = version("trl")
    except PackageNotFoundError:
        raise ModuleNotFoundError(
            f"flowtracer_plugin.grpo needs TRL; {INSTALL}", name="trl"
        ) from None
    if not fits(installed, WANTED):
        raise ImportError(f"flow credit needs trl{WANTED}, and {installed} is installed; {INSTALL}")
