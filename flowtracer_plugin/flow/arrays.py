"""The few operations in which the kinds of array differ that can hold a graph.

Everything else is written once, for numpy and torch alike: `xp` is whichever of the two modules
owns the array, and only functions that both spell the same way are called on it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple


class Backend(NamedTuple):
    """What one kind of array needs.

    Dense arrays have no `entries`, `assemble`, `solve` and `product`: `substitution` solves them
    and multiplies with them where they lie.

    `L` is what a matrix holds below its diagonal; of sparse ones, that is all there is.

    Attributes:
        xp: numpy or torch, the library of the masks and of everything that is one number per token.
        read: a matrix as float32 or float64, off the autograd tape, in its library's normal form.
        extremes: the smallest and the largest number of a dense array that is not empty.
        mask: a list or array as an array of `xp`, where the given matrix lies.
        small: `(I + S) x = rhs` for a dense strictly lower S, or with `S.T`.
        exact: a context in which products beside an array are not rounded, as autocast does.
        entries: the query, the key and the value of every stored number; the values are no copy.
        assemble: a matrix like the given one, from queries, keys and values in row order.
        solve: `x = rhs + L x`, or with `L.T` if `transposed`, restricted to some queries and keys.
        product: `L x`.
        sparsify: the sparse form of one dense graph.
        densify: the dense form of one sparse graph.
        crossover: the density from which it pays to make a sparse graph dense before it is solved,
            conversion included, as `benchmarks/README.md` shows.
    """

    xp: Any
    read: Callable[[Any], Any]
    extremes: Callable[[Any], tuple[Any, Any]]
    mask: Callable[[Any, Any], Any]
    small: Callable[..., Any]
    exact: Callable[[Any], AbstractContextManager[Any]]
    entries: Callable[[Any], tuple[Any, Any, Any]] | None = None
    assemble: Callable[[Any, Any, Any, Any], Any] | None = None
    solve: Callable[..., Any] | None = None
    product: Callable[[Any, Any], Any] | None = None
    sparsify: Callable[[Any], Any] | None = None
    densify: Callable[[Any], Any] | None = None
    crossover: float = 0.0


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


def restricted(edges: Any, entries: Callable[[Any], Any], queries: Any, keys: Any) -> Any:
    """The negated copy of one sparse graph, without what other queries pay, or other keys get."""
    system = -edges
    query, key, values = entries(system)
    if queries is not None:
        values *= queries[query]
    if keys is not None:
        values *= keys[key]
    return system
