"""Scipy sparse arrays: SuperLU substitution, O(edges)."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from scipy.sparse.linalg import spsolve_triangular

from flowtracer_plugin.flow.arrays import Backend, restricted, working_dtype
from flowtracer_plugin.flow.numpy_arrays import exact, extremes, mask, small

Entries = tuple[Int[np.ndarray, " edge"], Int[np.ndarray, " edge"], Float[np.ndarray, " edge"]]


def read(attention: Any) -> csr_array:
    """The attention as floats in CSR; what is stored twice counts as its sum once assembled."""
    return csr_array(attention, dtype=working_dtype(attention))


def entries(edges: csr_array) -> Entries:
    """Query, key and value of every stored edge, by rows."""
    query = np.repeat(np.arange(edges.shape[0]), np.diff(edges.indptr))
    return query, edges.indices, edges.data


def assemble(like: csr_array, query: Any, key: Any, value: Any) -> csr_array:
    """A matrix of the same shape from other edges, in canonical format."""
    return csr_array((value, (query, key)), shape=like.shape)


def solve(
    edges: csr_array,
    rhs: Float[np.ndarray, " token"],
    *,
    transposed: bool,
    queries: Bool[np.ndarray, " token"] | None = None,
    keys: Bool[np.ndarray, " token"] | None = None,
) -> Float[np.ndarray, " token"]:
    """Substitution along the stored edges; the transpose is a view in CSC, which is as good."""
    system = restricted(edges, entries, queries, keys)
    matrix = system.T if transposed else system
    return spsolve_triangular(matrix, rhs, lower=not transposed, unit_diagonal=True)


def product(edges: csr_array, vector: Float[np.ndarray, " token"]) -> Float[np.ndarray, " token"]:
    """The matrix times a vector."""
    return edges @ vector


SCIPY = Backend(
    xp=np,
    read=read,
    extremes=extremes,
    mask=mask,
    small=small,
    exact=exact,
    entries=entries,
    assemble=assemble,
    solve=solve,
    product=product,
    densify=csr_array.toarray,
    crossover=0.03,
)
