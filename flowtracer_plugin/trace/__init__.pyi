from .flow_trace import FlowTrace as FlowTrace, RankedToken as RankedToken, load as load
from .memory import MemoryEstimate as MemoryEstimate, TooLittleMemoryError as TooLittleMemoryError
from .rollouts import FlowBatch as FlowBatch
from .tracer import FlowTracer as FlowTracer, wrap as wrap
