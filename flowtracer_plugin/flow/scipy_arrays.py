"""Scipy sparse arrays: SuperLU substitution, O(edges)."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from scipy.sparse.linalg import spsolve_triangular

from flowtracer_plugin.flow.arrays import working_dtype
from flowtracer_plugin.flow.numpy_arrays import NUMPY

Entries = tuple[Int[np.ndarray, " edge"], Int[np.ndarray, " edge"], Float[np.ndarray, " edge"]]


def read(attention: Any) -> csr_array:
    """The attention as floats in CSR; duplicate entries are summed when it is assembled."""
    return csr_array(attention, dtype=working_dtype(attention))


def entries(edges: csr_array) -> Entries:
    """Query, key and value of every stored edge, by rows."""
    query = np.repeat(np.arange(edges.shape[0]), np.diff(edges.indptr))
    return query, edges.indices, edges.data


def assemble(like: csr_array, query: Any, key: Any, value: Any) -> csr_array:
    """A matrix of the same shape from other edges, in canonical format."""
    return csr_array((value, (query, key)), shape=like.shape)


def solve(
    system: csr_array, rhs: Float[np.ndarray, " token"], *, transposed: bool
) -> Float[np.ndarray, " token"]:
    """Substitution along the stored edges; the transpose is a view in CSC, which is as fast."""
    matrix = system.T if transposed else system
    return spsolve_triangular(matrix, rhs, lower=not transposed, unit_diagonal=True)


SCIPY = NUMPY._replace(
    read=read,
    entries=entries,
    assemble=assemble,
    solve=solve,
    sparsify=None,
    densify=csr_array.toarray,
    crossover=0.03,
)
