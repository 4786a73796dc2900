"""The kinds of array that hold a graph, and the few operations in which they differ.

Everything else is written once, for numpy and torch alike: `xp` is whichever of the two modules
owns the array, and only functions that both spell the same way are called on it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import numpy as np


class Backend(NamedTuple):
    """What one kind of array needs; `entries` and `assemble` are None for dense arrays.

    `L` is what a matrix holds below its diagonal; of sparse ones, that is all there is.

    Attributes:
        xp: numpy or torch, the library of the masks and of everything that is one number per token.
        read: a matrix as float32 or float64, off the autograd tape, in its library's normal form.
        extremes: the smallest and the largest number of a dense array that is not empty.
        mask: a list or array as an array of `xp`, where the given matrix lies.
        solve: `x = rhs + L x`, or with `L.T` if `transposed`, restricted to some queries and keys.
        product: `L x`.
        small: `(I + S) x = rhs` for a dense strictly lower S, or with `S.T`.
        exact: a context in which products beside an array are not rounded, as autocast does.
        entries: the query, the key and the value of every stored number; the values are no copy.
        assemble: a matrix like the given one, from queries, keys and values in row order.
        sparsify: the sparse form of one dense graph.
        densify: the dense form of one sparse graph.
        crossover: the density from which it pays to make a sparse graph dense before it is solved,
            conversion included, as `benchmarks/README.md` shows.
    """

    xp: Any
    read: Callable[[Any], Any]
    extremes: Callable[[Any], tuple[Any, Any]]
    mask: Callable[[Any, Any], Any]
    solve: Callable[..., Any]
    product: Callable[[Any, Any], Any]
    small: Callable[..., Any]
    exact: Callable[[Any], AbstractContextManager[Any]]
    entries: Callable[[Any], tuple[Any, Any, Any]] | None = None
    assemble: Callable[[Any, Any, Any, Any], Any] | None = None
    sparsify: Callable[[Any], Any] | None = None
    densify: Callable[[Any], Any] | None = None
    crossover: float = 0.0


def backend_of(array: Any) -> Backend:
    """The backend for this array; no library is imported that the caller has not imported."""
    if isinstance(array, np.ndarray):
        from flowtracer_plugin._flow_numpy import NUMPY

        return NUMPY
    torch, sparse = sys.modules.get("torch"), sys.modules.get("scipy.sparse")
    if torch is not None and isinstance(array, torch.Tensor):
        from flowtracer_plugin._flow_torch import TORCH, TORCH_CSR

        return {torch.strided: TORCH, torch.sparse_csr: TORCH_CSR}.get(array.layout) or _refuse(
            f"a torch tensor with layout {array.layout}; call .to_sparse_csr() first"
        )
    if sparse is not None and sparse.issparse(array):
        from flowtracer_plugin._flow_scipy import SCIPY

        return SCIPY
    return _refuse(f"{type(array).__name__}; convert it first, for example with numpy.asarray")


def _refuse(found: str) -> Backend:
    raise TypeError(
        "attention must be a numpy array, a torch tensor (dense or sparse CSR), a scipy sparse "
        f"array, or a list of sparse ones, got {found}"
    )


def dtype_name(array: Any) -> str:
    """The name that numpy and torch share for a dtype, such as "float32"."""
    return getattr(array.dtype, "name", str(array.dtype).removeprefix("torch."))


def working_dtype(array: Any) -> str:
    """The precision to compute in: half becomes single, whole numbers become double.

    Raises:
        TypeError: for complex and extended precision, and for anything that is not a number.
    """
    name = dtype_name(array)
    if name in ("float32", "float64"):
        return name
    if name in ("float16", "bfloat16"):
        return "float32"
    if name.startswith(("bool", "int", "uint")):
        return "float64"
    raise TypeError(f"attention must hold real numbers of at most 64 bits, got dtype {name}")


def scale(edges: Any, factors: Any, *, of: Literal["query", "key"]) -> Any:
    """Multiply, in place, every row (query) or every column (key) by the factor of its token."""
    if isinstance(edges, tuple):
        return tuple(scale(one, each, of=of) for one, each in zip(edges, factors, strict=True))
    backend = backend_of(edges)
    if backend.entries is None:
        edges *= factors[..., :, None] if of == "query" else factors[..., None, :]
    else:
        query, key, values = backend.entries(edges)
        values *= factors[query if of == "query" else key]
    return edges


def solve(
    edges: Any, rhs: Any, *, transposed: bool = False, queries: Any = None, keys: Any = None
) -> Any:
    """`Backend.solve` for a graph, a batch, or a tuple of sparse graphs and a row of `rhs` each."""
    if not isinstance(edges, tuple):
        solve_one = backend_of(edges).solve
        return solve_one(edges, rhs, transposed=transposed, queries=queries, keys=keys)
    nothing = [None] * len(edges)
    rows = zip(
        edges,
        rhs,
        nothing if queries is None else queries,
        nothing if keys is None else keys,
        strict=True,
    )
    return backend_of(rhs).xp.stack(
        [solve(one, b, transposed=transposed, queries=q, keys=k) for one, b, q, k in rows]
    )


def product(edges: Any, vector: Any) -> Any:
    """`Backend.product` for a graph, a batch, or a tuple of sparse graphs."""
    if not isinstance(edges, tuple):
        backend = backend_of(edges)
        with backend.exact(vector):
            return backend.product(edges, vector)
    pairs = zip(edges, vector, strict=True)
    return backend_of(vector).xp.stack([product(one, each) for one, each in pairs])


def restricted(edges: Any, queries: Any, keys: Any) -> Any:
    """The negated copy of one sparse graph, without what other queries pay, or other keys get."""
    system = -edges
    if queries is not None:
        scale(system, queries, of="query")
    if keys is not None:
        scale(system, keys, of="key")
    return system
