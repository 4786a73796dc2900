"""Which TRL works, asked before anything of it is imported: other releases fail in their words."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from flowtracer_plugin.versions import fits

WANTED = ">=1.16,<1.17"
INSTALL = "run: pip install 'flowtracer-plugin[trl]'"


def check_trl() -> None:
    """Raise unless a TRL is installed whose trainers are known to work.

    Raises:
        ModuleNotFoundError: There is no TRL.
        ImportError: It is another release.
    """
    try:
        installed = version("trl")
    except PackageNotFoundError:
        raise ModuleNotFoundError(
            f"flowtracer_plugin.grpo.trainer needs TRL; {INSTALL}", name="trl"
        ) from None
    if not fits(installed, WANTED):
        raise ImportError(f"flow credit needs trl{WANTED}, and {installed} is installed; {INSTALL}")
