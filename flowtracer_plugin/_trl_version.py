"""Which TRL works, asked before anything of it is imported: other releases fail in their words."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

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
            f"flowtracer_plugin.grpo needs TRL; {INSTALL}", name="trl"
        ) from None
    if not Version("1.16") <= Version(installed) < Version("1.17"):
        raise ImportError(
            f"flow credit needs trl>=1.16,<1.17, and {installed} is installed; {INSTALL}"
        )
