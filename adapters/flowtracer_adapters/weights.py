"""Models that multiply attention weights and values in their own code: mostly older ones."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from einops import rearrange
from torch import Tensor, nn

from flowtracer_adapters.source import calls, definition, dotted, layer_number, text_attention
from flowtracer_plugin.attention import AttentionAdapter, AttentionSite, AttentionWeights

PRODUCTS = frozenset({"torch.matmul", "torch.bmm", "torch.einsum"})
"""Functions that multiply weights with values."""

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
"""The attributes in which modules keep their number of heads."""


@final
class WeightsAdapter(AttentionAdapter):
    """Finds every attention module whose code multiplies the result of a softmax with values.

    The result is followed from the softmax through dropout, casts and reshapes to the product, in
    `forward` or in a method that it calls. The product's arguments are the weights and the values.
    """

    name: ClassVar[str] = "weights"
    generic: ClassVar[bool] = True

    def matches(self, model: nn.Module) -> bool:
        return bool(self.sites(model))

    def sites(self, model: nn.Module) -> tuple[AttentionSite, ...]:
        found: dict[nn.Module, tuple[str, str, int]] = {}
        for path, module in text_attention(model):
            product = _attention_product(type(module))
            if product is not None and module not in found:
                found[module] = (path, *product)
        return tuple(
            AttentionSite(layer=number, module=path, function=function, occurrence=occurrence)
            for module, (path, function, occurrence) in found.items()
            if (number := layer_number(path, module)) is not None
        )

    def read(
        self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> AttentionWeights:
        weights, value = args[-2:]
        if isinstance(args[0], str):
            value = _heads_first(args[0], value)
        if weights.ndim == 3:
            heads = next(getattr(module, name) for name in HEADS if hasattr(module, name))
            weights, value = (
                rearrange(x, "(batch head) query key -> batch head query key", head=heads)
                for x in (weights, value)
            )
        return AttentionWeights(weights=weights, value=value)


def _heads_first(equation: str, value: Tensor) -> Tensor:
    """The values of a product like `bnij,jbnd->ibnd`, as [batch, head, key, width]."""
    weights, values = (part.strip() for part in equation.split("->")[0].split(","))
    batch, head, _, key = tuple(weights)
    (width,) = set(values) - set(weights)
    return torch.einsum(f"{values}->{batch}{head}{key}{width}", value)


def _attention_product(module_type: type[nn.Module]) -> tuple[str, int] | None:
    """The call of `forward` that multiplies weights and values: its name, and its occurrence."""
    if "attention" not in module_type.__name__.lower():
        return None  # routers of experts multiply the result of a softmax too
    forward = definition(module_type.forward)
    if forward is None:
        return None
    if product := _product(forward):
        return product
    for call in calls(forward):
        method = dotted(call.func).removeprefix("self.")
        inner = definition(getattr(module_type, method, None))
        if inner is not None and (product := _product(inner)):
            return f"self.{method}/{product[0]}", product[1]
    return None


def _product(function: ast.FunctionDef) -> tuple[str, int] | None:
    """The first product with the result of a softmax: its function, and its occurrence."""
    derived: set[str] = set()
    written: Counter[str] = Counter()
    for statement in _statements(function):
        softmax = False
        for call in calls(statement):
            name = dotted(call.func)
            softmax |= name.lower().split(".")[-1] == "softmax"
            if name in PRODUCTS and any(_names(argument) & derived for argument in call.args):
                return name, written[name]
            written[name] += 1
        if softmax or _names(statement) & derived:
            derived |= _assigned(statement)
    return None


def _statements(function: ast.FunctionDef) -> Iterator[ast.stmt]:
    """The statements that contain no others, in the order of the source."""
    nodes = (node for node in ast.walk(function) if isinstance(node, ast.stmt))
    simple = [node for node in nodes if not hasattr(node, "body")]
    yield from sorted(simple, key=lambda node: node.lineno)


def _names(node: ast.AST) -> set[str]:
    """The variables that the node uses."""
    used = (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))
    return {n.id for n in used}


def _assigned(statement: ast.stmt) -> set[str]:
    """The variables that the statement sets."""
    names = (n for n in ast.walk(statement) if isinstance(n, ast.Name))
    return {n.id for n in names if isinstance(n.ctx, ast.Store)}
