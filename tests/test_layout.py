"""The laws of the architecture, read from the source."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import flowtracer_plugin

CORE = Path(flowtracer_plugin.__file__).parent
ROOT = CORE.parent
ADAPTERS = ROOT / "adapters" / "flowtracer_adapters"

# A module may import modules of earlier lines only; those of one line do not know each other.
LAYERS = [
    {"_versions", "extras"},
    {"_flow_backends", "_trl_version", "free_memory"},
    {"_substitution"},
    {"_flow_numpy", "_flow_torch"},
    {"_flow_scipy"},
    {"_flow_border"},
    {"graph"},
    {"flow"},
    {
        "attention",
        "layers",
        "answers",
        "encoding",
        "options",
        "credit",
        "controls",
        "backbone",
        "contrast",
    },
    {"spans", "answer_cut", "likely_paths", "river", "contrast_texts"},
    {"matched_spans"},
    {"streamed"},
    {"head_mean", "backends", "causal_lm", "padding"},
    {
        "generation",
        "sampling",
        "policy_gradient",
        "capture",
        "interception",
        "self_check",
        "parallel",
        "rhythm",
        "head_choice",
    },
    {"value_lengths"},
    {"scores", "saliency"},
    {"reading", "scorers", "attention_rows", "sites", "cutting"},
    {"running", "edges"},
    {"reader", "knockout"},
    {"trace", "diagnosis", "memory"},
    {"storage", "rollouts", "document", "comparison", "policy_gradient"},
    {"parquet", "record_file"},
    {"solving"},
    {"tracer"},
    {"read_rollouts"},
    {"token_scores"},
    {"faithfulness"},
    {"credit_audit"},
    {"audit_summary", "audit_file"},
    {"summaries", "curves", "lines_and_edges", "regeneration"},
    {"protocols", "protocol_summaries"},
    {"evaluation"},
    {"evaluation_file", "evaluation_report"},
    {"report.display"},
    {"network", "report.drawing", "report.terminal", "report.assets"},
    {"report.payload", "report.table", "report.evaluation_tables"},
    {"report.completion", "report.group_index"},
    {"report.differences"},
    {"report.page", "report.group", "report.compare", "report.evaluation"},
    {"report"},
    {"report.figure_panels"},
    {"report.figure_ribbon", "report.figure_steps"},
    {"report.figure_river"},
    {"report.figures"},
    {"reward", "_grpo_checks"},
    {"_grpo_options", "_grpo_reading"},
    {"_grpo_pages"},
    {"_grpo_log"},
    {"_grpo_credit"},
    {"grpo"},
    {"cli_loading", "training_data"},
    {"evaluation_data"},
    {"rewards"},
    {"training"},
    {"cli_options"},
    {"cli_data"},
    {"cli_outputs"},
    {"cli_adapters", "cli_audit", "cli_evaluate", "cli_pages", "cli_tracing", "cli_mistakes"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, line in enumerate(LAYERS) for name in line}

# Imports inside functions, each for a reason: a trace saves and shows itself, and a heavy or
# optional package loads where it is used.
LATE = {
    ("trace", "storage"),
    ("trace", "document"),
    ("trace", "streamed"),
    ("trace", "report"),
    ("trace", "report.terminal"),
    ("trace", "report.figures"),
    ("trace", "parquet"),
    ("trace", "network"),
    ("_flow_backends", "_flow_numpy"),
    ("_flow_backends", "_flow_torch"),
    ("_flow_backends", "_flow_scipy"),
    ("_flow_numpy", "scipy.sparse"),
    ("_flow_torch", "scipy.sparse"),
    ("_grpo_credit", "peft"),
    ("credit", "torch"),
    ("free_memory", "resource"),
    ("causal_lm", "peft"),
    ("rewards", "math_verify"),
    ("training_data", "datasets"),
    ("training_data", "datasets.exceptions"),
}
# These must not load anything, so all of their imports are late.
LAZY = {
    "__init__",
    "cli",
    "cli_adapters",
    "cli_audit",
    "cli_data",
    "cli_evaluate",
    "cli_loading",
    "cli_options",
    "cli_outputs",
    "cli_pages",
    "cli_tracing",
}

PUBLIC = [
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


def name_of(path):
    parts = path.relative_to(CORE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for path in sorted(CORE.rglob("*.py"))}
ALL_FILES = [*SOURCES.values(), *sorted(ADAPTERS.rglob("*.py"))]


def imports_of(path):
    """Every import: the module, and whether it is late, that is inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    late = {id(inner) for function in functions for inner in ast.walk(function)}
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            names = [
                f"{node.module}.{alias.name}"
                if f"{node.module}.{alias.name}".removeprefix("flowtracer_plugin.") in SOURCES
                else node.module
                for alias in node.names
            ]
        else:
            continue
        for name in names:
            if id(node) not in typing_only:
                yield name, id(node) in late


def own(module):
    return module.removeprefix("flowtracer_plugin.") if "flowtracer_plugin." in module else None


def test_every_module_has_its_place():
    assert set(SOURCES) - {"__init__"} <= set(RANK)


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_one_way(name):
    for module, late in imports_of(SOURCES[name]):
        target = own(module)
        if target is None or (late and (name in LAZY or (name, target) in LATE)):
            continue
        assert not late, f"{name} imports {target} inside a function"
        assert RANK[target] < RANK[name], f"{name} must not import {target}"


@pytest.mark.parametrize("name", [name for name in SOURCES if name not in LAZY])
def test_nothing_else_is_imported_late(name):
    late = {own(module) or module for module, late in imports_of(SOURCES[name]) if late}
    assert late <= {target for source, target in LATE if source == name}


@pytest.mark.parametrize(
    ("package", "importers"),
    [
        ("nnsight", {"capture"}),
        ("trl", {"grpo", "_grpo_checks", "_grpo_credit", "training"}),
        ("networkx", {"network"}),
        ("pyarrow", {"parquet"}),
        (
            "matplotlib",
            {f"report.figure{part}" for part in ("s", "_panels", "_ribbon", "_river", "_steps")},
        ),
        ("datasets", {"training", "training_data"}),
        ("math_verify", {"rewards"}),
        ("typer", LAZY - {"__init__"}),
    ],
)
def test_one_module_knows_a_package(package, importers):
    found = {
        name
        for name, path in SOURCES.items()
        for module, _ in imports_of(path)
        if module.split(".")[0] == package
    }
    assert found == importers


def test_the_core_knows_no_adapter_and_no_architecture_by_name():
    for path in SOURCES.values():
        modules = {module for module, _ in imports_of(path)}
        assert not any(module.startswith("flowtracer_adapters") for module in modules), path
        assert not any(module.startswith("transformers.models") for module in modules), path


def test_adapters_know_the_contract_only():
    for path in ADAPTERS.rglob("*.py"):
        known = {own(module) for module, _ in imports_of(path)} - {None}
        assert known <= {"attention"}, path


@pytest.mark.parametrize(
    "code",
    [
        "import flowtracer_plugin; dir(flowtracer_plugin)",
        "import flowtracer_plugin.cli",
        "import flowtracer_plugin.cli as c; from typer.testing import CliRunner; "
        "r = CliRunner().invoke(c.app, ['--help']); assert r.exit_code == 0, r.output; "
        "r = CliRunner().invoke(c.app, ['trace', '--help']); assert r.exit_code == 0, r.output; "
        "r = CliRunner().invoke(c.app, ['adapters', '--help']); assert r.exit_code == 0, r.output",
    ],
    ids=["package", "command line", "help"],
)
def test_importing_loads_nothing_heavy(code):
    heavy = "{'torch', 'transformers', 'nnsight', 'trl', 'scipy', 'numpy'}"
    check = f"import sys; {code}; print(sorted({heavy} & set(sys.modules)))"
    ran = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert ran.stdout == "[]\n", ran.stdout


def test_the_public_names_are_these():
    assert flowtracer_plugin.__all__ == PUBLIC == sorted(PUBLIC)
    assert dir(flowtracer_plugin) == PUBLIC
    assert set(flowtracer_plugin._HOMES) == set(PUBLIC) - {"__version__"}
    missing = "nothing"
    with pytest.raises(AttributeError, match="'flowtracer_plugin' has no attribute 'nothing'"):
        getattr(flowtracer_plugin, missing)


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "__version__"])
def test_a_public_name_is_where_it_says_and_documented(name):
    thing = getattr(flowtracer_plugin, name)
    home = f"flowtracer_plugin.{flowtracer_plugin._HOMES[name]}"
    assert thing.__module__ == home
    assert getattr(importlib.import_module(home), name) is thing
    assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        for attribute, value in vars(thing).items():
            if not attribute.startswith("_") and callable(value):
                assert inspect.getdoc(value), f"{name}.{attribute}"


def typed_names():
    """The names that a type checker sees in the package."""
    for node in ast.walk(ast.parse(SOURCES["__init__"].read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                home = line.module.removeprefix("flowtracer_plugin.")
                yield from ((alias.name, home) for alias in line.names)


def test_type_checkers_and_users_see_the_same_names():
    assert dict(typed_names()) == flowtracer_plugin._HOMES


def docstring_lines(node):
    for inner in ast.walk(node):
        body = getattr(inner, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield from range(value.lineno, value.end_lineno + 1)


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) - len(set(docstring_lines(tree))) <= 400
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1 - len(set(docstring_lines(node)))
            signature = node.body[0].lineno - node.lineno
            assert lines - signature <= 50, f"{node.name} has {lines - signature} lines"
