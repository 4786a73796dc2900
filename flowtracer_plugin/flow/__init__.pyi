from .backbone import (
    Backbone as Backbone,
    FlowPath as FlowPath,
    Outline as Outline,
    Step as Step,
    StepGraph as StepGraph,
    StrongEdges as StrongEdges,
)
from .graph import FlowGraph as FlowGraph
from .river import River as River
from .solve import Flow as Flow, solve_flow as solve_flow, solve_graph as solve_graph
