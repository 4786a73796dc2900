"""Trace which tokens carried a language model's answer, and train on them.

Names load on first use: `import flowtracer_plugin` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowtracer_plugin.answers import find_answer
    from flowtracer_plugin.attention import (
        AdapterMismatchError,
        AttentionAdapter,
        AttentionCall,
        AttentionSite,
        NoAttentionError,
        UnsupportedArchitectureError,
        register_adapter,
    )
    from flowtracer_plugin.credit import token_credit
    from flowtracer_plugin.document import json_schema
    from flowtracer_plugin.flow import Flow, solve_flow, solve_graph
    from flowtracer_plugin.graph import FlowGraph
    from flowtracer_plugin.memory import MemoryEstimate, TooLittleMemoryError
    from flowtracer_plugin.options import FlowOptions
    from flowtracer_plugin.rollouts import FlowBatch
    from flowtracer_plugin.spans import AnswerNotFoundError
    from flowtracer_plugin.storage import load
    from flowtracer_plugin.trace import FlowTrace
    from flowtracer_plugin.tracer import FlowTracer, wrap

__version__ = "0.1.0"

_HOMES = {
    "AdapterMismatchError": "attention",
    "AnswerNotFoundError": "spans",
    "AttentionAdapter": "attention",
    "AttentionCall": "attention",
    "AttentionSite": "attention",
    "Flow": "flow",
    "FlowBatch": "rollouts",
    "FlowGraph": "graph",
    "FlowOptions": "options",
    "FlowTrace": "trace",
    "FlowTracer": "tracer",
    "MemoryEstimate": "memory",
    "NoAttentionError": "attention",
    "TooLittleMemoryError": "memory",
    "UnsupportedArchitectureError": "attention",
    "find_answer": "answers",
    "json_schema": "document",
    "load": "storage",
    "register_adapter": "attention",
    "solve_flow": "flow",
    "solve_graph": "flow",
    "token_credit": "credit",
    "wrap": "tracer",
}

__all__ = [
    "AdapterMismatchError",
    "AnswerNotFoundError",
    "AttentionAdapter",
    "AttentionCall",
    "AttentionSite",
    "Flow",
    "FlowBatch",
    "FlowGraph",
    "FlowOptions",
    "FlowTrace",
    "FlowTracer",
    "MemoryEstimate",
    "NoAttentionError",
    "TooLittleMemoryError",
    "UnsupportedArchitectureError",
    "__version__",
    "find_answer",
    "json_schema",
    "load",
    "register_adapter",
    "solve_flow",
    "solve_graph",
    "token_credit",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
