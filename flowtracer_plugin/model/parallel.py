"""Models that are spread over devices or processes, or compiled: how to read them safely."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn

from flowtracer_plugin.attention.adapter import UnsupportedArchitectureError
from flowtracer_plugin.model.causal_lm import language_model


def tensor_parallel_group(model: nn.Module) -> Any | None:
    """The group of processes that share the heads of the model; None if there is only one."""
    mesh = getattr(language_model(model), "_device_mesh", None)
    if mesh is None or (getattr(language_model(model), "tp_size", None) or 1) < 2:
        return None
    return mesh.get_group("tp") if mesh.ndim > 1 else mesh.get_group()


def check_backend(model: nn.Module, backend: str) -> None:
    """Refuse nnsight for tensor parallel models, whose `forward` it would replace.

    Raises:
        UnsupportedArchitectureError: nnsight was selected for a tensor parallel model.
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


def smallest(model: nn.Module, value: int) -> int:
    """The smallest value among the processes that share a model's heads: all must decide alike."""
    group = tensor_parallel_group(model)
    if group is None:
        return value
    device = next(model.parameters()).device
    least = torch.tensor(value, dtype=torch.int64, device=device)
    distributed.all_reduce(least, op=distributed.ReduceOp.MIN, group=group)
    return int(least)


def may_stop(model: nn.Module) -> bool:
    """Whether a forward pass may end early.

    It may not if parameters were gathered from other processes, or fetched from memory or disk:
    they are released at the end of the pass.
    """
    return not any(_waits(module) for module in model.modules())


def _waits(module: nn.Module) -> bool:
    hook = vars(module).get("_hf_hook")
    if getattr(hook, "offload", False) or hasattr(module, "ds_id"):
        return True
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule | fsdp.FullyShardedDataParallel)


_PLAIN = "_flowtracer_plain_forward"
"""The attribute that keeps what replaces a module's compiled `forward` while it is read, with
nnsight's controller around it. A table outside the modules would keep them alive."""


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` runs the model, or a part of it, as a graph of its own."""
    dynamo = sys.modules.get("torch._dynamo")
    return any(
        (dynamo is not None and isinstance(module, dynamo.OptimizedModule))
        or vars(module).get("_compiled_call_impl") is not None
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Remove the wrappers of `torch.compile` from the model and its parts; restore them later."""
    dynamo = sys.modules.get("torch._dynamo")
    with ExitStack() as restored:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if dynamo is not None and isinstance(child, dynamo.OptimizedModule):
                    module._modules[name] = child._orig_mod
                    restored.callback(module._modules.__setitem__, name, child)
            own = vars(module)
            if own.get("_compiled_call_impl") is not None:
                restored.callback(
                    setattr, module, "_compiled_call_impl", own["_compiled_call_impl"]
                )
                module._compiled_call_impl = None
            plain = getattr(own.get("forward"), "_torchdynamo_orig_callable", None)
            if plain is not None:
                restored.callback(_put_compiled_back, module, own["forward"])
                own["forward"] = own.get(_PLAIN, plain)
        yield


def _put_compiled_back(module: nn.Module, compiled: Any) -> None:
    own = vars(module)
    own[_PLAIN], own["forward"] = own["forward"], compiled
