"""The few operations that differ between the kinds of array that can hold a graph.

Everything else is written once for numpy and torch: `xp` is the module that owns the array, and
only functions that both modules spell the same way are called on it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np


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


def check_readable(name: str, array: Any, *, sparse: bool = False, axes: int = 64) -> None:
    """Refuse an array that does not hold a number at every place; `sparse` tensors may be allowed.

    Lists may be nested as deeply as numpy's arrays have `axes`.

    Raises:
        TypeError: It is masked, nested, sparse or on the meta device, or a list that holds such
            arrays.
        ValueError: It is a list that is nested too deeply, such as one that holds itself.
    """
    if isinstance(array, list | tuple):
        if not axes:
            raise ValueError(f"{name} must be a list of numbers, found lists nested too deeply")
        for one in array:
            if not isinstance(one, int | float):
                check_readable(name, one, axes=axes - 1)
        return
    found = _unreadable(name, array, sparse=sparse)
    if found is not None:
        raise TypeError(f"{name} must not be {found}")


def _unreadable(name: str, array: Any, *, sparse: bool) -> str | None:
    """The kind of an array that cannot be read, and what to pass instead."""
    if isinstance(array, np.ma.MaskedArray):
        return f"a masked array; pass {name}.filled(0)"
    torch, matrices = sys.modules.get("torch"), sys.modules.get("scipy.sparse")
    if matrices is not None and matrices.issparse(array) and not sparse:
        return f"a sparse array; pass {name}.toarray()"
    if torch is None or not isinstance(array, torch.Tensor):
        return None
    if array.is_nested:
        return f"a nested tensor; pass torch.nested.to_padded_tensor({name}, 0)"
    if type(array).__name__ == "MaskedTensor":
        return f"a masked tensor; pass {name}.to_tensor(0)"
    if array.device.type == "meta":
        return "a tensor on the meta device, which holds no numbers"
    if array.layout is not torch.strided and not sparse:
        return f"a sparse tensor; pass {name}.to_dense()"
    return None


def mask_on_host(name: str, mask: Any) -> np.ndarray:
    """A list or an array of booleans, or of 0 and 1, as a numpy array; the numbers are not checked.

    Raises:
        TypeError: It is not an array, or holds something else than booleans and whole numbers.
        ValueError: It is a list of rows of different lengths.
    """
    check_readable(name, mask)
    if hasattr(mask, "detach"):  # a torch tensor, on any device
        mask = mask.detach().cpu()
    try:
        array = np.asarray(mask)
    except ValueError as error:
        raise ValueError(
            f"{name} must hold one value per token in rows of one length: {error}"
        ) from error
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{name} must be a list or an array of booleans: {error}") from error
    if array.dtype.kind == "O":
        whole = int, np.integer, np.bool
        odd = [one for one in array.flat if not isinstance(one, whole) or one not in (0, 1)]
        found = f"{odd[0]!r:.80}" if odd else "dtype object"
        raise TypeError(f"{name} must hold booleans, or 0 and 1, got {found}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)
