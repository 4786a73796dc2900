"""The attention that a model itself reports, on the eager implementation, by layer."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel


class NotReportedError(RuntimeError):
    """The model reports no attention that can be compared."""


def model_inputs(
    model: nn.Module, ids: Int[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
) -> dict[str, Any]:
    """The inputs that a reader passes to the model; the model makes its positions itself."""
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long()}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return inputs


def reported_attention(
    twin: PreTrainedModel, ids: Int[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
) -> dict[int, Float[Tensor, "batch head query key"]]:
    """Probabilities by layer, as the eager `twin` reports them; layers without any are left out.

    A map belongs to the layer in the path of the module that returned it. If layers attend more
    than once, or the model cut its maps to size, maps are numbered in the order of execution.

    Raises:
        NotReportedError: The model reports no attention between tokens.
    """
    maps = [map_ for map_ in _reported(twin, ids, mask) if _between_tokens(map_.weights, ids)]
    if not maps:
        raise NotReportedError("the eager model reports no attention of shape [query, key]")
    layers = [map_.layer for map_ in maps]
    if None in layers or max(Counter(layers).values()) > 1:
        layers = list(range(len(maps)))
    return dict(zip(layers, (map_.weights.double() for map_ in maps), strict=True))


def reported_share(
    twin: PreTrainedModel, ids: Int[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
) -> dict[int | None, Float[Tensor, "batch query"]]:
    """The sum of each query's attention to keys of any kind, by layer; sinks take the rest."""
    maps = _reported(twin, ids, mask)
    return {map_.layer: map_.weights.double().sum(-1).mean(1) for map_ in maps}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Map:
    """One map that a model reports, and the layer in the path of the module."""

    layer: int | None
    weights: Float[Tensor, "batch head query key"]


def _reported(twin: PreTrainedModel, ids: Tensor, mask: Tensor) -> list[_Map]:
    with torch.no_grad(), _returned(twin) as returned:
        output = twin(**model_inputs(twin, ids, mask), output_attentions=True, return_dict=True)
    tensors = _flat(output.get("attentions"))
    return [_Map(layer=_number(_origin(map_, returned)), weights=map_) for map_ in tensors]


@contextmanager
def _returned(model: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """A list that fills with each module's path and the tensors it returns, innermost first."""
    seen: list[tuple[str, Tensor]] = []
    handles = [
        module.register_forward_hook(
            lambda module, args, output, path=path: seen.extend((path, t) for t in _flat(output))
        )
        for path, module in model.named_modules()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _flat(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Sequence) and not isinstance(output, str):
        return [tensor for part in output for tensor in _flat(part)]
    return []


def _between_tokens(map_: Tensor, ids: Tensor) -> bool:
    return map_.ndim == 4 and map_.shape[0] == len(ids) and set(map_.shape[2:]) == {ids.shape[1]}


def _origin(map_: Tensor, returned: list[tuple[str, Tensor]]) -> str:
    """The path of the module that returned `map_`; empty if the map was cut or copied since."""
    return next((path for path, tensor in returned if tensor is map_), "")


def _number(path: str) -> int | None:
    found = re.search(r"\.(\d+)(\.|$)", path)
    return int(found[1]) if found else None
