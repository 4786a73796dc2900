from .attention.adapter import (
    AdapterMismatchError as AdapterMismatchError,
    AttentionAdapter as AttentionAdapter,
    AttentionCall as AttentionCall,
    AttentionSite as AttentionSite,
    NoAttentionError as NoAttentionError,
    UnsupportedArchitectureError as UnsupportedArchitectureError,
    register_adapter as register_adapter,
)
from .bulk.compared import compare_results as compare_results
from .bulk.data_set import trace_dataset as trace_dataset
from .bulk.tables import read_results as read_results
from .bulk.tracing import trace_many as trace_many
from .credit.weights import token_credit as token_credit
from .flow.graph import FlowGraph as FlowGraph
from .flow.solve import Flow as Flow, solve_flow as solve_flow, solve_graph as solve_graph
from .options import FlowOptions as FlowOptions
from .result.document import json_schema as json_schema
from .text.answers import find_answer as find_answer
from .text.spans import AnswerNotFoundError as AnswerNotFoundError
from .trace.flow_trace import FlowTrace as FlowTrace, load as load
from .trace.memory import (
    MemoryEstimate as MemoryEstimate,
    TooLittleMemoryError as TooLittleMemoryError,
)
from .trace.rollouts import FlowBatch as FlowBatch
from .trace.tracer import FlowTracer as FlowTracer, wrap as wrap

__version__: str
