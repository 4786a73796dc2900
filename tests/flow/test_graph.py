"""Making graphs: refused attention and masks, pruning, and sparse forms."""

import subprocess
import sys
import warnings

import numpy as np
import pandas
import pytest
import scipy.sparse
import torch
from hypothesis import assume, given, settings, strategies as st

from flowtracer_plugin.flow.graph import FlowGraph
from flowtracer_plugin.flow.solve import solve_flow, solve_graph
from tests.flow import reference
from tests.flow.strategies import (
    DENSE,
    KINDS,
    batch_as,
    batches,
    dense,
    given_as,
    held_as,
    problems,
    stack_as,
)

laws = settings(max_examples=30, derandomize=True)
FIRST, LAST = [1, 0, 0], [0, 0, 1]


def causal(size=3):
    return np.tril(np.full((size, size), 0.25))


def changed(*place, value):
    """Causal attention with one number replaced."""
    attention = causal()
    attention[place] = value
    return attention


@pytest.mark.parametrize("kind", KINDS)
@laws
@given(problem=problems())
def test_only_the_diagonal_is_dropped(kind, problem):
    graph = FlowGraph.from_attention(*given_as(kind, problem))
    np.testing.assert_array_equal(dense(graph.edges), np.tril(problem.attention, -1))
    np.testing.assert_array_equal(dense(graph.question), problem.question)
    np.testing.assert_array_equal(dense(graph.answer), problem.answer)
    assert graph.dropped == 0.0
    if kind == "scipy":
        assert graph.edges.nnz == np.count_nonzero(np.tril(problem.attention, -1))
        assert graph.edges.has_canonical_format


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_starts_with_nothing_dropped_in_each_row(kind):
    graph = FlowGraph.from_attention(stack_as(kind, [causal()] * 2), [FIRST] * 2, [LAST] * 2)
    assert graph.dropped.tolist() == [0, 0]
    assert isinstance(graph.edges, tuple) == (kind not in DENSE)


@pytest.mark.parametrize(
    "mask",
    [
        [True, False, False],
        (1, 0, 0),
        np.array([1, 0, 0], dtype=np.uint8),
        np.array([True, False, False]),
        torch.tensor([1, 0, 0]),
        torch.tensor([True, False, False]),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_may_be_lists_or_arrays(kind, mask):
    graph = FlowGraph.from_attention(held_as(kind, causal()), mask, LAST)
    assert graph.question.tolist() == [True, False, False]
    assert isinstance(graph.question, torch.Tensor) == kind.startswith("torch")
    assert str(graph.question.dtype).endswith("bool")


@pytest.mark.parametrize("kind", DENSE)
def test_a_dense_graph_shares_the_attention_and_copies_the_masks(kind):
    attention = held_as(kind, causal())
    question, answer = (held_as(kind, np.array(m, dtype=bool)) for m in (FIRST, LAST))
    graph = FlowGraph.from_attention(attention, question, answer)
    attention[2, 0], question[0], answer[2] = 9, False, False
    assert graph.edges[2, 0] == 9
    assert graph.question[0]
    assert graph.answer[2]


def test_duplicate_and_unsorted_entries_are_summed():
    parts = [0.25, 0.5, 0.25, 0.0, 0.0], ([2, 2, 2, 0, 1], [1, 0, 1, 2, 0])
    attention = scipy.sparse.coo_array(parts, shape=(3, 3))
    graph = FlowGraph.from_attention(attention, FIRST, LAST)
    assert graph.edges.toarray().tolist() == [[0, 0, 0], [0, 0, 0], [0.5, 0.5, 0]]
    assert graph.edges.nnz == 2  # a stored zero is no edge
    unsorted = scipy.sparse.csr_array(([0.25, 0.5, 0.25], [1, 0, 1], [0, 0, 0, 3]), shape=(3, 3))
    graph = FlowGraph.from_attention(unsorted, FIRST, LAST)
    assert graph.edges.toarray()[2].tolist() == [0.5, 0.5, 0]
    assert unsorted.data.tolist() == [0.25, 0.5, 0.25]


def test_a_graph_without_edges_can_be_pruned_and_solved():
    for kind in KINDS:
        empty = held_as(kind, np.zeros((3, 3)))
        graph = FlowGraph.from_attention(empty, FIRST, LAST)
        assert graph.prune(top_k=1).dropped == 0.0
        assert graph.prune(mass=0.5).dropped == 0.0
        assert solve_flow(empty, LAST, LAST).throughput.tolist() == [0, 0, 1]


@pytest.mark.parametrize("shape", [(3, 4), (3,), (2, 3, 4), (1, 2, 3, 3)])
@pytest.mark.parametrize("library", [np, torch])
def test_attention_of_a_wrong_shape_is_refused(library, shape):
    with pytest.raises(
        ValueError, match=r"\[batch, query, key\] and square, got shape \("
    ) as error:
        FlowGraph.from_attention(library.ones(shape), FIRST, LAST)
    assert str(shape) in str(error.value)


def test_a_sparse_matrix_must_be_square():
    with pytest.raises(ValueError, match=r"and square, got shape \(3, 4\)"):
        FlowGraph.from_attention(scipy.sparse.csr_array((3, 4)), FIRST, LAST)


@pytest.mark.parametrize("shape", [(0, 0), (0, 3, 3), (2, 0, 0)])
def test_attention_without_tokens_is_refused(shape):
    with pytest.raises(ValueError, match=r"hold at least one token, got shape \(.*0, "):
        FlowGraph.from_attention(np.ones(shape), [], [])


@pytest.mark.parametrize(
    ("attention", "error", "message"),
    [
        ("text", TypeError, "or a list of sparse ones, got str; convert it first"),
        (None, TypeError, "or a list of sparse ones, got NoneType"),
        (causal().astype(complex), TypeError, "at most 64 bits, got dtype complex128"),
        (causal().astype(np.longdouble), TypeError, "at most 64 bits, got dtype longdouble|float"),
        (torch.zeros(3, 3, dtype=torch.complex64), TypeError, "64 bits, got dtype complex64"),
        (torch.eye(3).to_sparse_coo(), TypeError, r"torch.sparse_coo; call .to_sparse_csr\(\)"),
        ([], ValueError, "at least one sparse matrix, got an empty list"),
        ([causal(), causal()], ValueError, r"got ndarray \(3, 3\), ndarray.*; stack dense ones"),
    ],
)
def test_attention_of_a_wrong_kind_is_refused(attention, error, message):
    with pytest.raises(error, match=message):
        FlowGraph.from_attention(attention, FIRST, LAST)


def test_a_coo_tensor_is_read_after_the_advised_conversion():
    attention = torch.from_numpy(causal()).to_sparse_coo().to_sparse_csr()
    assert dense(FlowGraph.from_attention(attention, FIRST, LAST).edges)[2, 1] == 0.25


def test_a_list_must_hold_matrices_of_one_kind_and_shape():
    masks = [FIRST] * 2, [LAST] * 2
    small, large = (scipy.sparse.csr_array(causal(size)) for size in (3, 4))
    for second in (large, held_as("torch_csr", causal())):
        with pytest.raises(ValueError, match=r"one kind and one shape, got csr_array \(3, 3\), "):
            FlowGraph.from_attention([small, second], *masks)


def test_torch_checks_its_own_layout():
    def csr(columns):
        return torch.sparse_csr_tensor(
            torch.tensor([0, 0, 0, 2]),
            torch.tensor(columns),
            torch.ones(2),
            size=(3, 3),
            check_invariants=False,
        )

    assert dense(FlowGraph.from_attention(csr([0, 1]), FIRST, LAST).edges)[2].tolist() == [1, 1, 0]
    for columns in ([1, 1], [1, 0], [0, 3]):
        with pytest.raises(ValueError, match="must be a valid sparse CSR tensor: "):
            FlowGraph.from_attention(csr(columns), FIRST, LAST)
    batch = torch.sparse_csr_tensor(
        torch.zeros(2, 4, dtype=torch.int64),
        torch.zeros(2, 0, dtype=torch.int64),
        torch.zeros(2, 0),
        size=(2, 3, 3),
        check_invariants=True,
    )
    with pytest.raises(ValueError, match=r"one graph, got shape \(2, 3, 3\); pass a batch as a"):
        FlowGraph.from_attention(batch, [FIRST] * 2, [LAST] * 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((0, 2), 0.3, "lower triangular, got 0.3 at query 0, key 2; rows must be queries"),
        ((1, 2), 0.3, "lower triangular, got 0.3 at query 1, key 2"),
        ((2, 1), -0.5, "not be negative, got -0.5 at query 2, key 1; pass probabilities"),
        ((2, 1), np.nan, "be finite, got nan at query 2, key 1; a fully masked row"),
        ((1, 0), np.inf, "be finite, got inf at query 1, key 0"),
        ((1, 0), -np.inf, "be finite, got -inf at query 1, key 0"),
        ((1, 1), np.nan, "be finite, got nan at query 1, key 1"),
        ((0, 1), np.nan, "be finite, got nan at query 0, key 1"),
    ],
)
def test_wrong_numbers_are_refused_with_their_place(kind, place, value, message):
    with pytest.raises(ValueError, match=message):
        FlowGraph.from_attention(held_as(kind, changed(*place, value=value)), FIRST, LAST)
    rows = stack_as(kind, [causal(), changed(*place, value=value)])
    with pytest.raises(ValueError, match=message.replace("at query", "at batch row 1, query")):
        FlowGraph.from_attention(rows, [FIRST] * 2, [LAST] * 2)


def test_transposed_attention_is_refused_and_the_remedy_works():
    with pytest.raises(ValueError, match=r"lower triangular, .* is it transposed"):
        FlowGraph.from_attention(causal().T, FIRST, LAST)
    assert FlowGraph.from_attention(causal().T.T, FIRST, LAST).edges[2, 0] == 0.25


def nested(layout):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*nested tensors is in prototype stage")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


HOLDS_ITSELF: list[object] = []
HOLDS_ITSELF.append(HOLDS_ITSELF)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["question", "answer"])
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([1, 0], ValueError, r"must have shape \(3,\), one value per token .*, got \(2,\)"),
        ([[1, 0, 0]], ValueError, r"must have shape \(3,\), .*, got \(1, 3\)"),
        ([1.0, 0.0, 0.0], TypeError, "must hold booleans, or 0 and 1, got dtype float"),
        ([2, 0, 0], ValueError, "must hold booleans, or 0 and 1, got 2"),
        ([1, -1, 0], ValueError, "must hold booleans, or 0 and 1, got -1"),
        ([0, 0, 0], ValueError, "must mark at least one token, got none"),
        ("100", ValueError, "must be a list, or an array on cpu .*, got str; pass a list"),
        (HOLDS_ITSELF, ValueError, "must be a list of numbers, found lists nested too deeply"),
        (
            np.array([0, 0, 1], object),
            TypeError,
            "must hold booleans, or 0 and 1, got dtype object",
        ),
        ([pandas.NA, 0, 1], TypeError, "must hold booleans, or 0 and 1, got <NA>"),
        (
            torch.ones(3, device="meta"),
            ValueError,
            "must be a list, or an array on cpu .*, got meta; move it",
        ),
        ([None, 1, 0], TypeError, "must hold booleans, or 0 and 1, got None"),
        ([2**70, 1, 0], TypeError, "must hold booleans, or 0 and 1, got 1180591620717411303424"),
        ([[1, 0, 0], [1]], ValueError, "must hold one value per token in rows of one length"),
        (np.ma.array([1, 1, 0], mask=[0, 1, 0]), TypeError, "must not be a masked array; pass"),
        ([np.ma.masked, 1, 0], TypeError, "must not be a masked array"),
        (torch.tensor([1, 0, 0]).to_sparse(), TypeError, "must not be a sparse tensor; pass"),
        (nested(torch.strided), TypeError, "must not be a nested tensor; pass"),
        (nested(torch.jagged), TypeError, "must not be a nested tensor; pass"),
    ],
)
def test_wrong_masks_are_refused(kind, name, mask, error, message):
    masks = {"question": FIRST, "answer": LAST} | {name: mask}
    with pytest.raises(error, match=f"{name} {message}"):
        FlowGraph.from_attention(held_as(kind, causal()), **masks)


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_names_the_batch_rows_without_a_mark(kind):
    rows, nothing = stack_as(kind, [causal()] * 3), [0, 0, 0]
    with pytest.raises(
        ValueError, match=r"question must mark .* token in batch rows \[0, 2\], got"
    ):
        FlowGraph.from_attention(rows, [nothing, FIRST, nothing], [LAST] * 3)
    with pytest.raises(ValueError, match=r"answer must mark .* token in batch rows \[1\], got"):
        FlowGraph.from_attention(rows, [FIRST] * 3, [LAST, nothing, LAST])
    with pytest.raises(ValueError, match=r"question must have shape \(3, 3\), .*, got \(3,\)"):
        FlowGraph.from_attention(rows, FIRST, [LAST] * 3)


rules = st.one_of(
    st.fixed_dictionaries({"top_k": st.integers(1, 6)}),
    st.fixed_dictionaries({"mass": st.floats(0.05, 0.999)}),
)


@pytest.mark.parametrize("kind", KINDS)
@laws
@given(problem=problems(), rule=rules)
def test_pruning_agrees_with_the_slow_definition(kind, problem, rule):
    graph = FlowGraph.from_attention(*given_as(kind, problem)).prune(**rule)
    expected = reference.pruned(problem.attention, **rule)
    np.testing.assert_array_equal(dense(graph.edges), expected)
    whole = np.tril(problem.attention, -1).sum()
    assert graph.dropped == pytest.approx(1 - expected.sum() / whole, abs=1e-12)
    assert isinstance(graph.dropped, float)
    assert type(graph.edges) is type(FlowGraph.from_attention(*given_as(kind, problem)).edges)


@laws
@given(problem=problems(), share=st.floats(0.05, 0.999))
def test_each_row_keeps_the_asked_mass_with_the_fewest_edges(problem, share):
    whole = np.tril(problem.attention, -1)
    edges = FlowGraph.from_attention(*problem.parts).prune(mass=share).edges
    for before, after in zip(whole, edges, strict=True):
        asked, kept = share * before.sum(), after[after > 0]
        assert after.sum() >= asked * (1 - 1e-12)
        if len(kept):
            assert after.sum() - kept.min() < asked * (1 + 1e-12)


@laws
@given(problem=problems(), count=st.integers(1, 6))
def test_each_row_keeps_its_strongest_edges(problem, count):
    whole = np.tril(problem.attention, -1)
    edges = FlowGraph.from_attention(*problem.parts).prune(top_k=count).edges
    for before, after in zip(whole, edges, strict=True):
        assert np.count_nonzero(after) == min(count, np.count_nonzero(before))
        np.testing.assert_array_equal(np.sort(after)[-count:], np.sort(before)[-count:])


@pytest.mark.parametrize("kind", KINDS)
def test_pruning_keeps_the_earlier_of_equal_edges(kind):
    size = 80  # on short rows, even an unstable sort keeps the order
    attention = held_as(kind, causal(size))
    graph = FlowGraph.from_attention(attention, [1] + [0] * 79, [0] * 79 + [1])
    expected = np.tril(np.full((size, size), 0.25), -1)
    expected[:, 2:] = 0
    np.testing.assert_array_equal(dense(graph.prune(top_k=2).edges), expected)
    # three of four equal edges hold three quarters, two of them one half
    assert dense(graph.prune(mass=0.6).edges)[4, :5].tolist() == [0.25, 0.25, 0.25, 0, 0]
    assert dense(graph.prune(mass=0.5).edges)[4, :5].tolist() == [0.25, 0.25, 0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
@laws
@given(problem=problems())
def test_a_rule_that_keeps_all_edges_drops_nothing(kind, problem):
    graph = FlowGraph.from_attention(*given_as(kind, problem))
    for same in (graph.prune(top_k=99), graph.prune(mass=1.0)):
        np.testing.assert_array_equal(dense(same.edges), dense(graph.edges))
        assert same.dropped == 0.0


@pytest.mark.parametrize("kind", KINDS)
@laws
@given(problem=problems(), first=st.integers(1, 6), then=st.floats(0.1, 0.9))
def test_dropped_counts_from_the_original_graph(kind, problem, first, then):
    graph = FlowGraph.from_attention(*given_as(kind, problem))
    twice = graph.prune(top_k=first).prune(mass=then)
    share = dense(twice.edges).sum() / dense(graph.edges).sum()
    assert twice.dropped == pytest.approx(1 - share, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@laws
@given(drawn=batches(), rule=rules)
def test_a_batch_is_pruned_row_by_row(kind, drawn, rule):
    _, _, rows = drawn
    graph = FlowGraph.from_attention(*batch_as(kind, rows)).prune(**rule)
    for row, edges, dropped in zip(rows, dense(graph.edges), graph.dropped, strict=True):
        alone = FlowGraph.from_attention(*row.parts).prune(**rule)
        np.testing.assert_array_equal(edges, alone.edges)
        assert float(dropped) == pytest.approx(alone.dropped, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@laws
@given(problem=problems(), rule=rules)
def test_a_pruned_graph_is_solved_like_the_pruned_attention(kind, problem, rule):
    kept = reference.pruned(problem.attention, **rule)
    reached = problem.question & (reference.reach(kept.T, problem.answer) > 0)
    assume(reached.any())
    found = solve_graph(FlowGraph.from_attention(*given_as(kind, problem)).prune(**rule))
    expected = reference.flow(kept, problem.question, problem.answer)
    np.testing.assert_allclose(dense(found.throughput), expected["throughput"], rtol=1e-9)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, "exactly one of top_k and mass, got top_k=None and mass=None"),
        ({"top_k": 1, "mass": 0.5}, "exactly one of top_k and mass, got top_k=1 and mass=0.5"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"mass": 0.0}, r"mass must be a share in \(0, 1\], got 0.0"),
        ({"mass": 1.5}, r"mass must be a share in \(0, 1\], got 1.5"),
        ({"mass": float("nan")}, r"mass must be a share in \(0, 1\], got nan"),
    ],
)
def test_pruning_rules_out_of_range_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        FlowGraph.from_attention(causal(), FIRST, LAST).prune(**rule)


@pytest.mark.parametrize("kind", DENSE)
@laws
@given(problem=problems(), rule=rules)
def test_the_sparse_form_holds_the_same_edges(kind, problem, rule):
    graph = FlowGraph.from_attention(*given_as(kind, problem)).prune(**rule)
    sparse = graph.to_sparse()
    np.testing.assert_array_equal(dense(sparse.edges), dense(graph.edges))
    assert sparse.dropped == graph.dropped
    if kind == "numpy":
        assert isinstance(sparse.edges, scipy.sparse.csr_array)
        assert sparse.edges.nnz == np.count_nonzero(graph.edges)
    else:
        assert sparse.edges.layout is torch.sparse_csr
        assert sparse.edges.values().count_nonzero() == len(sparse.edges.values())
    assert sparse.to_sparse() is sparse


@pytest.mark.parametrize("kind", DENSE)
@laws
@given(drawn=batches())
def test_a_batch_becomes_sparse_row_by_row(kind, drawn):
    _, _, rows = drawn
    graph = FlowGraph.from_attention(*batch_as(kind, rows))
    sparse = graph.to_sparse()
    assert len(sparse.edges) == len(rows)
    np.testing.assert_allclose(
        dense(solve_graph(sparse).throughput), dense(solve_graph(graph).throughput), rtol=1e-9
    )
    assert sparse.to_sparse() is sparse


def test_no_library_is_imported_that_the_array_does_not_need():
    program = """
import sys, numpy
from flowtracer_plugin import FlowGraph
from flowtracer_plugin import solve_graph
graph = FlowGraph.from_attention(numpy.tri(3), [1, 0, 0], [0, 0, 1]).prune(top_k=1)
assert solve_graph(graph).throughput.sum() == 2
assert not {"torch", "scipy.sparse"} & set(sys.modules), "dense"
solve_graph(graph.to_sparse())
assert "torch" not in sys.modules, "sparse"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_smallest_share_keeps_the_strongest_edge():
    graph = FlowGraph.from_attention(np.tril(np.ones((4, 4))), [1, 0, 0, 0], [0, 0, 0, 1])
    assert (graph.prune(mass=1e-18).edges > 0).sum(1).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint64, ">i4", np.int8])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_may_hold_any_whole_numbers(kind, dtype):
    graph = FlowGraph.from_attention(held_as(kind, causal()), np.array(FIRST, dtype), LAST)
    assert graph.question.tolist() == [True, False, False]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tokens", [3, 600])
@pytest.mark.parametrize("kind", DENSE)
def test_opposite_infinities_above_the_diagonal_are_refused_without_a_warning(kind, tokens):
    attention, ends = np.tril(np.ones((tokens, tokens))), [1] + [0] * (tokens - 1)
    attention[0, -2:] = np.inf, -np.inf
    attention[1, -1] = np.inf
    with pytest.raises(ValueError, match="be finite, got inf at query 0, key"):
        FlowGraph.from_attention(held_as(kind, attention), ends, ends[::-1])


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (torch.ones(3, 3, device="meta"), "must not be a tensor on the meta device"),
        (nested(torch.strided), "must not be a nested tensor"),
        (nested(torch.jagged), "must not be a nested tensor"),
        ([np.ma.ones((3, 3))], "must not be a masked array"),
        (torch.ones(3, 3).to_sparse(), "layout torch.sparse_coo; call .to_sparse_csr"),
    ],
)
def test_attention_that_holds_no_number_at_some_places_is_refused(attention, message):
    with pytest.raises(TypeError, match=message):
        FlowGraph.from_attention(attention, FIRST, LAST)


def test_a_masked_array_is_refused_and_the_remedy_works():
    attention = np.ma.masked_greater(np.tril(np.ones((3, 3))), 2)
    with pytest.raises(TypeError, match=r"pass attention\.filled\(0\)"):
        FlowGraph.from_attention(attention, [1, 0, 0], [0, 0, 1])
    assert FlowGraph.from_attention(attention.filled(0), [1, 0, 0], [0, 0, 1]).edges.sum() == 3
