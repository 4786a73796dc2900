from .document import json_schema as json_schema
from .trace_data import RankedToken as RankedToken, TraceData as TraceData
