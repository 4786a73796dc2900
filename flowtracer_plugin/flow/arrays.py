"""The few operations that differ between the kinds of array that can hold a graph.

Everything else is written once for numpy and torch: `xp` is the module that owns the array, and
only functions that both modules spell the same way are called on it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple


class Backend(NamedTuple):
    """The operations of one kind of array.

    A dense backend has no `entries` and no `assemble`.

    Attributes:
        xp: The module, numpy or torch, of the masks and of everything with one number per token.
        read: A matrix as float32 or float64, detached from autograd, in the module's normal form.
        extremes: The smallest and the largest number of a dense array that is not empty.
        mask: A list or array as an array of `xp`, on the device of the given matrix.
        solve: The solution of `(I + S) x = rhs` for a strictly lower `S` of this kind, or with
            `S.T` if `transposed`.
        exact: A context in which products are not rounded to the precision of autocast.
        entries: Query, key and value of every stored number; the values are not a copy.
        assemble: A matrix like the given one, from queries, keys and values in row order.
        sparsify: The sparse form of one dense graph.
        densify: The dense form of one sparse graph.
        crossover: The density from which a sparse graph is solved faster after conversion to dense,
            conversion included, as `benchmarks/README.md` shows.
    """

    xp: Any
    read: Callable[[Any], Any]
    extremes: Callable[[Any], tuple[Any, Any]]
    mask: Callable[[Any, Any], Any]
    solve: Callable[..., Any]
    exact: Callable[[Any], AbstractContextManager[Any]]
    entries: Callable[[Any], tuple[Any, Any, Any]] | None = None
    assemble: Callable[[Any, Any, Any, Any], Any] | None = None
    sparsify: Callable[[Any], Any] | None = None
    densify: Callable[[Any], Any] | None = None
    crossover: float = 0.0


def dtype_name(array: Any) -> str:
    """The name of the array's dtype, spelled alike for numpy and torch, such as "float32"."""
    return getattr(array.dtype, "name", str(array.dtype).removeprefix("torch."))


def working_dtype(array: Any) -> str:
    """The name of the dtype to compute in: half becomes single, integers become double precision.

    Raises:
        TypeError: The dtype is complex, of extended precision, or not a number.
    """
    name = dtype_name(array)
    if name in ("float32", "float64"):
        return name
    if name in ("float16", "bfloat16"):
        return "float32"
    if name.startswith(("bool", "int", "uint")):
        return "float64"
    raise TypeError(f"attention must hold real numbers of at most 64 bits, got dtype {name}")
