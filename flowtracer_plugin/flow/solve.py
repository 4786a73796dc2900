"""Reach, throughput and edge flow of one unit that is injected and flows to the answer.

Let `L[k, i]` be the attention that the later token k pays to the earlier token i. The reach
`h = 1[answer] + L.T h` is the influence of a token on the answer, and the throughput is `f = h g`
with `g = mu / h + L g`. These are two substitutions with one triangular matrix; all terms are
non-negative, so nothing cancels. The answer-conditioned matrix of the paper (section 3) is never
built. The same algebra runs on numpy and torch, dense and sparse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np
from jaxtyping import Bool, Float, Int

from flowtracer_plugin.flow.arrays import dtype_name
from flowtracer_plugin.flow.dispatch import backend_of, scale
from flowtracer_plugin.flow.graph import FlowGraph
from flowtracer_plugin.flow.substitution import product, solve
from flowtracer_plugin.flow.validation import Check, read_checks, read_mask, rows_without

QUESTION_WEIGHTS = ("uniform", "reach", "origins")
BOUNDARIES = ("literal", "absorbing")
UNREACHED = ("raise", "zero")
BACKENDS = ("auto", "dense", "sparse")

LARGEST_MADE_DENSE = 2**26
"""The most entries (256 MB in float32) that `backend="auto"` makes dense. It makes no dense graph
sparse: finding the edges takes longer than solving the flow along all of them."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Flow:
    """One unit of flow to the answer, in arrays of the graph's kind and device.

    Attributes:
        graph: The graph that was solved. A dense one holds the attention that was passed, not a
            copy; `edge_flow` is wrong once that attention has been changed.
        reach: `h`, the influence of each token on the answer: the expected number of visits of a
            walk that starts at every answer token and steps back along attention. At most the
            number of answer tokens if the attention of each token sums to at most one.
        throughput: `f`, the share of the unit that passes through each token, in [0, 1]. Exactly 0
            for tokens from which no path leads to the answer.
        source: `mu`, the share injected at each token; sums to 1.
        potential: `g`, throughput per reach, times a power of two that the whole graph shares.
        question_reached: How many question tokens reach the answer; an int, or one number per
            batch row.
        boundary: "literal" or "absorbing", as passed to `solve_graph`.
    """

    graph: FlowGraph
    reach: Float[Any, "*batch token"]
    throughput: Float[Any, "*batch token"]
    source: Float[Any, "*batch token"]
    potential: Float[Any, "*batch token"]
    question_reached: int | Int[Any, " batch"]
    boundary: str

    def edge_flow(self) -> Any:
        """The share of the unit that travels on each edge, in an array like the edges.

        `phi[k, i] = f(i) P[i, k]`, which is `h(k) L[k, i] g(i)`. The flow into a token (injected or
        along edges) equals its throughput, and so does the flow out of it (along edges or into the
        sink).

        >>> attention = np.array([[0, 0, 0], [1, 0, 0], [0.75, 0.25, 0]])
        >>> solve_flow(attention, [1, 0, 0], [0, 0, 1]).edge_flow()
        array([[0.  , 0.  , 0.  ],
               [0.25, 0.  , 0.  ],
               [0.75, 0.25, 0.  ]])
        """
        arriving, leaving = self._ends()
        edges = self.graph.edges
        if edges is self.graph.matrix:  # sparse edges, which are not a copy yet
            edges = tuple(one * 1 for one in edges) if isinstance(edges, tuple) else edges * 1
        return scale(scale(edges, arriving, of="query"), leaving, of="key")

    def inflow(self, tokens: Bool[Any, "*batch token"]) -> Float[Any, "*batch token"]:
        """The share of the unit that enters each token along edges from `tokens`.

        These are sums of rows of `edge_flow`, computed without a matrix of its size.

        Raises:
            TypeError: `tokens` are of a kind or dtype that cannot be read.
            ValueError: Their shape or device is not that of the question.

        >>> attention = np.array([[0, 0, 0], [1, 0, 0], [0.75, 0.25, 0]])
        >>> flow = solve_flow(attention, [1, 0, 0], [0, 0, 1])
        >>> flow.inflow(np.array([True, False, False]))
        array([0.  , 0.25, 0.75])
        """
        arriving, leaving = self._ends()
        sending = read_mask("tokens", tokens, arriving, tuple(arriving.shape))
        return arriving * product(self.graph.matrix, leaving * sending)

    def _ends(self) -> tuple[Float[Any, "*batch token"], Float[Any, "*batch token"]]:
        """The factors of an edge's attention: that of its later and that of its earlier token."""
        leaving = self.potential
        if self.boundary == "absorbing":
            leaving = leaving * ~self.graph.answer
        # f / g is the reach in the scale of g, which is precise even where the reported reach
        # has underflowed
        return self.throughput / (self.potential + (self.potential == 0)), leaving

    def sink_flow(self) -> Float[Any, "*batch token"]:
        """The share of the unit that leaves each token for the sink; sums to 1 over the answer.

        >>> solve_flow(np.tril(np.ones((3, 3))), [1, 0, 0], [0, 1, 1]).sink_flow().round(3)
        array([0.   , 0.333, 0.667])
        """
        return into_sink(self.graph.answer, self.reach, self.throughput)


def solve_flow(
    attention: Any,
    question: Any,
    answer: Any,
    *,
    question_weights: str = "uniform",
    boundary: str = "literal",
    unreached: str = "raise",
    backend: str = "auto",
) -> Flow:
    """The flow of one unit that is injected over the question and runs along attention.

    Args:
        attention: `[query, key]` or `[batch, query, key]`, lower triangular; a numpy array, a
            torch tensor (dense or sparse CSR), a scipy sparse array, or a list of sparse ones.
            Dense attention is not copied: the result refers to it.
        question: The tokens at which the unit is injected: booleans, or 0 and 1, of shape
            `[token]` or `[batch, token]`.
        answer: The tokens that are connected to the sink, in the same form.
        question_weights: "uniform" injects the same at every question token that reaches the
            answer; "reach" injects in proportion to the token's influence. "origins" injects at
            every token outside the answer, also in the response, the part of its influence that
            no edge passes on to earlier tokens, `h(k) (1 - sum_i L[k, i])`. Then the throughput of
            all tokens before the answer is proportional to reach, if no row sums to more than 1.
        boundary: "literal" lets influence pass through answer tokens to later ones; "absorbing"
            ends it at the first answer token.
        unreached: "raise" raises an error if no token at which flow would be injected reaches the
            answer. With "zero", a graph or batch row without such a token carries no flow.
        backend: "dense" or "sparse" is how the edges are stored while the flow is solved. "auto"
            keeps their form, except that sparse graphs become dense, because that is faster, if
            they have more than 3 % of all edges and at most 8,192 tokens.

    Raises:
        TypeError: As for `FlowGraph.from_attention`.
        ValueError: As for `FlowGraph.from_attention`, or no token at which flow would be injected
            reaches the answer and `unreached` is "raise".
        FloatingPointError: The numbers do not fit the precision of the attention.

    >>> flow = solve_flow(np.tril(np.ones((4, 4))), [1, 0, 0, 0], [0, 0, 0, 1])
    >>> flow.throughput
    array([1. , 0.5, 0.5, 1. ])
    >>> flow.reach
    array([4., 2., 1., 1.])
    """
    graph, check = FlowGraph.with_check(attention, question, answer)
    return _solved(graph, [check], question_weights, boundary, unreached, backend)


def solve_graph(
    graph: FlowGraph,
    *,
    question_weights: str = "uniform",
    boundary: str = "literal",
    unreached: str = "raise",
    backend: str = "auto",
) -> Flow:
    """The same as `solve_flow` for a graph that exists already and may have been pruned.

    >>> graph = FlowGraph.from_attention(np.tril(np.ones((4, 4))), [1, 0, 0, 0], [0, 0, 0, 1])
    >>> solve_graph(graph.prune(top_k=1)).throughput
    array([1., 0., 0., 1.])
    """
    return _solved(graph, [], question_weights, boundary, unreached, backend)


def _solved(
    graph: FlowGraph,
    checks: Sequence[Check],
    question_weights: str,
    boundary: str,
    unreached: str,
    backend: str,
) -> Flow:
    """The flow of a graph some of whose checks have not been read yet."""
    _check_option("question_weights", question_weights, QUESTION_WEIGHTS)
    _check_option("boundary", boundary, BOUNDARIES)
    _check_option("unreached", unreached, UNREACHED)
    _check_option("backend", backend, BACKENDS)
    matrix, question, answer = _stored(graph, backend).matrix, graph.question, graph.answer
    dtype = (matrix[0] if isinstance(matrix, tuple) else matrix).dtype
    passing = passing_tokens(answer, boundary)

    def row_sums() -> Float[Any, "*batch token"]:
        ones = backend_of(answer).xp.ones_like
        return product(matrix, ones(answer, dtype=dtype) * (True if passing is None else passing))

    nodes = solve_nodes(
        partial(solve, matrix),
        question,
        answer,
        passing,
        row_sums,
        dtype=dtype,
        question_weights=question_weights,
        zero=unreached == "zero",
        checks=checks,
    )
    return Flow(graph=graph, boundary=boundary, **nodes._asdict())


def _stored(graph: FlowGraph, backend: str) -> FlowGraph:
    if backend == "auto":
        tokens, graphs = graph.question.shape[-1], max(1, math.prod(graph.question.shape[:-1]))
        first = graph.matrix[0] if isinstance(graph.matrix, tuple) else graph.matrix
        pays = graph.density >= backend_of(first).crossover
        return graph.to_dense() if pays and graphs * tokens**2 <= LARGEST_MADE_DENSE else graph
    return graph.to_dense() if backend == "dense" else graph.to_sparse()


class Nodes(NamedTuple):
    """The numbers of a flow that belong to its tokens; see `Flow`."""

    reach: Float[Any, "*batch token"]
    throughput: Float[Any, "*batch token"]
    source: Float[Any, "*batch token"]
    potential: Float[Any, "*batch token"]
    question_reached: int | Int[Any, " batch"]


def passing_tokens(
    answer: Bool[Any, "*batch token"], boundary: str
) -> Bool[Any, "*batch token"] | None:
    """The tokens through which influence passes to later ones; None for all tokens."""
    return ~answer if boundary == "absorbing" else None


def solve_nodes(
    solve: Callable[..., Any],
    question: Bool[Any, "*batch token"],
    answer: Bool[Any, "*batch token"],
    passing: Bool[Any, "*batch token"] | None,
    row_sums: Callable[[], Float[Any, "*batch token"]],
    *,
    dtype: Any,
    question_weights: str,
    zero: bool,
    checks: Sequence[Check] = (),
) -> Nodes:
    """Reach, solved from the end of the text, then potential, solved from its beginning.

    `solve` is called like `substitution.solve`, without the matrix; `row_sums`, after the first
    call, says how much leads into each token. If no token at which flow would be injected reaches
    the answer, the graph carries no flow if `zero` is set; otherwise an error is raised. `checks`
    of the graph are read together with those of the flow, at the end.
    """
    xp = backend_of(answer).xp
    unit = unit_of(xp.finfo(dtype))
    with np.errstate(all="ignore"):  # _flow_check finds numbers that do not fit
        scaled = _reach(solve, xp.asarray(answer, dtype=dtype) * unit, passing)
        reached = question & (scaled > 0)
        share = _injected(scaled, reached, answer, row_sums, question_weights)
        total = share.sum(-1, keepdims=True)
        source = share / (total + (total == 0))
        potential = _potential(solve, scaled, source, passing)
        reach, throughput = scaled / unit, scaled * potential
        sunk = into_sink(answer, reach, throughput)
        check = _flow_check(share, reach, sunk, question_weights, zero=zero)
        found = reached.sum(-1)
        numbers = read_checks([*checks, check], *([] if found.ndim else [found]))
    return Nodes(
        reach=reach,
        throughput=throughput,
        source=source,
        potential=potential,
        question_reached=numbers[0] if numbers else found,
    )


def _check_option(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def unit_of(finfo: Any) -> float:
    """The reach of the sink during the computation: the square root of the largest power of two.

    Throughput does not change when reach is scaled. With this scale, reach may shrink to 1e-57 of
    the sink's in float32 (1e-461 in float64), and `1 / reach` still fits.
    """
    return 2.0 ** (math.frexp(float(finfo.max))[1] // 2)


def _reach(
    solve: Callable[..., Any],
    sink: Float[Any, "*batch token"],
    passing: Bool[Any, "*batch token"] | None,
) -> Float[Any, "*batch token"]:
    """`h`, in the scale of the sink."""
    reach = solve(sink, transposed=True, keys=passing)
    # a subnormal number has lost the digits that 1 / h needs, so it counts as no reach
    return reach * (reach >= backend_of(reach).xp.finfo(reach.dtype).smallest_normal)


def _injected(
    reach: Float[Any, "*batch token"],
    question: Bool[Any, "*batch token"],
    answer: Bool[Any, "*batch token"],
    row_sums: Callable[[], Float[Any, "*batch token"]],
    weights: str,
) -> Float[Any, "*batch token"]:
    """`mu` times a number that all tokens share; `question` are its tokens with a reach."""
    if weights == "origins":
        return reach * (1 - row_sums()).clip(0) * ~answer
    return question * (reach if weights == "reach" else backend_of(reach).xp.ones_like(reach))


def _potential(
    solve: Callable[..., Any],
    reach: Float[Any, "*batch token"],
    source: Float[Any, "*batch token"],
    passing: Bool[Any, "*batch token"] | None,
) -> Float[Any, "*batch token"]:
    """`g`, which is 0 at tokens without reach.

    Flow never enters these tokens. If they took part, one whose potential overflows would turn
    tokens that are not even connected to it into nan (0 times infinity).
    """
    injected = source / (reach + (reach == 0))
    return solve(injected, transposed=False, queries=reach > 0, keys=passing)


def into_sink(
    answer: Bool[Any, "*batch token"],
    reach: Float[Any, "*batch token"],
    throughput: Float[Any, "*batch token"],
) -> Float[Any, "*batch token"]:
    """`f(a) / h(a)`: the sink has reach 1, and each answer token's edge to it has weight 1."""
    return answer * throughput / backend_of(reach).xp.where(answer, reach, 1)


def _flow_check(share: Any, reach: Any, sunk: Any, weights: str, *, zero: bool) -> Check:
    """The check that the unit has arrived in each row that has a source, and that each has one.

    With `zero`, a row may have no source.
    """
    connected = (share > 0).any(-1) | ~backend_of(reach).xp.isfinite(reach).all(-1)
    # nan or infinity at any token makes the sum nan, which fails the comparison
    sound = (abs(sunk.sum(-1) - 1) < 1e-3) | (~connected & zero)
    explain = partial(_explain_flow, connected, sound, dtype_name(reach), weights, zero=zero)
    return Check(sound.all(), explain)


def _explain_flow(connected: Any, sound: Any, name: str, weights: str, *, zero: bool) -> NoReturn:
    if not zero and not bool(connected.all()):
        token = "token outside the answer" if weights == "origins" else "question token"
        raise ValueError(
            f"no {token} reaches the answer{rows_without(connected)}: every path has "
            f"weight 0, or less than {name} can hold (float64 attention holds more)"
        )
    raise FloatingPointError(
        f"the flow does not fit {name}{rows_without(sound)}: influence grows along rows of "
        "attention that sum to more than 1; normalise the rows, or pass float64"
    )
