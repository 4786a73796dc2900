"""The checks of attention and masks, and the messages of their errors.

Every number is checked on its own device, and the host waits for that device once, for all checks
together. Only if one fails does a second search find the number that is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np

from flowtracer_plugin.flow.arrays import check_readable, dtype_name, mask_on_host
from flowtracer_plugin.flow.dispatch import backend_of
from flowtracer_plugin.flow.substitution import upper_sum


def read_matrices(attention: Any) -> list[Any]:
    """The attention as a list of matrices: one, or all those of a sparse batch."""
    if not isinstance(attention, list | tuple):
        return [_read(attention)]
    if not attention:
        raise ValueError("attention must hold at least one sparse matrix, got an empty list")
    matrices = [_read(one) for one in attention]
    backends = [backend_of(one) for one in matrices]
    kinds = {(backend, tuple(one.shape)) for backend, one in zip(backends, matrices, strict=True)}
    if len(kinds) > 1 or backends[0].entries is None:
        found = ", ".join(f"{type(one).__name__} {tuple(one.shape)}" for one in matrices)
        raise ValueError(
            "a list of attentions must hold sparse matrices of one kind and one shape, got "
            f"{found}; stack dense ones, and pad sparse ones with empty rows and columns"
        )
    return matrices


def _read(attention: Any) -> Any:
    check_readable("attention", attention, sparse=True)
    backend = backend_of(attention)
    shape = tuple(attention.shape)
    if len(shape) not in (2, 3) or shape[-1] != shape[-2]:
        raise ValueError(
            "attention must be [query, key] or [batch, query, key] and square, "
            f"got shape {shape}; average over layers and heads first"
        )
    if 0 in shape:
        raise ValueError(f"attention must hold at least one token, got shape {shape}")
    return backend.read(attention)


def read_mask(name: str, mask: Any, beside: Any, shape: tuple[int, ...]) -> Any:
    """The mask in the library and on the device of the matrix; its values are not checked yet."""
    device = str(getattr(beside, "device", "cpu"))
    if isinstance(mask, list | tuple | np.ndarray):
        mask = mask_on_host(name, mask)
    elif str(getattr(mask, "device", "unknown")) != device:
        found = getattr(mask, "device", type(mask).__name__)
        remedy = "move it there first" if hasattr(mask, "device") else "pass a list of booleans"
        raise ValueError(
            f"{name} must be a list, or an array on {device} like the attention, got {found}; "
            f"{remedy}"
        )
    check_readable(name, mask)
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"{name} must have shape {shape}, one value per token of the attention, "
            f"got {tuple(mask.shape)}"
        )
    if not dtype_name(mask).startswith(("bool", "int", "uint")):
        raise TypeError(
            f"{name} must hold booleans, or 0 and 1, got dtype {dtype_name(mask)}; "
            f"write for example {name} > 0.5"
        )
    return backend_of(beside).mask(mask, beside)


class Check(NamedTuple):
    """A check that has been made on the device, and that the host has not read yet.

    Attributes:
        sound: Whether all is well: one boolean, in an array of the device.
        explain: Raises the error that says what is wrong.
    """

    sound: Any
    explain: Callable[[], NoReturn]


def read_checks(checks: Sequence[Check], *numbers: Any) -> list[int]:
    """The values of some whole numbers, copied to the host together with all checks.

    Raises:
        Exception: The error of the first check that has failed.
    """
    wanted = [check.sound for check in checks] + list(numbers)
    xp = np if isinstance(wanted[0], np.generic) else backend_of(wanted[0]).xp
    read = xp.stack([xp.asarray(one, dtype=xp.int64) for one in wanted]).tolist()
    for check, sound in zip(checks, read, strict=False):
        if not sound:
            check.explain()
    return list(read[len(checks) :])


def check_numbers(matrices: Sequence[Any], masks: Mapping[str, Any], *, listed: bool) -> Check:
    """The check of all numbers, whose error is a ValueError about the first wrong one.

    `listed` says that the matrices are a sparse batch.
    """
    xp = backend_of(matrices[0]).xp
    with np.errstate(all="ignore"):  # opposite infinities add up to nan, which is found
        sound = [_is_sound(one) for one in matrices] + [_is_mask(mask) for mask in masks.values()]
        every = xp.stack(sound).all()
    return Check(every, partial(_explain_first, matrices, masks, listed=listed))


def _explain_first(matrices: Sequence[Any], masks: Mapping[str, Any], *, listed: bool) -> NoReturn:
    with np.errstate(all="ignore"):
        for row, matrix in enumerate(matrices):
            if not _is_sound(matrix):
                _explain(matrix, f"batch row {row}, " if listed else "")
    for name, mask in masks.items():
        if not _is_mask(mask):
            _explain_mask(name, mask)
    raise AssertionError("unreachable: all numbers are sound")


def _is_sound(matrix: Any) -> Any:
    backend = backend_of(matrix)
    if backend.entries is None:
        values, any_ahead = matrix, upper_sum(matrix) != 0
    else:
        values, ahead = _parts(matrix)
        any_ahead = ahead.any()
    if 0 in values.shape:  # a sparse matrix without an edge has no smallest value
        return ~any_ahead
    # nan fails both comparisons
    smallest, largest = backend.extremes(values)
    return ~any_ahead & (smallest >= 0) & (largest < math.inf)


def _parts(matrix: Any) -> tuple[Any, Any]:
    """The stored values, and which of them look ahead, from a query to a later key."""
    backend = backend_of(matrix)
    if backend.entries is None:
        return matrix, backend.xp.triu(matrix != 0, 1)
    query, key, values = backend.entries(matrix)
    return values, (key > query) & (values != 0)


def _is_mask(mask: Any) -> Any:
    marked = mask == 1
    return (marked | (mask == 0)).all() & marked.any(-1).all()


def _explain(matrix: Any, prefix: str) -> NoReturn:
    backend, (values, ahead) = backend_of(matrix), _parts(matrix)
    xp = backend.xp
    finite = xp.isfinite(values)
    for bad, rule, remedy in (
        (~finite, "be finite", "a fully masked row makes softmax return nan: set it to zero"),
        (finite & (values < 0), "not be negative", "pass probabilities, not scores"),
        (ahead, "be lower triangular", "rows must be queries: is it transposed?"),
    ):
        if bad.any():
            place = tuple(int(axis) for axis in xp.argwhere(bad)[0])
            value = float(values[place])
            if backend.entries is not None:
                query, key, _ = backend.entries(matrix)
                place = int(query[place]), int(key[place])
            axes = ("batch row", "query", "key")[-len(place) :]
            at = ", ".join(f"{axis} {index}" for axis, index in zip(axes, place, strict=True))
            raise ValueError(f"attention must {rule}, got {value:g} at {prefix}{at}; {remedy}")
    raise AssertionError("unreachable: the matrix is sound")


def _explain_mask(name: str, mask: Any) -> NoReturn:
    outside = mask[(mask != 0) & (mask != 1)]
    if len(outside):
        raise ValueError(f"{name} must hold booleans, or 0 and 1, got {int(outside[0])}")
    raise ValueError(
        f"{name} must mark at least one token{rows_without((mask == 1).any(-1))}, got none"
    )


def rows_without(found: Any) -> str:
    """The batch rows whose boolean is false, in words for a message; "" for a single graph."""
    if not found.ndim:
        return ""
    return f" in batch rows {[row for row, good in enumerate(found.tolist()) if not good]}"
