"""Built-in attention adapters: one file per way of attending.

They are found through the same entry point as anyone else's; `adapters/README.md` is the guide.
"""

from flowtracer_adapters.interface import InterfaceAdapter
from flowtracer_adapters.recurrent import RecurrentAdapter

ADAPTERS = (RecurrentAdapter(), InterfaceAdapter())

__all__ = ["ADAPTERS", "InterfaceAdapter", "RecurrentAdapter"]
