"""Substitution below the diagonal of a matrix that comes in blocks of rows, for numpy and torch.

Blocks are read where they lie. Of a stored matrix only the squares on its diagonal are copied, and
what stands on the diagonal or above it does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Bool, Float

from flowtracer_plugin.flow.backends import backend_of

BLOCK = 256
"""Rows of a stored matrix that are substituted at once. From 64 to 512 it makes no difference."""

Rows = Callable[[int, int], Any]
"""`rows(start, stop)` are these rows, `[*batch, row, column]`, up to the column `stop`. They may be
the matrix itself, so they are not written to."""

Visit = Callable[[int, int, Any, Any], None]
"""Takes the ends of a block, its rows, and the solution as far as it is known."""


def stored(matrix: Float[Any, "*batch token token"]) -> Rows:
    """The rows of a matrix that lies in memory."""
    return lambda start, stop: matrix[..., start:stop, :stop]


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
    """Solve `x = rhs + L x`, or with `L.T` if `transposed`, by blocks from one end to the other.

    `L` is what `rows` hold below the diagonal, at the `queries` and `keys` that are chosen.
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
    """Solve a block, then push it on to all earlier tokens."""
    inside = slice(start, stop)
    x[..., inside] = _solve_square(part, x, start, stop, queries, keys, transposed=True)
    if start:
        leaving = _only(queries[..., inside], x[..., inside])
        x[..., :start] += _only(keys[..., :start], _times(leaving, part[..., :start]))


def _forwards(part: Any, x: Any, start: int, stop: int, queries: Any, keys: Any) -> None:
    """Gather what comes from all earlier tokens, then solve the block."""
    inside = slice(start, stop)
    if start:
        leaving = _only(keys[..., :start], x[..., :start])
        arriving = _times(leaving, part[..., :start].mT)
        x[..., inside] += _only(queries[..., inside], arriving)
    x[..., inside] = _solve_square(part, x, start, stop, queries, keys, transposed=False)


def _solve_square(
    part: Any, x: Any, start: int, stop: int, queries: Any, keys: Any, *, transposed: bool
) -> Any:
    backend, inside = backend_of(x), slice(start, stop)
    square = backend.xp.tril(part[..., start:stop], -1)
    square *= queries[..., inside, None]
    square *= keys[..., None, inside]
    return backend.small(-square, x[..., inside], transposed=transposed)


def _only(mask: Any, values: Any) -> Any:
    """The values where the mask is set, 0 elsewhere, even for those that have overflowed."""
    return backend_of(values).xp.where(mask, values, 0)


def _times(vector: Any, matrix: Any) -> Any:
    """From the left: torch multiplies batches with a vector on the right twenty times slower."""
    return (vector[..., None, :] @ matrix)[..., 0, :]


def below(rows: Rows, vector: Float[Any, "*batch token"], block: int = BLOCK) -> Any:
    """What is below the diagonal, times a vector."""
    xp, length = backend_of(vector).xp, vector.shape[-1]
    product = xp.zeros_like(vector)
    for start in range(0, length, block):
        stop = min(start + block, length)
        part, inside = rows(start, stop), slice(start, stop)
        square = xp.tril(part[..., start:stop], -1)
        product[..., inside] = _times(vector[..., inside], square.mT)
        if start:
            product[..., inside] += _times(vector[..., :start], part[..., :start].mT)
    return product


def above(matrix: Float[Any, "*batch token token"], block: int = BLOCK) -> Any:
    """The sum of what is above the diagonal.

    Products with ones: BLAS reads what is strided much faster than a reduction does.
    """
    xp, length = backend_of(matrix).xp, matrix.shape[-1]
    ones = xp.ones_like(matrix[..., 0])
    total = xp.zeros_like(matrix[..., 0, 0])
    for start in range(0, length, block):
        stop = min(start + block, length)
        part = matrix[..., start:stop, start:]
        total = total + xp.triu(part[..., : stop - start], 1).sum((-2, -1))
        with backend_of(matrix).exact(matrix):
            total = total + _times(ones[..., start:stop], part[..., stop - start :]).sum(-1)
    return total.sum()


def solve(
    edges: Any, rhs: Any, *, transposed: bool = False, queries: Any = None, keys: Any = None
) -> Any:
    """Solve `x = rhs + L x`, or with `L.T` if `transposed`, at the chosen queries and keys.

    `edges` are a graph, a batch, or a tuple of sparse graphs and a row of `rhs` each.
    """
    if not isinstance(edges, tuple):
        solve_one = backend_of(edges).solve or _solve_dense
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
    """`L x` for a graph, a batch, or a tuple of sparse graphs."""
    if not isinstance(edges, tuple):
        backend = backend_of(edges)
        with backend.exact(vector):
            return (backend.product or _dense_product)(edges, vector)
    pairs = zip(edges, vector, strict=True)
    return backend_of(vector).xp.stack([product(one, each) for one, each in pairs])


def _solve_dense(edges: Any, rhs: Any, **how: Any) -> Any:
    return substitute(stored(edges), rhs, **how)


def _dense_product(edges: Any, vector: Any) -> Any:
    return below(stored(edges), vector)
