"""Substitution with the part of a matrix below its diagonal, for every kind of array.

A dense matrix comes in blocks of rows, which are read in place: only the squares on the diagonal
are copied. Values on the diagonal or above it do not count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Bool, Float

from flowtracer_plugin.flow.dispatch import backend_of

BLOCK = 256
"""Rows of a stored matrix that are substituted at once. From 64 to 512 it makes no difference."""

Rows = Callable[[int, int], Any]
"""`rows(start, stop)` returns these rows, `[*batch, row, column]`, up to column `stop`. They can be
a view of the matrix, so nothing writes to them."""

Visit = Callable[[int, int, Any, Any], None]
"""Called for each block with its start, its stop, its rows, and the solution known so far."""


def stored(matrix: Float[Any, "*batch token token"]) -> Rows:
    """The rows of a matrix that is in memory."""
    return lambda start, stop: matrix[..., start:stop, :stop]


def kept_between(rows: Rows, room: int) -> Rows:
    """The same rows for two passes, of which those that fit in `room` bytes are computed once.

    Each block is kept until it is asked for again, or until later ones need its room. So after a
    pass from the end, the blocks at the beginning are kept, for the pass that starts there.
    """
    kept: dict[tuple[int, int], Any] = {}

    def ask(start: int, stop: int) -> Any:
        if (start, stop) in kept:
            return kept.pop((start, stop))
        part = kept[start, stop] = rows(start, stop)
        while sum(one.nbytes for one in kept.values()) > room:
            del kept[next(iter(kept))]
        return part

    return ask


def substitute(
    rows: Rows,
    rhs: Float[Any, "*batch token"],
    *,
    transposed: bool,
    queries: Bool[Any, "*batch token"] | None = None,
    keys: Bool[Any, "*batch token"] | None = None,
    block: int = BLOCK,
    visit: Visit | None = None,
) -> Float[Any, "*batch token"]:
    """The solution of `x = rhs + L x`, or with `L.T` if `transposed`, found block by block.

    `L` holds the values of `rows` below the diagonal, at the chosen `queries` and `keys`.
    """
    step = _backwards if transposed else _forwards
    xp, length = backend_of(rhs).xp, rhs.shape[-1]
    everywhere = xp.ones_like(rhs, dtype=xp.bool)
    masks = tuple(everywhere if mask is None else mask for mask in (queries, keys))
    solution = xp.asarray(rhs, copy=True)
    starts = range(0, length, block)
    for start in reversed(starts) if transposed else starts:
        stop = min(start + block, length)
        with backend_of(rhs).exact(rhs):
            part = rows(start, stop)
            step(part, solution, start, stop, *masks)
            if visit is not None:
                visit(start, stop, part, solution)
    return solution


def _backwards(part: Any, x: Any, start: int, stop: int, queries: Any, keys: Any) -> None:
    """Solve a block, then add its part to all earlier tokens."""
    inside = slice(start, stop)
    x[..., inside] = _solve_square(part, x, start, stop, queries, keys, transposed=True)
    if start:
        leaving = _masked(queries[..., inside], x[..., inside])
        x[..., :start] += _masked(keys[..., :start], _vecmat(leaving, part[..., :start]))


def _forwards(part: Any, x: Any, start: int, stop: int, queries: Any, keys: Any) -> None:
    """Add the parts of all earlier tokens, then solve the block."""
    inside = slice(start, stop)
    if start:
        leaving = _masked(keys[..., :start], x[..., :start])
        arriving = _vecmat(leaving, part[..., :start].mT)
        x[..., inside] += _masked(queries[..., inside], arriving)
    x[..., inside] = _solve_square(part, x, start, stop, queries, keys, transposed=False)


def _solve_square(
    part: Any, x: Any, start: int, stop: int, queries: Any, keys: Any, *, transposed: bool
) -> Any:
    backend, inside = backend_of(x), slice(start, stop)
    square = backend.xp.tril(part[..., start:stop], -1)
    square *= queries[..., inside, None]
    square *= keys[..., None, inside]
    return backend.solve(-square, x[..., inside], transposed=transposed)


def _masked(mask: Any, values: Any) -> Any:
    """The values where the mask is set, and 0 elsewhere, even in place of nan or infinity."""
    return backend_of(values).xp.where(mask, values, 0)


def _vecmat(vector: Any, matrix: Any) -> Any:
    """Vector times matrix: for batches, torch is twenty times slower at matrix times vector."""
    return (vector[..., None, :] @ matrix)[..., 0, :]


def lower_product(rows: Rows, vector: Float[Any, "*batch token"], block: int = BLOCK) -> Any:
    """The part of a matrix below its diagonal, times a vector."""
    xp, length = backend_of(vector).xp, vector.shape[-1]
    product = xp.zeros_like(vector)
    for start in range(0, length, block):
        stop = min(start + block, length)
        part, inside = rows(start, stop), slice(start, stop)
        square = xp.tril(part[..., start:stop], -1)
        product[..., inside] = _vecmat(vector[..., inside], square.mT)
        if start:
            product[..., inside] += _vecmat(vector[..., :start], part[..., :start].mT)
    return product


def upper_sum(matrix: Float[Any, "*batch token token"], block: int = BLOCK) -> Any:
    """The sum of the values above the diagonal.

    It multiplies with ones, since BLAS reads strided memory much faster than a reduction does.
    """
    xp, length = backend_of(matrix).xp, matrix.shape[-1]
    ones = xp.ones_like(matrix[..., 0])
    total = xp.zeros_like(matrix[..., 0, 0])
    for start in range(0, length, block):
        stop = min(start + block, length)
        part = matrix[..., start:stop, start:]
        total = total + xp.triu(part[..., : stop - start], 1).sum((-2, -1))
        with backend_of(matrix).exact(matrix):
            total = total + _vecmat(ones[..., start:stop], part[..., stop - start :]).sum(-1)
    return total.sum()


def solve(
    edges: Any, rhs: Any, *, transposed: bool = False, queries: Any = None, keys: Any = None
) -> Any:
    """The solution of `x = rhs + L x`, or with `L.T`, at the chosen queries and keys.

    `edges` are a graph, a batch, or a tuple of sparse graphs with one row of `rhs` each.
    """
    if isinstance(edges, tuple):
        nothing = [None] * len(edges)
        masks = (nothing if mask is None else mask for mask in (queries, keys))
        rows = zip(edges, rhs, *masks, strict=True)
        return backend_of(rhs).xp.stack(
            [solve(one, b, transposed=transposed, queries=q, keys=k) for one, b, q, k in rows]
        )
    backend = backend_of(edges)
    if backend.entries is None:
        return substitute(stored(edges), rhs, transposed=transposed, queries=queries, keys=keys)
    system = -edges
    query, key, values = backend.entries(system)
    if queries is not None:
        values *= queries[query]
    if keys is not None:
        values *= keys[key]
    return backend.solve(system, rhs, transposed=transposed)


def product(edges: Any, vector: Any) -> Any:
    """`L x` for a graph, a batch, or a tuple of sparse graphs."""
    if isinstance(edges, tuple):
        pairs = zip(edges, vector, strict=True)
        return backend_of(vector).xp.stack([product(one, each) for one, each in pairs])
    backend = backend_of(edges)
    with backend.exact(vector):
        return lower_product(stored(edges), vector) if backend.entries is None else edges @ vector
