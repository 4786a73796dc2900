"""Built-in attention adapters: one file per way of attending.

They are registered through the same entry point as other people's: see `adapters/README.md`.
"""

from flowtracer_adapters.compressed import CompressedAdapter
from flowtracer_adapters.hrm import RecurrentDepthAdapter
from flowtracer_adapters.interface import InterfaceAdapter
from flowtracer_adapters.output_sinks import OutputSinkAdapter
from flowtracer_adapters.recurrent import RecurrentAdapter
from flowtracer_adapters.reformer import ReformerAdapter
from flowtracer_adapters.refused import RefusedAdapter
from flowtracer_adapters.torch_sdpa import FalconAdapter, TorchAttentionAdapter
from flowtracer_adapters.weights import WeightsAdapter

ADAPTERS = (
    RecurrentAdapter(),
    RefusedAdapter(),
    CompressedAdapter(),
    FalconAdapter(),
    OutputSinkAdapter(),
    RecurrentDepthAdapter(),
    ReformerAdapter(),
    InterfaceAdapter(),
    TorchAttentionAdapter(),
    WeightsAdapter(),
)

__all__ = [
    "ADAPTERS",
    "CompressedAdapter",
    "FalconAdapter",
    "InterfaceAdapter",
    "OutputSinkAdapter",
    "RecurrentAdapter",
    "RecurrentDepthAdapter",
    "ReformerAdapter",
    "RefusedAdapter",
    "TorchAttentionAdapter",
    "WeightsAdapter",
]
