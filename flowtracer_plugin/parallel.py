"""Models that are spread over devices or processes, or compiled: what a reader must mind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, distributed, nn

from flowtracer_plugin.attention import UnsupportedArchitectureError
from flowtracer_plugin.causal_lm import language_model


def tensor_parallel_group(model: nn.Module) -> Any | None:
    """The processes that share the heads of the model, if there are several."""
    mesh = getattr(language_model(model), "_device_mesh", None)
    if mesh is None or (getattr(language_model(model), "tp_size", None) or 1) < 2:
        return None
    return mesh.get_group("tp") if mesh.ndim > 1 else mesh.get_group()


def check_backend(model: nn.Module, backend: str) -> None:
    """Refuse nnsight for tensor parallel models, whose `forward` it would displace.

    Raises:
        UnsupportedArchitectureError: It was selected for one.
    """
    if backend == "nnsight" and tensor_parallel_group(model) is not None:
        raise UnsupportedArchitectureError(
            'nnsight cannot read a tensor parallel model; wrap(..., backend="interface") can'
        )


def average_heads(model: nn.Module, total: Float[Tensor, "batch query key"]) -> None:
    """Replace the mean over this process's heads by the mean over all heads, in place."""
    group = tensor_parallel_group(model)
    if group is not None:
        distributed.all_reduce(total, group=group)
        total /= distributed.get_world_size(group)


def may_stop(model: nn.Module) -> bool:
    """Whether a forward pass may end early.

    Not where something waits for its end: parameters that were gathered from other processes or
    fetched from memory or disk, and that must be given back.
    """
    return not any(_waits(module) for module in model.modules())


def _waits(module: nn.Module) -> bool:
    hook = vars(module).get("_hf_hook")
    if getattr(hook, "offload", False) or hasattr(module, "ds_id"):
        return True
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule | fsdp.FullyShardedDataParallel)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """The model without what `Module.compile` put in front of its parts."""
    compiled = {
        module: call
        for module in model.modules()
        if (call := vars(module).get("_compiled_call_impl")) is not None
    }
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
