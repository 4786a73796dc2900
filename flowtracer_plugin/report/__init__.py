"""What people look at: pages, figures, the notebook cell and the terminal view."""

from importlib import import_module
from typing import Any

import lazy_loader

from flowtracer_plugin.moved import warn

_attached, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name in ("render_evaluation", "write_evaluation"):
        home = "flowtracer_plugin.evaluation"
        warn(f"{__name__}.{name}", f"{home}.{name}", level=3)
        return getattr(import_module(home), name)
    return _attached(name)
