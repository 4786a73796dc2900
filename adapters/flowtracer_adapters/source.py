"""How a module attends, according to the source of its `forward`."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

_ELSEWHERE = re.compile(r"cross|encoder_attn|enc_attn|encoder_decoder")
"""Parts of the names of modules that attend to another sequence, such as an encoder's states."""


def code(function: Any) -> CodeType | None:
    """The bytecode of a function under its decorators; `None` if it is not written in Python."""
    return getattr(inspect.unwrap(function), "__code__", None)


def definition(function: Any) -> ast.FunctionDef | None:
    """The syntax tree of a function; `None` if its source is not available."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    except (OSError, TypeError):  # built at run time, or compiled
        return None
    tree = ast.parse(source).body[0]
    return tree if isinstance(tree, ast.FunctionDef) else None


def dotted(node: ast.expr) -> str:
    """`torch.nn.functional.softmax` as text; "" for an expression that is no chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def calls(node: ast.AST) -> list[ast.Call]:
    """Every call below a node, in the order of the source."""
    found = [n for n in ast.walk(node) if isinstance(n, ast.Call)]
    return sorted(found, key=lambda call: (call.lineno, call.col_offset))


def text_attention(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Paths and modules that may attend between tokens of the text; shared ones under each path."""
    for path, module in model.named_modules(remove_duplicate=False):
        config = type(getattr(module, "config", None)).__name__
        if "Vision" in config or "Audio" in config or _ELSEWHERE.search(path):
            continue
        if not getattr(module, "is_cross_attention", False):
            yield path, module


def layer_number(path: str, module: nn.Module, *, shared: bool = False) -> int | None:
    """The number of a module's decoder layer, from its own attribute or from its path."""
    stated = None if shared else getattr(module, "layer_idx", None)
    numbers = [int(part) for part in path.split(".") if part.isdecimal()]
    # Zamba2's shared modules say -1.
    return stated if not numbers or (stated is not None and stated >= 0) else numbers[0]
