"""Import paths of the time before there were rooms: every public name is still found by its own."""

import importlib
import subprocess
import sys
import warnings

import pytest

from flowtracer_plugin.moved import MOVED

NAMES = """
answer_cut: cut_at_result
answers: find_answer FINDERS FoundAnswer
attention: adapter_entries AdapterEntry AdapterMismatchError AttentionAdapter AttentionCall
    AttentionSite AttentionWeights DISTRIBUTION ENTRY_POINT_GROUP find_adapter known_adapters
    NoAttentionError register_adapter UnsupportedArchitectureError
audit_summary: AuditSummary Difference holm ScorerAudit summarise_audit
backbone: Backbone FlowPath Outline Step StepGraph StrongEdges
cli: app main
comparison: compare ComparedTrace Comparison Origins
contrast: Contrast Sides
contrast_texts: Beginning Continuation Word
credit: credit_weights token_credit top_tokens
credit_audit: audit AuditOptions BatchAudit NoSignalError Tilt
curves: Curve measure_curves
cutting: KnockOutError
document: json_schema
evaluation: evaluate Example Outcome
evaluation_report: Evaluation
faithfulness: Effect Faithfulness KnockOutOptions measure_knock_outs TooFewTokensError
flow: Flow solve_flow solve_graph
graph: FlowGraph
grpo: attach_flow_credit CreditOptions FlowCreditMixin FlowGRPOConfig FlowGRPOTrainer FlowReward
    UnsupportedTrainerError
interception: InterfaceBackend
knockout: cut_edges knock_out KnockOut
lines_and_edges: EdgeKnockOuts knock_out_backbone knock_out_lines LineKnockOuts
memory: MemoryEstimate TooLittleMemoryError
options: FlowOptions PRESETS
policy_gradient: named_parameters
protocol_summaries: CurveSummary EdgeSummary EvaluationSummary LineSummary RegenerationSummary
    summarise_all
protocols: measure
regeneration: regenerate Regeneration
report: CompletionView group_page render_comparison render_evaluation render_notebook render_page
    write_comparison write_evaluation write_group_page write_index write_page
reward: FlowReward SCORES
rewards: completion_text concentration imported_reward math_answer math_flow named_reward
    reasoning_share
rewards.named: completion_text concentration imported_reward math_answer math_flow named_reward
    reasoning_share
river: River
rollouts: FlowBatch
sampling: Group rewarded sample
scorers: Boost find_scorer lowest Rollouts Scorer SCORERS
scores: Features Rollouts
spans: AnswerNotFoundError find_spans Spans
storage: load save write_atomically
summaries: Interval ScoreSummary
token_scores: NAMES read_text score_text ScoredText token_score TOKEN_SCORES
trace: FlowTrace RankedToken
tracer: FlowTracer wrap
training: build_trainer parse train
"""
# By the old path of each module, its names.
OLD = dict(line.split(": ") for line in NAMES.replace("\n    ", " ").strip().splitlines())
LEFT_REPORT = {"render_evaluation", "write_evaluation"}


@pytest.mark.parametrize("module", OLD)
def test_a_public_name_is_found_by_its_old_path(module, monkeypatch):
    if module in MOVED:
        monkeypatch.delitem(sys.modules, f"flowtracer_plugin.{module}", raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = importlib.import_module(f"flowtracer_plugin.{module}")
        things = {name: getattr(found, name) for name in OLD[module].split()}
    said = [str(one.message) for one in caught if one.category is DeprecationWarning]
    assert bool(said) == (module in MOVED or bool(LEFT_REPORT & set(things)))
    homes = MOVED.get(module, (module,))
    new = [importlib.import_module(f"flowtracer_plugin.{home}") for home in homes]
    for name in set(things) - LEFT_REPORT:
        assert any(getattr(one, name, None) is things[name] for one in new), name


def test_a_moved_module_is_the_new_one_and_says_where_that_is():
    """In a process of its own, where nothing has been imported yet."""
    code = (
        "import warnings; warnings.simplefilter('error', DeprecationWarning)\n"
        "try: from flowtracer_plugin.knockout import knock_out\n"
        "except DeprecationWarning as error: print(error)\n"
        "warnings.simplefilter('ignore')\n"
        "from flowtracer_plugin.knockout import knock_out\n"
        "import flowtracer_plugin.evaluation.knockout as new\n"
        "assert knock_out is new.knock_out\n"
        "try: from flowtracer_plugin.knockout import nothing\n"
        "except ImportError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = ran.stdout.splitlines()
    assert first == (
        "flowtracer_plugin.knockout has moved to flowtracer_plugin.evaluation.knockout; the old "
        "path will not work in the next release"
    )
    assert second.startswith("cannot import name 'nothing' from 'flowtracer_plugin.knockout'")
