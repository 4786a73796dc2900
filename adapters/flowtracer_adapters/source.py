"""What the source of a module's `forward` says about how it attends."""

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
"""In the names of modules that look at another sequence, such as an encoder's states."""


def code(function: Any) -> CodeType | None:
    """The compiled code of a function under its decorators; `None` for what is not Python."""
    return getattr(inspect.unwrap(function), "__code__", None)


def definition(function: Any) -> ast.FunctionDef | None:
    """The syntax tree of a function; `None` where its source is not at hand."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    except (OSError, TypeError):  # built at run time or compiled: nothing to look at
        return None
    tree = ast.parse(source).body[0]
    return tree if isinstance(tree, ast.FunctionDef) else None


def dotted(node: ast.expr) -> str:
    """`torch.nn.functional.softmax` as written; "" for what is no chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def calls(node: ast.AST) -> list[ast.Call]:
    """Every call below a node, in the order written."""
    found = [n for n in ast.walk(node) if isinstance(n, ast.Call)]
    return sorted(found, key=lambda call: (call.lineno, call.col_offset))


def text_attention(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that may attend between the tokens of the text, by path; shared ones by each path."""
    for path, module in model.named_modules(remove_duplicate=False):
        config = type(getattr(module, "config", None)).__name__
        if "Vision" in config or "Audio" in config or _ELSEWHERE.search(path):
            continue
        if not getattr(module, "is_cross_attention", False):
            yield path, module


def layer_number(path: str, module: nn.Module, *, shared: bool = False) -> int | None:
    """The decoder layer that a module belongs to: it says so itself, or its path does."""
    stated = None if shared else getattr(module, "layer_idx", None)
    numbers = [int(part) for part in path.split(".") if part.isdecimal()]
    # Zamba2's shared modules say -1.
    return stated if not numbers or (stated is not None and stated >= 0) else numbers[0]
