from .document import json_schema as json_schema
from .token_heads import PayingHead as PayingHead, TokenHeads as TokenHeads
from .trace_data import RankedToken as RankedToken, TraceData as TraceData
