"""Trace which tokens carried a language model's answer, and train on them.

Names load on first use: `import flowtracer_plugin` loads neither torch nor transformers.
"""

import sys

import lazy_loader

from flowtracer_plugin.moved import MovedModules

__version__ = "0.1.0"

__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
sys.meta_path.append(MovedModules())


def __dir__() -> list[str]:
    return __all__
