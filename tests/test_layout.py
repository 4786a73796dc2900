"""The laws of the architecture, read from the source."""

import ast
import importlib
import inspect
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import flowtracer_plugin

CORE = Path(flowtracer_plugin.__file__).parent
ROOT = CORE.parent
ADAPTERS = ROOT / "adapters" / "flowtracer_adapters"

# A room may import itself and the rooms before it. Before all of them come the single modules.
SINGLE = ["extras", "files", "moved", "options", "versions"]
ROOMS = [
    "flow",
    "text",
    "attention",
    "model",
    "reading",
    "result",
    "comparison",
    "report",
    "trace",
    "credit",
    "rewards",
    "bulk",
    "grpo",
    "evaluation",
    "audit",
    "app",
    "cli",
]

# Imports inside functions: what is heavy, optional or starts a process is loaded where it is used.
LATE = {
    ("bulk.engines", "bulk.ray_actors"),
    ("bulk.engines", "torch"),
    ("bulk.ray_actors", "torch"),
    ("credit.weights", "flow.torch_arrays"),
    ("credit.weights", "torch"),
    ("flow.dispatch", "flow.numpy_arrays"),
    ("flow.dispatch", "flow.scipy_arrays"),
    ("flow.dispatch", "flow.torch_arrays"),
    ("flow.numpy_arrays", "scipy.sparse"),
    ("flow.torch_arrays", "scipy.sparse"),
    ("grpo.hooks", "peft"),
    ("model.causal_lm", "peft"),
    ("model.free_memory", "resource"),
    ("rewards.algebra", "latex2sympy2_extended"),
    ("rewards.algebra", "sympy"),
    ("rewards.named", "rewards.right_answers"),
    ("rewards.worker", "resource"),
    ("text.data_sets", "datasets"),
    ("text.data_sets", "datasets.exceptions"),
    ("trace.flow_trace", "report.figures.figure"),
    ("trace.flow_trace", "result.network"),
    ("trace.flow_trace", "result.parquet"),
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
    "compare_results",
    "find_answer",
    "json_schema",
    "load",
    "read_results",
    "register_adapter",
    "solve_flow",
    "solve_graph",
    "token_credit",
    "trace_dataset",
    "trace_many",
    "wrap",
]


def name_of(path):
    parts = path.relative_to(CORE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for path in sorted(CORE.rglob("*.py"))}
ALL_FILES = [*SOURCES.values(), *sorted(ADAPTERS.rglob("*.py"))]
# The command line must answer --help at once, so it imports where it works.
COMMANDS = {name for name in SOURCES if name.startswith("cli.")}


@cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports_of(path):
    """Every import: the module, and whether it stands inside a function."""
    tree, found = parsed(path), []
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
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if own(name) in SOURCES else node.module for name in full]
        else:
            continue
        if id(node) not in typing_only:
            found += [(name, id(node) in late) for name in names]
    return found


def own(module):
    return module.removeprefix("flowtracer_plugin.") if "flowtracer_plugin." in module else None


def own_imports(name):
    return {target for module, _ in imports_of(SOURCES[name]) if (target := own(module))}


def late_imports(name):
    return {own(module) or module for module, late in imports_of(SOURCES[name]) if late}


def room_of(module):
    return module.partition(".")[0]


def test_rooms_are_small_and_say_what_they_are_for():
    assert {room_of(name) for name in SOURCES} == {*ROOMS, *SINGLE, "__init__", "__main__"}
    for room in ROOMS:
        files = [path for name, path in SOURCES.items() if name.rpartition(".")[0] == room]
        assert 0 < len(files) <= 15, room
        assert ast.get_docstring(parsed(CORE / room / "__init__.py")), room


def test_a_room_imports_itself_and_the_rooms_before_it():
    order = {name: place for place, name in enumerate([*SINGLE, *ROOMS, "__init__", "__main__"])}
    back = [
        f"{name} imports {target}"
        for name in SOURCES
        for target in own_imports(name)
        if order[room_of(target)] > order[room_of(name)]
        or (room_of(name) in SINGLE and room_of(target) != room_of(name))
    ]
    assert back == []


def test_no_modules_import_each_other_in_a_circle():
    waiting = {name: own_imports(name) for name in SOURCES}
    while free := {name for name, targets in waiting.items() if not targets & set(waiting)}:
        waiting = {name: targets for name, targets in waiting.items() if name not in free}
    assert waiting == {}


def test_modules_import_modules_and_not_rooms():
    """Inside the package a name is imported from its module, never through the room."""
    through = {
        f"{name} imports {target}"
        for name in SOURCES
        for target in own_imports(name)
        if target in ROOMS
    }
    assert through == set()


def test_nothing_else_is_imported_inside_functions():
    late = {(name, target) for name in set(SOURCES) - COMMANDS for target in late_imports(name)}
    assert late == LATE


@pytest.mark.parametrize(
    ("package", "importers"),
    [
        ("nnsight", {"reading.nnsight_backend"}),
        ("trl", {f"grpo.{part}" for part in ("checks", "hooks", "script", "trainer")}),
        ("networkx", {"result.network"}),
        ("pyarrow", {"bulk.tables", "result.parquet"}),
        (
            "matplotlib",
            {f"report.figures.{part}" for part in ("figure", "panels", "ribbon", "river", "steps")},
        ),
        ("ray", {"bulk.ray_actors"}),
        ("gradio", {"app.blocks"}),
        ("starlette", {"app.blocks"}),  # which Gradio is built on
        ("datasets", {"grpo.script", "text.data_sets"}),
        ("latex2sympy2_extended", {"rewards.algebra"}),  # math-verify's parser
        ("sympy", {"rewards.algebra"}),
        ("typer", COMMANDS - {"cli.mistakes"}),
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
        "import flowtracer_plugin.cli.commands",
        "import flowtracer_plugin.cli.commands as c; from typer.testing import CliRunner; "
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
    assert sorted(flowtracer_plugin.__all__) == PUBLIC == sorted(PUBLIC)
    assert dir(flowtracer_plugin) == PUBLIC
    missing = "nothing"
    with pytest.raises(AttributeError, match="No flowtracer_plugin attribute nothing"):
        getattr(flowtracer_plugin, missing)


def stub_homes(room):
    """The module of each name that the stub of a room lists."""
    stub = CORE / room / "__init__.pyi"
    lines = ast.parse(stub.read_text()).body if stub.exists() else []
    imports = [line for line in lines if isinstance(line, ast.ImportFrom)]
    return {name.name: f"{room}.{line.module}" for line in imports for name in line.names}


@pytest.mark.parametrize("room", ["", *ROOMS])
def test_the_names_of_a_room_are_there_and_documented(room):
    module = importlib.import_module(f"flowtracer_plugin.{room}".rstrip("."))
    homes = stub_homes(room)
    for name in set(getattr(module, "__all__", ())) - {"__version__"}:
        assert f"{room}.{name}".lstrip(".") not in SOURCES, "the module would hide the name"
        thing = getattr(module, name)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        home = importlib.import_module(f"flowtracer_plugin.{homes[name]}".replace("..", "."))
        assert home.__name__ == thing.__module__ or name in home.__all__, name
        assert inspect.getdoc(thing), name
        for attribute, value in vars(thing).items() if inspect.isclass(thing) else ():
            if not attribute.startswith("_") and callable(value):
                assert inspect.getdoc(value), f"{name}.{attribute}"


def docstring_lines(node):
    for inner in ast.walk(node):
        body = getattr(inner, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield from range(value.lineno, value.end_lineno + 1)


def test_files_and_functions_are_short():
    long = []
    for path in ALL_FILES:
        tree, lines = parsed(path), path.read_text(encoding="utf-8").splitlines()
        if len(lines) - len(set(docstring_lines(tree))) > 400:
            long.append(f"{path} has {len(lines)} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                text = node.end_lineno - node.lineno + 1 - len(set(docstring_lines(node)))
                body = text - (node.body[0].lineno - node.lineno)
                if body > 50:
                    long.append(f"{path}: {node.name} has {body} lines")
    assert long == []
