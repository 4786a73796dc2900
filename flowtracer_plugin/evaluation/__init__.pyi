from .curves import Curve as Curve, measure_curves as measure_curves
from .knockout import (
    KnockOut as KnockOut,
    cut_edges as cut_edges,
    knock_out as knock_out,
    set_drops as set_drops,
    token_drops as token_drops,
)
from .lines_and_edges import (
    EdgeKnockOuts as EdgeKnockOuts,
    LineKnockOuts as LineKnockOuts,
    knock_out_backbone as knock_out_backbone,
    knock_out_lines as knock_out_lines,
)
from .outcomes import (
    REASONS as REASONS,
    Evaluation as Evaluation,
    Example as Example,
    Outcome as Outcome,
)
from .page import render_evaluation as render_evaluation, write_evaluation as write_evaluation
from .protocols import measure as measure
from .ranked_tokens import (
    Effect as Effect,
    Faithfulness as Faithfulness,
    KnockOutOptions as KnockOutOptions,
    measure_knock_outs as measure_knock_outs,
)
from .regeneration import Regeneration as Regeneration, regenerate as regenerate
from .run import evaluate as evaluate
from .scored_example import TooFewTokensError as TooFewTokensError
from .summary import (
    CurveSummary as CurveSummary,
    EdgeSummary as EdgeSummary,
    EvaluationSummary as EvaluationSummary,
    Interval as Interval,
    LineSummary as LineSummary,
    RegenerationSummary as RegenerationSummary,
    ScoreSummary as ScoreSummary,
    summarise_all as summarise_all,
)
