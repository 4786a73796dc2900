"""Built-in attention adapters: one file per way of attending.

They are found through the same entry point as anyone else's; `adapters/README.md` is the guide.
"""

from flowtracer_adapters.interface import InterfaceAdapter
from flowtracer_adapters.recurrent import RecurrentAdapter
from flowtracer_adapters.torch_sdpa import FalconAdapter, TorchAttentionAdapter
from flowtracer_adapters.weights import WeightsAdapter

ADAPTERS = (
    RecurrentAdapter(),
    FalconAdapter(),
    InterfaceAdapter(),
    TorchAttentionAdapter(),
    WeightsAdapter(),
)

__all__ = [
    "ADAPTERS",
    "FalconAdapter",
    "InterfaceAdapter",
    "RecurrentAdapter",
    "TorchAttentionAdapter",
    "WeightsAdapter",
]
