"""Torch tensors, dense and sparse CSR, on any device; no graph is copied to the host."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowtracer_plugin.flow.arrays import Backend, working_dtype

BLOCK = 256
"""Rows of a sparse graph that are substituted at once: one dense solve of 256 x 256 is cheaper than
256 launches, and its 256 KiB stay in cache."""


def read(attention: Tensor) -> Tensor:
    """The attention as floats, detached from autograd."""
    return attention.detach().to(getattr(torch, working_dtype(attention)))


def extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest number, in one pass."""
    smallest, largest = torch.aminmax(values)
    return smallest, largest


def mask(values: Any, like: Tensor) -> Tensor:
    """The mask as a tensor on the device of the attention."""
    if isinstance(values, Tensor):
        return values
    # torch cannot compare unsigned numbers of more than one byte
    return sent(values if values.dtype.kind == "b" else values.astype(int), like.device)


def sent(values: Any, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor on the device, which the host does not wait for.

    `torch.tensor(values, device="cuda")` would wait until the device has done all that was asked of
    it before. CUDA takes a copy of the numbers at once, so that they may change afterwards.
    """
    return torch.as_tensor(values).to(device, non_blocking=torch.device(device).type != "cpu")


def solve(
    system: Float[Tensor, "*batch token token"],
    rhs: Float[Tensor, "*batch token"],
    *,
    transposed: bool,
) -> Float[Tensor, "*batch token"]:
    """Batched substitution on the tensor's device."""
    matrix = system.mT if transposed else system
    column: Tensor = torch.linalg.solve_triangular(
        matrix, rhs[..., None], upper=transposed, unitriangular=True
    )
    return column[..., 0]


def exact(beside: Tensor) -> torch.autocast:
    """A context without autocast, which a caller may have switched on."""
    return torch.autocast(beside.device.type, enabled=False)


def sparsify(edges: Float[Tensor, "query key"]) -> Tensor:
    """The graph as a sparse CSR tensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return edges.to_sparse_csr()


def read_csr(attention: Tensor) -> Tensor:
    """The attention as floats, detached from autograd, after torch has checked its own layout."""
    if attention.ndim != 2:
        raise ValueError(
            f"a sparse CSR tensor must hold one graph, got shape {tuple(attention.shape)}; "
            "pass a batch as a list of them"
        )
    parts = attention.crow_indices(), attention.col_indices(), read(attention.values())
    try:
        return torch.sparse_csr_tensor(*parts, size=attention.shape, check_invariants=True)
    except RuntimeError as error:
        raise ValueError(f"attention must be a valid sparse CSR tensor: {error}") from error


def entries(edges: Tensor) -> tuple[Int[Tensor, " edge"], Int[Tensor, " edge"], Tensor]:
    """Query, key and value of every stored edge, by rows."""
    counts = edges.crow_indices().diff()
    token = torch.arange(edges.shape[0], device=edges.device)
    key, value = edges.col_indices(), edges.values()
    # without the size, repeat_interleave would wait for the device to tell it
    return token.repeat_interleave(counts, output_size=len(value)), key, value


def assemble(like: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A matrix of the same shape from other edges, sorted by query and key."""
    counts = torch.bincount(query, minlength=like.shape[0])
    start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return torch.sparse_csr_tensor(
        start, key.long(), value, size=like.shape, check_invariants=False
    )


def solve_csr(
    system: Tensor, rhs: Float[Tensor, " token"], *, transposed: bool
) -> Float[Tensor, " token"]:
    """Block substitution with ordinary operations, the same on every device.

    torch.triangular_solve on sparse tensors is deprecated and needs MKL or cuSPARSE.
    """
    query, key, value = entries(system)
    row_start = system.crow_indices().tolist()
    rest, solution = rhs.clone(), torch.zeros_like(rhs)
    starts = range(0, len(rhs), BLOCK)
    for start in reversed(starts) if transposed else starts:
        stop = min(start + BLOCK, len(rhs))
        slab = slice(row_start[start], row_start[stop])
        q, k, v = query[slab], key[slab], value[slab]
        if not transposed:  # the solution is still zero inside the block
            rest.index_add_(0, q, v * solution[k], alpha=-1)
        block = _diagonal_block(q - start, k - start, v, stop - start)
        solution[start:stop] = solve(block, rest[start:stop], transposed=transposed)
        if transposed:  # sums inside the block are not read again
            rest.index_add_(0, k, v * solution[q], alpha=-1)
    return solution


def _diagonal_block(
    row: Int[Tensor, " edge"], column: Int[Tensor, " edge"], value: Tensor, size: int
) -> Float[Tensor, "size size"]:
    """The dense diagonal block of some rows; edges to its left have negative columns."""
    block = value.new_zeros(size, size + 1)
    # selecting the edges inside would wait for the device, so the others go to a spare column
    block[row, torch.where(column < 0, size, column)] = value
    return block[:, :size]


def densify(edges: Tensor) -> Tensor:
    """The graph as a dense tensor; on the host, scipy makes it six times as fast as torch."""
    if edges.device.type != "cpu":
        return edges.to_dense()
    from scipy.sparse import csr_array

    stored = edges.values(), edges.col_indices(), edges.crow_indices()
    rows, columns = edges.shape
    matrix = csr_array(tuple(part.numpy() for part in stored), shape=(rows, columns))
    return torch.from_numpy(matrix.toarray())


TORCH = Backend(
    xp=torch,
    read=read,
    extremes=extremes,
    mask=mask,
    solve=solve,
    exact=exact,
    sparsify=sparsify,
)
TORCH_CSR = TORCH._replace(
    read=read_csr,
    entries=entries,
    assemble=assemble,
    solve=solve_csr,
    sparsify=None,
    densify=densify,
    crossover=0.03,
)
