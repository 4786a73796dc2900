"""Dense numpy arrays: BLAS, and LAPACK through scipy.linalg."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.linalg import solve_triangular

from flowtracer_plugin.flow.arrays import Backend, working_dtype


def read(attention: np.ndarray) -> Float[np.ndarray, "..."]:
    """The attention as floats, in the machine's byte order."""
    return np.asarray(attention, dtype=working_dtype(attention))


def extremes(values: np.ndarray) -> tuple[Any, Any]:
    """The smallest and the largest number; each part is still in cache for the second search."""
    rows = np.atleast_2d(values)
    parts = [rows[..., start : start + 32, :] for start in range(0, rows.shape[-2], 32)]
    found = np.array([(part.min(), part.max()) for part in parts])
    return found[:, 0].min(), found[:, 1].max()


def mask(values: Any, _: Any) -> np.ndarray:
    """The mask as a numpy array."""
    return np.asarray(values)


def solve(
    system: Float[np.ndarray, "*batch token token"],
    rhs: Float[np.ndarray, "*batch token"],
    *,
    transposed: bool,
) -> Float[np.ndarray, "*batch token"]:
    """Substitution, one graph after the other."""
    if system.ndim == 3:
        rows = zip(system, rhs, strict=True)
        return np.stack([solve(one, b, transposed=transposed) for one, b in rows])
    return solve_triangular(
        system,
        rhs,
        lower=True,
        trans="T" if transposed else "N",
        unit_diagonal=True,
        check_finite=False,
    )


def exact(_: Any) -> AbstractContextManager[None]:
    """Nothing to do: numpy has no autocast."""
    return nullcontext()


def sparsify(edges: Float[np.ndarray, "query key"]) -> Any:
    """The graph as a scipy csr_array."""
    from scipy.sparse import csr_array

    return csr_array(edges)


NUMPY = Backend(
    xp=np,
    read=read,
    extremes=extremes,
    mask=mask,
    solve=solve,
    exact=exact,
    sparsify=sparsify,
)
