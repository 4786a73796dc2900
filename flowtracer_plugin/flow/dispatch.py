"""The backend for each kind of array that can hold a graph."""

from __future__ import annotations

import sys
from typing import Any, Literal

import numpy as np

from flowtracer_plugin.flow.arrays import Backend


def backend_of(array: Any) -> Backend:
    """The backend for this array. It imports no library that the caller has not imported."""
    if isinstance(array, np.ndarray):
        from flowtracer_plugin.flow.numpy_arrays import NUMPY

        return NUMPY
    torch, sparse = sys.modules.get("torch"), sys.modules.get("scipy.sparse")
    if torch is not None and isinstance(array, torch.Tensor):
        from flowtracer_plugin.flow.torch_arrays import TORCH, TORCH_CSR

        return {torch.strided: TORCH, torch.sparse_csr: TORCH_CSR}.get(array.layout) or _refuse(
            f"a torch tensor with layout {array.layout}; call .to_sparse_csr() first"
        )
    if sparse is not None and sparse.issparse(array):
        from flowtracer_plugin.flow.scipy_arrays import SCIPY

        return SCIPY
    return _refuse(f"{type(array).__name__}; convert it first, for example with numpy.asarray")


def _refuse(found: str) -> Backend:
    raise TypeError(
        "attention must be a numpy array, a torch tensor (dense or sparse CSR), a scipy sparse "
        f"array, or a list of sparse ones, got {found}"
    )


def scale(edges: Any, factors: Any, *, of: Literal["query", "key"]) -> Any:
    """The edges, each row (query) or column (key) multiplied in place by its token's factor."""
    if isinstance(edges, tuple):
        return tuple(scale(one, each, of=of) for one, each in zip(edges, factors, strict=True))
    backend = backend_of(edges)
    if backend.entries is None:
        edges *= factors[..., :, None] if of == "query" else factors[..., None, :]
    else:
        query, key, values = backend.entries(edges)
        values *= factors[query if of == "query" else key]
    return edges
