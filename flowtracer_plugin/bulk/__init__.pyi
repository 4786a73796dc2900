from .compared import compare_results as compare_results
from .data_set import trace_dataset as trace_dataset
from .examples import Columns as Columns, Example as Example
from .tables import Results as Results, read_results as read_results, to_dataframe as to_dataframe
from .traced_row import TracedRow as TracedRow
from .tracing import trace_many as trace_many
