"""A device that does not exist: the values of a CPU, the rules of CUDA, and a log of waits.

Its tensors say that they are on `sim:0`, torch's place for devices of other makers, and hold the
values of a CPU. Each operation is refused where CUDA refuses it: on tensors of two devices, except
numbers without an axis, and indices on the host. What makes the host wait for the device is logged
with the line of the package that asked for it, as `torch.cuda.set_sync_debug_mode` finds it.

It cannot find what is inside an operation, such as a kernel that CUDA lacks, and it has no streams,
no memory of its own and no speed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

NAME = "sim"
HOME = ("flowtracer_plugin", "flowtracer_adapters")
"""The packages whose lines are named in the log."""

BETWEEN = ("torch", "einops", "jaxtyping", "beartype")
"""Packages that do what another package asks of them: its line is looked for behind theirs."""

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default: "reads a number",
    aten._unique2.default: "unique",
    aten.bincount.default: "bincount",
    aten.equal.default: "equal",
    aten.masked_select.default: "masked_select",
    aten.nonzero.default: "nonzero",
    aten.repeat_interleave.Tensor: "repeat_interleave",
}
"""Operations whose result, or its size, the host has to know."""

INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
COPYING = {aten.copy_.default, aten._to_copy.default}
MIXING = INDEXED | COPYING | {aten.set_.source_Tensor, aten._local_scalar_dense.default}
"""Operations that may take tensors of both devices."""


class Wait(NamedTuple):
    """A place where the host waits for the device.

    Attributes:
        why: The operation.
        place: File and line of the package, or "" for a line of another package.
    """

    why: str
    place: str


class _Module(_DummyBackendModule):
    """What torch asks of `torch.sim`; it says that there is no such device, to be left alone."""

    def is_available(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def device(self, _index: int) -> Any:
        return nullcontext()

    def manual_seed(self, _seed: int) -> None:
        pass

    # torch.random.fork_rng, which transformers calls, asks every registered device for its state.
    def get_rng_state(self, _device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, _state: Tensor, _device: Any = None) -> None:
        pass


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module(), hook=_Hook())
DEVICE = torch.device(f"{NAME}:0")

_logs: list[list[Wait]] = []


@contextmanager
def simulated() -> Iterator[list[Wait]]:
    """A context in which `device="sim"` works; the list of the waits in it."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # as for CUDA: torch.tensor begins on the host
    _logs.append([])
    try:
        with _Mode():
            yield _logs[-1]
    finally:
        _logs.pop()
        torch._C._set_only_lift_cpu_tensors(before)


def placed(value: Any) -> Any:
    """Tensors, and models in place, moved to the device; the log does not count that."""
    if isinstance(value, nn.Module):
        for module in value.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    moved = nn.Parameter(placed(parameter), requires_grad=parameter.requires_grad)
                    module._parameters[name] = moved
            for name, buffer in module._buffers.items():
                module._buffers[name] = placed(buffer)
        return value
    return tree_map(lambda one: _on_device(one.detach().clone()) if _is_host(one) else one, value)


def on_host(value: Any) -> Any:
    """The values of tensors on the device; the log does not count that."""
    return tree_map(_unwrapped, value)


class SimulatedTensor(Tensor):
    """A tensor on the device, with its values in `held`."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> SimulatedTensor:
        if held.layout == torch.strided:
            form = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        else:
            form = {"dispatch_layout": True}
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, dtype=held.dtype, layout=held.layout, device=DEVICE, **form
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held.detach()

    def __repr__(self) -> str:
        return f"SimulatedTensor({self.held!r})"

    def tolist(self) -> Any:
        _log("tolist")
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() to copy the "
            "tensor to host memory first."
        )

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(operation, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sees the operations that make tensors from nothing."""

    def __torch_dispatch__(
        self, operation: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(operation, args, kwargs or {})


def _run(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of one operation, after the checks of a device."""
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    here = any(_is_device(one) for one in tensors)
    if operation is aten._fused_sdp_choice.default:
        return 0  # the plain formula, which is made of operations that are checked
    if operation is torch.ops.prim.layout.default:
        return args[0].held.layout
    if here:
        _check_devices(operation, tensors)
        _log_waits(operation, args, kwargs)
    if operation is aten._to_copy.default:
        return _copied(args, kwargs)
    device = kwargs.get("device")
    if operation is aten.copy_.default:
        _log_copy(args[1], args[0], kwargs, args[2:])
        there = _is_device(args[0])
    else:
        there = here if device is None else _names_device(device)
    inside = {**kwargs, "device": "cpu"} if there and device is not None else dict(kwargs)
    inside.pop("pin_memory", None)
    held = tree_map(_unwrapped, tuple(args))
    if operation is aten.histc.default and not held[0].is_floating_point():
        found = operation(held[0].float(), *held[1:]).to(held[0].dtype)  # only CUDA counts integers
    else:
        found = operation(*held, **tree_map(_unwrapped, inside))
    if not there or found is None:
        return found
    found = tree_map(_wrapped, found)
    plain = all(one.layout == torch.strided for one in tensors)
    if here and plain and operation.namespace == "aten":
        return return_and_correct_aliasing(operation, args, kwargs, found)
    return found


def tree_map(change: Callable[[Any], Any], value: Any) -> Any:
    """The value with each leaf of its tuples, lists and dicts changed; torch's own takes longer."""
    if isinstance(value, tuple | list):
        return type(value)([tree_map(change, one) for one in value])
    if isinstance(value, dict):
        return {name: tree_map(change, one) for name, one in value.items()}
    return change(value)


def tree_leaves(value: Any) -> Iterator[Any]:
    """The leaves of tuples, lists and dicts."""
    if isinstance(value, tuple | list):
        for one in value:
            yield from tree_leaves(one)
    elif isinstance(value, dict):
        yield from tree_leaves(list(value.values()))
    else:
        yield value


def _check_devices(operation: Any, tensors: Sequence[Tensor]) -> None:
    if operation in MIXING:
        return
    if any(_is_host(one) and one.dim() for one in tensors):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{NAME}:0 and cpu! (when running {operation})"
        )


def _log_waits(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    sized = kwargs.get("output_size") is not None  # then `repeat_interleave` knows its size
    if operation in WAITING and not sized:
        _log(WAITING[operation])
    for index in args[1] if operation in INDEXED else ():
        if index is None:
            continue
        if not _is_device(args[0]):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        if not _is_device(index):
            _log("index from the host")
        elif index.dtype in (torch.bool, torch.uint8):
            _log("index of booleans")


def _copied(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """A copy of another dtype or on another device."""
    (given,), device = args, kwargs.get("device")
    there = _is_device(given) if device is None else _names_device(device)
    inside = dict(kwargs) if device is None else {**kwargs, "device": "cpu"}
    found = aten._to_copy.default(_unwrapped(given), **inside)
    found = _on_device(found) if there else found
    _log_copy(given, found, kwargs)
    return found


def _log_copy(
    given: Tensor, into: Tensor, kwargs: Mapping[str, Any], more: Sequence[Any] = ()
) -> None:
    """PyTorch waits for each copy to or from CUDA, unless it is sent off with `non_blocking`."""
    blocking = not (kwargs.get("non_blocking") or (more and more[0]))
    if _is_device(given) and not _is_device(into):
        _log("copy to the host")
    elif _is_device(into) and not _is_device(given) and blocking:
        _log("copy to the device")


def _log(why: str) -> None:
    if not _logs:
        return
    frame = sys._getframe(1)
    while frame is not None and _between(Path(frame.f_code.co_filename)):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename if frame is not None else "")
    ours = frame is not None and any(name in path.parts for name in HOME)
    _logs[-1].append(Wait(why, f"{path.parent.name}/{path.name}:{frame.f_lineno}" if ours else ""))


def _between(path: Path) -> bool:
    made = path.name.startswith("<")  # functions that a library has written
    return made or path == Path(__file__) or any(name in path.parts for name in BETWEEN)


def _is_device(value: Any) -> bool:
    return isinstance(value, SimulatedTensor)


def _is_host(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, SimulatedTensor)


def _names_device(device: Any) -> bool:
    return torch.device(device).type == NAME


def _wrapped(value: Any) -> Any:
    return _on_device(value) if _is_host(value) else value


def _on_device(value: Tensor) -> SimulatedTensor:
    return SimulatedTensor(value)


def _unwrapped(value: Any) -> Any:
    return value.held if isinstance(value, SimulatedTensor) else value
