"""The GPU of the tests: a real one if there is one, else the simulated one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tests.device.simulated import DEVICE, placed, simulated

GPU = torch.device("cuda", 0) if torch.cuda.is_available() else DEVICE


@contextmanager
def on_gpu() -> Iterator[Callable[[Any], Any]]:
    """A context with a function that moves tensors, and models in place, to the GPU."""
    if torch.cuda.is_available():
        yield _to_cuda
    else:
        with simulated():
            yield placed


def _to_cuda(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return value.cuda()
    return tree_map(lambda one: one.cuda() if isinstance(one, Tensor) else one, value)
