"""Attention as a strictly causal graph, which is checked when it is made and can be pruned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Bool, Float

from flowtracer_plugin.flow.dispatch import backend_of
from flowtracer_plugin.flow.validation import (
    Check,
    check_numbers,
    read_checks,
    read_mask,
    read_matrices,
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FlowGraph:
    """Attention as a directed acyclic graph over the tokens of one sequence, or of a batch.

    An edge runs from an earlier token (the key) to a later one (the query) and carries the
    attention that the later token pays to the earlier. Make a graph with `from_attention`, which
    checks everything; the constructor checks nothing.

    Attributes:
        matrix: `[query, key]` or `[batch, query, key]`, float32 or float64: a numpy array, a torch
            tensor (dense or sparse CSR), a scipy csr_array, or a tuple of sparse ones, one per
            batch row. A dense one is the attention that was passed, not a copy (do not change it
            while the graph is in use), and its diagonal does not count.
        question: The tokens of the question, at which flow is injected by default.
        answer: The tokens that are connected to the sink.
        dropped: Share of the off-diagonal attention that pruning removed, in [0, 1]; a float, or
            one number per batch row.
    """

    matrix: Any
    question: Bool[Any, "*batch token"]
    answer: Bool[Any, "*batch token"]
    dropped: float | Float[Any, " batch"]

    @property
    def edges(self) -> Any:
        """The matrix, strictly lower triangular; each call copies a dense matrix."""
        backend = None if isinstance(self.matrix, tuple) else backend_of(self.matrix)
        if backend is None or backend.entries is not None:
            return self.matrix
        return backend.xp.tril(self.matrix, -1)

    @classmethod
    def from_attention(cls, attention: Any, question: Any, answer: Any) -> FlowGraph:
        """The graph of this attention; attention and masks are checked.

        Args:
            attention: `[query, key]` or `[batch, query, key]`, non-negative and lower triangular;
                rows need not sum to one. Half precision becomes float32, integers become float64.
                A batch of sparse graphs is a list.
            question: Booleans, or 0 and 1, of shape `[token]` or `[batch, token]`.
            answer: The tokens of the answer, in the same form.

        Raises:
            TypeError: Attention or masks are of a kind or dtype that cannot be read.
            ValueError: Their shapes, devices or numbers are wrong; the message says where.

        >>> import numpy as np
        >>> FlowGraph.from_attention(np.tril(np.ones((3, 3))), [1, 0, 0], [0, 0, 1]).edges
        array([[0., 0., 0.],
               [1., 0., 0.],
               [1., 1., 0.]])
        """
        graph, check = cls.with_check(attention, question, answer)
        read_checks([check])
        return graph

    @classmethod
    def with_check(cls, attention: Any, question: Any, answer: Any) -> tuple[FlowGraph, Check]:
        """What `from_attention` returns, and the check of its numbers, which is not read yet.

        Raises:
            TypeError: As `from_attention`.
            ValueError: Shapes or devices are wrong.
        """
        listed = isinstance(attention, list | tuple)
        matrices = read_matrices(attention)
        first, xp = matrices[0], backend_of(matrices[0]).xp
        shape = (len(matrices), first.shape[0]) if listed else tuple(first.shape[:-1])
        masks = {
            "question": read_mask("question", question, first, shape),
            "answer": read_mask("answer", answer, first, shape),
        }
        check = check_numbers(matrices, masks, listed=listed)
        matrices = [_strictly_lower(matrix) for matrix in matrices]
        question, answer = (xp.asarray(mask, dtype=xp.bool, copy=True) for mask in masks.values())
        nothing = 0.0 if question.ndim == 1 else xp.zeros_like(question[:, 0], dtype=xp.float64)
        matrix = tuple(matrices) if listed else matrices[0]
        return cls(matrix=matrix, question=question, answer=answer, dropped=nothing), check

    def prune(self, *, top_k: int | None = None, mass: float | None = None) -> FlowGraph:
        """The graph with only the strongest edges into each token, by exactly one of two rules.

        Its `dropped` counts from the attention of the original graph, however often it is pruned.

        Args:
            top_k: Keep this many edges per query row; equal edges of earlier keys come first.
            mass: Keep the fewest edges per query row that hold this share of the row's attention.

        Raises:
            ValueError: Neither or both are given, or one is out of range.

        >>> import numpy as np
        >>> attention = np.array([[0, 0, 0], [1, 0, 0], [0.75, 0.25, 0]])
        >>> FlowGraph.from_attention(attention, [1, 0, 0], [0, 0, 1]).prune(top_k=1).dropped
        0.125
        """
        if (top_k is None) == (mass is None):
            raise ValueError(f"pass exactly one of top_k and mass, got {top_k=} and {mass=}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if mass is not None and not 0 < mass <= 1:
            raise ValueError(f"mass must be a share in (0, 1], got {mass}")
        edges = self.edges
        if isinstance(edges, tuple):
            kept: Any = tuple(_strongest(one, top_k, mass) for one in edges)
        else:
            kept = _strongest(edges, top_k, mass)
        before, after = _total(edges), _total(kept)
        lost = (before - after) / (before + (before == 0))  # 0 if there is no attention
        dropped = self.dropped + (1 - self.dropped) * lost
        return replace(self, matrix=kept, dropped=dropped if dropped.ndim else float(dropped))

    def to_sparse(self) -> FlowGraph:
        """The same graph with only its edges stored, as a scipy csr_array or torch sparse CSR.

        A batch becomes a tuple of sparse matrices; a sparse graph is returned unchanged.

        >>> import numpy as np
        >>> graph = FlowGraph.from_attention(np.tril(np.ones((3, 3))), [1, 0, 0], [0, 0, 1])
        >>> graph.to_sparse().edges.nnz
        3
        """
        edges = self.edges
        sparsify = None if isinstance(edges, tuple) else backend_of(edges).sparsify
        if sparsify is None:
            return self
        single = self.question.ndim == 1
        return replace(
            self, matrix=sparsify(edges) if single else tuple(sparsify(one) for one in edges)
        )

    def to_dense(self) -> FlowGraph:
        """The same graph as one numpy or torch array; a dense graph is returned unchanged.

        >>> import numpy as np
        >>> graph = FlowGraph.from_attention(np.tril(np.ones((3, 3))), [1, 0, 0], [0, 0, 1])
        >>> graph.to_sparse().to_dense().edges.tolist() == graph.edges.tolist()
        True
        """
        matrices = self.matrix if isinstance(self.matrix, tuple) else (self.matrix,)
        densify = backend_of(matrices[0]).densify
        if densify is None:
            return self
        dense = [densify(one) for one in matrices]
        stacked = isinstance(self.matrix, tuple)
        return replace(self, matrix=backend_of(dense[0]).xp.stack(dense) if stacked else dense[0])

    @property
    def density(self) -> float:
        """The share of the pairs of tokens that are stored as edges; 1 for a dense graph."""
        matrices = self.matrix if isinstance(self.matrix, tuple) else (self.matrix,)
        backend, tokens = backend_of(matrices[0]), matrices[0].shape[-1]
        if backend.entries is None or tokens < 2:
            return 1.0
        edges = sum(len(backend.entries(one)[2]) for one in matrices)
        return 2 * edges / (len(matrices) * tokens * (tokens - 1))


def _strictly_lower(matrix: Any) -> Any:
    """A sparse matrix without its diagonal and stored zeros; a dense matrix unchanged."""
    backend = backend_of(matrix)
    if backend.entries is None or backend.assemble is None:
        return matrix
    query, key, value = backend.entries(matrix)
    kept = (key < query) & (value != 0)
    return backend.assemble(matrix, query[kept], key[kept], value[kept])


def _strongest(edges: Any, top_k: int | None, mass: float | None) -> Any:
    backend = backend_of(edges)
    if backend.entries is None or backend.assemble is None:
        kept = _strongest_slots(edges.reshape(-1, edges.shape[-1]), top_k, mass)
        return edges * kept.reshape(edges.shape)
    query, key, value = backend.entries(edges)
    # left-align the rows in a dense array; a slot is a place in the row
    slot = _place_in_row(query, backend.xp)
    width = int(slot.max()) + 1 if len(value) else 1
    rows = backend.xp.zeros((edges.shape[0], width), dtype=value.dtype, device=value.device)
    rows[query, slot] = value
    kept = _strongest_slots(rows, top_k, mass)[query, slot]
    return backend.assemble(edges, query[kept], key[kept], value[kept])


def _place_in_row(query: Any, xp: Any) -> Any:
    """The place of each entry in its row, counted from 0, for sorted row numbers."""
    return xp.arange(len(query), device=query.device) - xp.searchsorted(query, query)


def _strongest_slots(
    rows: Float[Any, "row slot"], top_k: int | None, mass: float | None
) -> Bool[Any, "row slot"]:
    """The values that a pruning rule keeps in each row; zeros may be among them."""
    xp = backend_of(rows).xp
    order = xp.argsort(-rows, stable=True)
    row = xp.arange(len(rows), device=rows.device)[:, None]
    kept = xp.zeros_like(rows, dtype=xp.bool)
    if top_k is not None:
        kept[row, order[:, :top_k]] = True
    if mass is not None:
        falling = xp.asarray(rows[row, order], dtype=xp.float64)
        # summed from the weakest up, so that mass=1 keeps even edges that round to nothing beside
        # the strongest
        rest = xp.flip(xp.cumsum(xp.flip(falling, (1,)), 1), (1,))
        kept[row, order] = rest > (1 - mass) * rest[:, :1]
        kept[row, order[:, :1]] |= falling[:, :1] > 0  # 1 - mass may round to 1
    return kept


def _total(edges: Any) -> Any:
    """The sum of each graph's attention, in double precision."""
    if isinstance(edges, tuple):
        return backend_of(edges[0]).xp.stack([_total(one) for one in edges])
    backend = backend_of(edges)
    values = edges if backend.entries is None else backend.entries(edges)[2][None]
    return values.sum((-2, -1), dtype=backend.xp.float64)
