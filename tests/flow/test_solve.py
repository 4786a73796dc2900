"""Flow compared with its slow definition, its laws, and graphs worked out by hand."""

import doctest
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings, strategies as st

from flowtracer_plugin.flow import graph, solve as flow, substitution, torch_arrays
from flowtracer_plugin.flow.graph import FlowGraph
from flowtracer_plugin.flow.solve import BOUNDARIES, QUESTION_WEIGHTS, solve_flow, solve_graph
from tests.device.gpu import GPU, on_gpu
from tests.flow import reference
from tests.flow.strategies import (
    DENSE,
    KINDS,
    TOLERANCE,
    batch_as,
    batches,
    dense,
    given_as,
    held_as,
    padded,
    problems,
    stack_as,
    substochastic,
)

laws = settings(max_examples=30, derandomize=True)
FIELDS = ("reach", "source", "throughput")
EXACT = TOLERANCE["float64"]
options = st.fixed_dictionaries(
    {
        "question_weights": st.sampled_from(QUESTION_WEIGHTS),
        "boundary": st.sampled_from(BOUNDARIES),
    }
)


def mask(size, *tokens):
    return np.isin(np.arange(size), tokens)


def graph_of(size, weights):
    """Attention from {(earlier, later): weight}."""
    attention = np.zeros((size, size))
    for (earlier, later), weight in weights.items():
        attention[later, earlier] = weight
    return attention


SOURCE = {"float64": {"rtol": 1e-9, "atol": 1e-14}, "float32": {"rtol": 1e-5, "atol": 1e-6}}
"""For `source`: with "origins" it is a difference, from 1, of sums that may come close to it."""


def agree(found, expected, dtype="float64"):
    """Assert that all numbers of a flow equal the slow definition."""
    for name in FIELDS:
        tolerance = (SOURCE if name == "source" else TOLERANCE)[dtype]
        np.testing.assert_allclose(
            dense(getattr(found, name)), expected[name], **tolerance, err_msg=name
        )
    for name in ("edge_flow", "sink_flow"):
        np.testing.assert_allclose(
            dense(getattr(found, name)()), expected[name], **TOLERANCE[dtype], err_msg=name
        )
    tokens = found.graph.question | found.graph.answer
    entering = (expected["edge_flow"] * dense(tokens)[..., None, :]).sum(-1)
    np.testing.assert_allclose(
        dense(found.inflow(tokens)), entering, **TOLERANCE[dtype], err_msg="inflow"
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
@laws
@given(problem=problems(), chosen=options)
def test_every_backend_agrees_with_the_slow_definition(kind, dtype, problem, chosen):
    found = solve_flow(*given_as(kind, problem, dtype), **chosen)
    agree(found, reference.flow(*problem.parts, **chosen), dtype)
    reached = problem.question & (reference.reach(problem.attention.T, problem.answer) > 0)
    assert found.question_reached == reached.sum()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
@settings(laws, max_examples=10)
@given(drawn=batches(), chosen=options)
def test_a_padded_batch_equals_its_rows_alone(kind, dtype, drawn, chosen):
    alone, left, rows = drawn
    found = solve_flow(*batch_as(kind, rows, dtype), **chosen)
    edge_flow, sink_flow = dense(found.edge_flow()), dense(found.sink_flow())
    for row, (one, start) in enumerate(zip(alone, left, strict=True)):
        expected = reference.flow(*one.parts, **chosen)
        size = len(rows[0].question)
        inside = slice(start, start + len(one.question))
        for name in FIELDS:
            values = np.zeros(size)
            values[inside] = expected[name]
            batched = dense(getattr(found, name))[row]
            tolerance = (SOURCE if name == "source" else TOLERANCE)[dtype]
            np.testing.assert_allclose(batched, values, **tolerance, err_msg=name)
        np.testing.assert_allclose(
            edge_flow[row][inside, inside], expected["edge_flow"], **TOLERANCE[dtype]
        )
        np.testing.assert_allclose(
            sink_flow[row][inside], expected["sink_flow"], **TOLERANCE[dtype]
        )
        reached = solve_flow(*one.parts, **chosen).question_reached
        assert found.question_reached[row] == reached


@laws
@given(problem=problems(max_tokens=7))
def test_throughput_is_the_share_of_the_paths(problem):
    expected = reference.throughput_by_paths(*problem.parts)
    np.testing.assert_allclose(solve_flow(*problem.parts).throughput, expected, **EXACT)


@pytest.mark.parametrize("chosen", [{}, {"question_weights": "reach", "boundary": "absorbing"}])
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_longer_than_a_block(kind, chosen):
    rng = np.random.default_rng(0)
    size = 2 * torch_arrays.BLOCK + 100
    attention = np.tril(rng.random((size, size)) ** 8 * (rng.random((size, size)) < 0.1))
    attention /= attention.sum(1, keepdims=True) + 1e-3
    question, answer = mask(size, *range(1, 30)), mask(size, 300, 550, size - 3, size - 2)
    expected = reference.flow(attention, question, answer, **chosen)
    parts = (held_as(kind, part) for part in (attention, question, answer))
    agree(solve_flow(*parts, **chosen), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["dense", "sparse"])
@settings(laws, max_examples=10)
@given(drawn=batches(), chosen=options)
def test_both_storages_give_the_same_flow_in_the_given_form(kind, backend, drawn, chosen):
    _, _, rows = drawn
    given = batch_as(kind, rows)
    found = solve_flow(*given, backend=backend, **chosen)
    wanted = [reference.flow(*row.parts, **chosen) for row in rows]
    for values, name in (
        (found.throughput, "throughput"),
        (found.reach, "reach"),
        (found.edge_flow(), "edge_flow"),
    ):
        np.testing.assert_allclose(dense(values), [one[name] for one in wanted], **EXACT)
    assert type(found.graph.matrix) is type(FlowGraph.from_attention(*given).matrix)


@pytest.mark.parametrize("kind", ["scipy", "torch_csr"])
@pytest.mark.parametrize(
    ("density", "tokens", "stored"),
    [(0.01, 200, "sparse"), (0.2, 200, "dense"), (0.2, 201, "sparse")],
)
def test_auto_makes_sparse_graphs_dense_if_that_is_faster_and_fits(
    kind, density, tokens, stored, monkeypatch
):
    monkeypatch.setattr(flow, "LARGEST_MADE_DENSE", 200**2)
    rng = np.random.default_rng(0)
    attention = np.tril(rng.random((tokens, tokens)) * (rng.random((tokens, tokens)) < density))
    attention[-1, 0] = 0.5
    problem = held_as(kind, attention), mask(tokens, 0), mask(tokens, tokens - 1)
    solved = []
    real = flow.solve
    monkeypatch.setattr(
        flow, "solve", lambda matrix, *a, **k: solved.append(matrix) or real(matrix, *a, **k)
    )
    graph = FlowGraph.from_attention(problem[0], *(held_as(kind, part) for part in problem[1:]))
    found = solve_graph(graph)
    matrix = solved[0]
    is_dense = isinstance(matrix, np.ndarray) or getattr(matrix, "layout", None) is torch.strided
    assert is_dense == (stored == "dense")
    assert found.graph is graph
    assert graph.density == pytest.approx(
        np.count_nonzero(np.tril(attention, -1)) * 2 / (tokens * (tokens - 1))
    )


@settings(laws, max_examples=25)
@given(problem=problems(), block=st.integers(1, 5), chosen=options)
def test_sparse_torch_does_not_depend_on_the_block(problem, block, chosen):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_arrays, "BLOCK", block)
        found = solve_flow(*given_as("torch_csr", problem), **chosen)
    agree(found, reference.flow(*problem.parts, **chosen))


@pytest.mark.parametrize("kind", DENSE)
@laws
@given(problem=problems(), block=st.integers(1, 5), data=st.data())
def test_substitution_by_blocks_solves_the_system_restricted_to_queries_and_keys(
    kind, problem, block, data
):
    size = len(problem.answer)
    masks = {
        name: np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
        for name in ("queries", "keys")
    }
    rhs = np.linspace(0.5, 2, size)
    lower = np.tril(problem.attention, -1) * masks["queries"][:, None] * masks["keys"]
    given = held_as(kind, problem.attention + np.triu(np.full((size, size), 7.0)))
    rows = substitution.stored(given)
    held = {name: held_as(kind, mask) for name, mask in masks.items()}
    for transposed in (False, True):
        seen = []
        found = substitution.substitute(
            rows,
            held_as(kind, rhs),
            transposed=transposed,
            block=block,
            visit=lambda start, stop, part, _, seen=seen: seen.append((start, stop, part.shape)),
            **held,
        )
        system = np.eye(size) - (lower.T if transposed else lower)
        np.testing.assert_allclose(dense(found), np.linalg.solve(system, rhs), **EXACT)
        starts = list(range(0, size, block))
        ends = [(start, min(start + block, size)) for start in starts]
        expected = [(start, stop, (stop - start, stop)) for start, stop in ends]
        assert seen == (expected[::-1] if transposed else expected)
    product = substitution.lower_product(rows, held_as(kind, rhs), block)
    np.testing.assert_allclose(dense(product), np.tril(problem.attention, -1) @ rhs, **EXACT)
    above = float(substitution.upper_sum(given, block))
    assert above == pytest.approx(7.0 * size * (size - 1) / 2)


@laws
@given(problem=problems(), chosen=options)
def test_one_unit_arrives_and_none_is_lost_on_the_way(problem, chosen):
    found = solve_flow(*problem.parts, **chosen)
    edges, sink = found.edge_flow(), found.sink_flow()
    np.testing.assert_allclose(found.source.sum(), 1)
    np.testing.assert_allclose(sink.sum(), 1)
    inflow, outflow = found.source + edges.sum(1), edges.sum(0) + sink
    np.testing.assert_allclose(inflow, found.throughput, **EXACT)
    np.testing.assert_allclose(outflow, found.throughput, **EXACT)
    # the paper's score counts both
    np.testing.assert_allclose(inflow + outflow, 2 * found.throughput, **EXACT)
    assert (sink[~problem.answer] == 0).all()
    origins = chosen["question_weights"] == "origins"
    outside = problem.answer if origins else ~problem.question
    assert (found.source[outside] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@laws
@given(problem=problems())
def test_no_flow_without_reach(kind, problem):
    found = solve_flow(*given_as(kind, problem))
    lost = dense(found.reach) == 0
    assert (dense(found.throughput)[lost] == 0).all()
    assert (dense(found.edge_flow())[lost] == 0).all()
    assert (dense(found.edge_flow())[:, lost] == 0).all()


@laws
@given(problem=problems(), chosen=options)
def test_reach_is_the_expected_number_of_visits_of_the_backward_walk(problem, chosen):
    step = np.tril(problem.attention, -1)
    if chosen["boundary"] == "absorbing":
        step[:, problem.answer] = 0
    walkers, visits = problem.answer.astype(float), np.zeros(len(step))
    while walkers.any():  # ends, because every step leads to an earlier token
        visits, walkers = visits + walkers, walkers @ step
    np.testing.assert_allclose(solve_flow(*problem.parts, **chosen).reach, visits, **EXACT)


@laws
@given(problem=problems().map(substochastic))
def test_reach_is_at_most_the_number_of_answer_tokens(problem):
    assert solve_flow(*problem.parts).reach.max() <= problem.answer.sum() * (1 + 1e-12)


@laws
@given(problem=problems(), power=st.integers(-200, 200), weights=st.sampled_from(QUESTION_WEIGHTS))
def test_throughput_does_not_change_when_reach_is_scaled(problem, power, weights):
    found = solve_flow(*problem.parts, question_weights=weights)
    scaled = found.reach * 2.0**power
    solve = partial(substitution.solve, problem.attention)
    potential = flow._potential(solve, scaled, found.source, None)
    np.testing.assert_array_equal(scaled * potential, found.throughput)


@laws
@given(problem=problems().map(substochastic), boundary=st.sampled_from(BOUNDARIES))
def test_from_its_origins_flow_passes_each_token_before_the_answer_by_its_reach(problem, boundary):
    found = solve_flow(*problem.parts, question_weights="origins", boundary=boundary)
    before = np.arange(len(problem.question)) < problem.answer.argmax()
    whole = found.reach[before].sum()
    np.testing.assert_allclose(
        found.throughput[before] / found.throughput[before].sum(), found.reach[before] / whole
    )
    np.testing.assert_allclose(found.sink_flow().sum(), 1)


@pytest.mark.parametrize("kind", KINDS)
@laws
@given(problem=problems(), extra=st.integers(1, 4), seed=st.integers(0, 99), chosen=options)
def test_tokens_after_the_answer_change_nothing(kind, problem, extra, seed, chosen):
    size = len(problem.question)
    longer = padded(problem, 0, extra)
    attention = longer.attention.copy()
    # they attend to anything, without bounds, but they come after the answer
    attention[size:] = np.tril(np.random.default_rng(seed).uniform(0, 9, attention.shape))[size:]
    parts = (held_as(kind, part) for part in (attention, longer.question, longer.answer))
    found, before = solve_flow(*parts, **chosen), solve_flow(*problem.parts, **chosen)
    for name in FIELDS:
        values = dense(getattr(found, name))
        np.testing.assert_allclose(values[:size], getattr(before, name), **EXACT)
        assert (values[size:] == 0).all()


@laws
@given(problem=problems(), data=st.data())
def test_a_dead_end_changes_no_throughput(problem, data):
    place = data.draw(st.integers(1, len(problem.question)))
    attention = np.insert(np.insert(problem.attention, place, 0, 0), place, 0, 1)
    attention[place, :place] = data.draw(st.floats(0.1, 5))
    masks = (np.insert(part, place, False) for part in (problem.question, problem.answer))
    found = solve_flow(attention, *masks)
    assert found.throughput[place] == found.reach[place] == 0
    before = solve_flow(*problem.parts).throughput
    np.testing.assert_allclose(np.delete(found.throughput, place), before, **EXACT)


@laws
@given(problem=problems(), data=st.data())
def test_a_token_inserted_into_an_edge_changes_no_other_throughput(problem, data):
    """The edge i -> k of weight w becomes i -> m of weight w and m -> k of weight 1."""
    edges = np.argwhere(np.tril(problem.attention, -1)).tolist()
    later, earlier = data.draw(st.sampled_from(edges))
    place = data.draw(st.integers(earlier + 1, later))
    attention = np.insert(np.insert(problem.attention, place, 0, 0), place, 0, 1)
    attention[place, earlier] = problem.attention[later, earlier]
    attention[later + 1, earlier], attention[later + 1, place] = 0, 1
    masks = (np.insert(part, place, False) for part in (problem.question, problem.answer))
    found, before = solve_flow(attention, *masks), solve_flow(*problem.parts)
    np.testing.assert_allclose(np.delete(found.throughput, place), before.throughput, **EXACT)
    np.testing.assert_allclose(found.throughput[place], before.edge_flow()[later, earlier], **EXACT)


@laws
@given(problem=problems(), chosen=options)
def test_inputs_are_not_written_to(problem, chosen):
    for kind in KINDS:
        parts = given_as(kind, problem)
        made = FlowGraph.from_attention(*parts)
        before = dense(made.edges).copy()
        solve_graph(made, **chosen).edge_flow()
        for part, original in zip(parts, problem.parts, strict=True):
            np.testing.assert_array_equal(dense(part), original)
        np.testing.assert_array_equal(dense(made.edges), before)


def test_a_fork_by_hand():
    r"""Two ways from the question to the answer, and a third that leads nowhere.

          0.2         0.5
    0 ─────────▶ 1 ─────────▶ 4     ways 0-1-4: 0.2 x 0.5 = 0.10
    │ ╲   0.5         0.6    ▲          0-2-4: 0.5 x 0.6 = 0.30
    │   ───────▶ 2 ──────────┘      h(0) = 0.40: a quarter of the unit, and three quarters
    └──────────▶ 3                  3 leads nowhere: h = f = 0
          1.0
    """
    weights = {(0, 1): 0.2, (0, 2): 0.5, (0, 3): 1.0, (1, 4): 0.5, (2, 4): 0.6}
    found = solve_flow(graph_of(5, weights), mask(5, 0), mask(5, 4))
    np.testing.assert_allclose(found.reach, [0.4, 0.5, 0.6, 0, 1])
    np.testing.assert_allclose(found.throughput, [1, 0.25, 0.75, 0, 1])
    shares = {(0, 1): 0.25, (0, 2): 0.75, (1, 4): 0.25, (2, 4): 0.75}
    np.testing.assert_allclose(found.edge_flow(), graph_of(5, shares))
    np.testing.assert_allclose(found.sink_flow(), [0, 0, 0, 0, 1])


def test_two_questions_by_hand():
    r"""Question tokens inject equal shares, or shares in proportion to their influence.

    0 ──0.1──▶ 2 ──0.5──▶ 4      h(2) = 0.5, h(0) = 0.05
    1 ──0.9──▶ 3 ──0.5──▶ 4      h(3) = 0.5, h(1) = 0.45: nine times that of 0
    """
    weights = {(0, 2): 0.1, (1, 3): 0.9, (2, 4): 0.5, (3, 4): 0.5}
    parts = graph_of(5, weights), mask(5, 0, 1), mask(5, 4)
    np.testing.assert_allclose(solve_flow(*parts).throughput, [0.5, 0.5, 0.5, 0.5, 1])
    by_reach = solve_flow(*parts, question_weights="reach")
    np.testing.assert_allclose(by_reach.throughput, [0.1, 0.9, 0.1, 0.9, 1])
    np.testing.assert_allclose(by_reach.reach, [0.05, 0.45, 0.5, 0.5, 1])


def test_origins_by_hand():
    r"""Half of what decided the answer is token 2 itself, half of that comes from the question.

    0 ──0.5──▶ 2 ──0.5──▶ 3      h(2) = 0.5, h(1) = 0.25, h(0) = 0.25
    1 ──────0.25────────▶ 3      origins: 0.25 at 0, 0.25 at 1, 0.5 (1 - 0.5) at 2
    """
    weights = {(0, 2): 0.5, (2, 3): 0.5, (1, 3): 0.25}
    parts = graph_of(4, weights), mask(4, 1), mask(4, 3)
    found = solve_flow(*parts, question_weights="origins")
    np.testing.assert_allclose(found.source, [1 / 3, 1 / 3, 1 / 3, 0])
    np.testing.assert_allclose(found.throughput, [1 / 3, 1 / 3, 2 / 3, 1])
    assert found.question_reached == 1
    nothing = graph_of(3, {(0, 1): 0.5}), mask(3, 0), mask(3, 2)
    with pytest.raises(ValueError, match="no token outside the answer reaches the answer"):
        solve_flow(*nothing, question_weights="origins")


def test_two_answers_by_hand():
    r"""An answer token passes influence on, or absorbs it.

          0.5          0.25
    0 ─────────▶ 1 ──────────▶ 2      answer: 1 and 2
    └─────────────────────────▲
                0.375

    literal:   h(1) = 1 + 0.25,  h(0) = 0.5 x 1.25 + 0.375 = 1
    absorbing: h(1) = 1,         h(0) = 0.5 x 1    + 0.375 = 0.875
    """
    parts = graph_of(3, {(0, 1): 0.5, (1, 2): 0.25, (0, 2): 0.375}), mask(3, 0), mask(3, 1, 2)
    literal, absorbing = (solve_flow(*parts, boundary=boundary) for boundary in BOUNDARIES)
    np.testing.assert_allclose(literal.reach, [1, 1.25, 1])
    np.testing.assert_allclose(literal.throughput, [1, 0.625, 0.5])
    np.testing.assert_allclose(literal.sink_flow(), [0, 0.5, 0.5])
    assert literal.edge_flow()[2, 1] == pytest.approx(0.125)
    np.testing.assert_allclose(absorbing.reach, [0.875, 1, 1])
    np.testing.assert_allclose(absorbing.throughput, [1, 4 / 7, 3 / 7])
    np.testing.assert_allclose(absorbing.sink_flow(), [0, 4 / 7, 3 / 7])
    assert absorbing.edge_flow()[2, 1] == 0


def test_a_question_token_may_be_an_answer_token():
    found = solve_flow(graph_of(2, {(0, 1): 1.0}), mask(2, 0), mask(2, 0, 1))
    np.testing.assert_allclose(found.reach, [2, 1])
    np.testing.assert_allclose(found.sink_flow(), [0.5, 0.5])
    alone = solve_flow(np.ones((1, 1)), [1], [1])
    assert (alone.reach.item(), alone.throughput.item(), alone.sink_flow().item()) == (1, 1, 1)


def chain(size, weight):
    return graph_of(size, dict.fromkeys(pairwise(range(size)), weight))


@pytest.mark.parametrize("kind", KINDS)
def test_throughput_is_exact_where_reach_underflows(kind):
    """1e-3 per hop: 19 hops are 1e-57, far below what float32 holds; 20 hops count as none."""
    size = 40
    parts = chain(size, 1e-3), mask(size, *range(size - 1)), mask(size, size - 1)
    attention, question, answer = (held_as(kind, part, "float32") for part in parts)
    found = solve_flow(attention, question, answer)
    assert found.question_reached == 19
    expected = np.clip(np.arange(size) - 19, 0, 19) / 19
    np.testing.assert_allclose(dense(found.throughput), expected, rtol=1e-5)
    np.testing.assert_allclose(dense(found.edge_flow())[20:].sum(1)[1:], expected[20:-1], rtol=1e-5)
    reach = dense(found.reach)
    np.testing.assert_allclose(reach[-13:], 1e-3 ** np.arange(12.0, -1, -1), rtol=1e-5)
    assert (reach[:20] == 0).all()


def test_double_precision_reaches_much_further():
    size = 152
    question = mask(size, 0)
    found = solve_flow(chain(size, 1e-3), question, mask(size, size - 1))
    assert found.reach[0] == 0  # as reported: 1e-453
    np.testing.assert_allclose(found.throughput, np.ones(size), rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_end_that_overflows_changes_no_other_token(kind):
    """Without a bound on the rows, the potential of tokens without reach overflows."""
    size, extra = 4, 300
    attention = np.zeros((size + extra, size + extra))
    attention[:size, :size] = np.tril(np.full((size, size), 0.5), -1)
    attention[size:, :] = np.tril(np.full(attention.shape, 1e3), -1)[size:]
    question, answer = mask(size + extra, 0), mask(size + extra, 3)
    parts = (held_as(kind, part, "float32") for part in (attention, question, answer))
    expected = reference.flow(attention[:size, :size], question[:size], answer[:size])
    found = dense(solve_flow(*parts).throughput)
    np.testing.assert_allclose(found[:size], expected["throughput"], rtol=1e-6)
    assert (found[size:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [30, 65, 70, 120, 200])
def test_growing_reach_is_exact_or_an_error(kind, size):
    """With all ones, h doubles with every token, and half of the unit passes through each."""
    attention = np.tril(np.ones((size, size)))
    parts = (
        held_as(kind, part, "float32") for part in (attention, mask(size, 0), mask(size, size - 1))
    )
    if size > 65:
        with pytest.raises(FloatingPointError, match="does not fit float32: influence grows"):
            solve_flow(*parts)
        found = solve_flow(attention, mask(size, 0), mask(size, size - 1))  # as advised
    else:
        found = solve_flow(*parts)
    expected = np.full(size, 0.5)
    expected[[0, -1]] = 1
    np.testing.assert_allclose(dense(found.throughput), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_reach_that_overflows_before_the_question_is_an_error_too(kind):
    attention = held_as(kind, np.tril(np.ones((200, 200))), "float32")
    with pytest.raises(FloatingPointError, match="does not fit float32"):
        solve_flow(attention, mask(200, 190), mask(200, 199))


def test_lost_digits_are_an_error_not_a_wrong_number():
    """If reach is near the largest float32, 1 / reach and its parts keep only a few digits."""
    many, growing = 10473, 65
    size = many + growing
    query = np.concatenate([np.full(many, many), many + np.tril_indices(growing, -1)[0]])
    key = np.concatenate([np.arange(many), many + np.tril_indices(growing, -1)[1]])
    attention = scipy.sparse.csr_array((np.ones(len(key)), (query, key)), shape=(size, size))
    question, answer = mask(size, *range(many)), mask(size, size - 1)
    with pytest.raises(FloatingPointError, match="or pass float64"):
        solve_flow(attention.astype(np.float32), question, answer)
    found = solve_flow(attention, question, answer)
    np.testing.assert_allclose(found.throughput[many:], [1, *[0.5] * 63, 1], rtol=1e-9)


def test_a_batch_names_the_rows_whose_numbers_do_not_fit():
    attention = np.tril(np.ones((2, 200, 200), dtype=np.float32))
    attention[0] /= 200
    question, answer = np.stack([mask(200, 0)] * 2), np.stack([mask(200, 199)] * 2)
    with pytest.raises(FloatingPointError, match=r"float32 in batch rows \[1\]: influence grows"):
        solve_flow(attention, question, answer)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_results_have_the_kind_and_dtype_of_the_attention(kind, dtype):
    parts = [held_as(kind, p, dtype) for p in (chain(4, 0.5), mask(4, 0), mask(4, 3))]
    found = solve_flow(*parts)
    library = torch.Tensor if kind.startswith("torch") else np.ndarray
    vectors = [getattr(found, name) for name in (*FIELDS, "potential")] + [found.sink_flow()]
    for vector in vectors:
        assert isinstance(vector, library)
        assert vector.dtype == parts[0].dtype
        assert vector.shape == (4,)
    assert type(found.edge_flow()) is type(parts[0])
    assert found.edge_flow().dtype == parts[0].dtype
    assert isinstance(found.question_reached, int)
    if kind == "torch_csr":
        assert found.edge_flow().layout is torch.sparse_csr
    if kind == "scipy":
        assert found.edge_flow().nnz == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_counts_the_question_tokens_that_reach_the_answer(kind):
    first, second = chain(4, 0.5), chain(4, 0.5)
    second[1, 0] = 0
    masks = [held_as(kind, np.stack([mask(4, *tokens)] * 2)) for tokens in ((0, 1), (3,))]
    attention = stack_as(kind, [first, second])
    found = solve_flow(attention, *masks)
    assert found.question_reached.tolist() == [2, 1]
    assert type(found.edge_flow()) is (type(attention) if kind in DENSE else tuple)


@pytest.mark.parametrize(
    ("given_dtype", "computed"),
    [
        (np.float16, np.float32),
        (np.int32, np.float64),
        (np.uint8, np.float64),
        (bool, np.float64),
        (">f8", np.float64),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float64),
        (torch.bool, torch.float64),
    ],
)
def test_precision_of_the_computation(given_dtype, computed):
    attention = chain(3, 1.0)
    if isinstance(given_dtype, torch.dtype):
        attention = torch.from_numpy(attention).to(given_dtype)
    else:
        attention = attention.astype(given_dtype)
    found = solve_flow(attention, [1, 0, 0], [0, 0, 1])
    assert found.throughput.dtype == computed
    assert found.throughput.tolist() == [1, 1, 1]


def test_gradients_do_not_flow_into_the_solution():
    attention = torch.from_numpy(chain(3, 0.5)).requires_grad_()
    found = solve_flow(attention, [1, 0, 0], [0, 0, 1])
    assert not found.throughput.requires_grad
    assert not found.edge_flow().requires_grad


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["torch", "torch_csr"])
def test_autocast_does_not_lower_the_precision(kind, precision):
    size = 2 * substitution.BLOCK + 100  # products come with the second block
    attention = np.tril(np.random.default_rng(0).random((size, size)))
    attention /= attention.sum(1, keepdims=True)
    question = held_as(kind, mask(size, *range(1, 30)))
    parts = held_as(kind, attention, "float32"), question, held_as(kind, mask(size, 300, size - 2))
    plain = solve_flow(*parts)
    with torch.autocast("cpu", precision):
        found = solve_flow(*parts)
        for name in FIELDS:
            assert torch.equal(getattr(found, name), getattr(plain, name))
        entered = found.inflow(question)
    assert torch.equal(entered, plain.inflow(question))


@pytest.mark.parametrize(
    "convert",
    [
        scipy.sparse.csr_matrix,
        scipy.sparse.coo_array,
        scipy.sparse.csc_array,
        scipy.sparse.lil_matrix,
    ],
)
def test_every_scipy_format_is_read(convert):
    found = solve_flow(convert(chain(3, 0.5)), [1, 0, 0], [0, 0, 1])
    assert found.reach.tolist() == [0.25, 0.5, 1]
    assert isinstance(found.edge_flow(), scipy.sparse.csr_array)


def test_torch_csr_with_narrow_indices():
    wide = held_as("torch_csr", chain(5, 0.5))
    narrow = torch.sparse_csr_tensor(
        wide.crow_indices().int(),
        wide.col_indices().int(),
        wide.values(),
        size=(5, 5),
        check_invariants=True,
    )
    found = solve_flow(narrow, mask(5, 0), mask(5, 4))
    assert found.reach.tolist() == [0.0625, 0.125, 0.25, 0.5, 1]
    assert dense(found.edge_flow()).sum() == 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["torch", "torch_csr"])
@settings(laws, max_examples=20)
@given(problem=problems(max_tokens=40), chosen=options)
def test_cuda_agrees_and_stays_on_the_device(kind, dtype, problem, chosen):
    with on_gpu() as place:
        found = solve_flow(*place(list(given_as(kind, problem, dtype))), **chosen)
        for values in (found.reach, found.throughput, found.edge_flow(), found.sink_flow()):
            assert values.device == GPU
        agree(found, reference.flow(*problem.parts, **chosen), dtype)


@pytest.mark.gpu
def test_cuda_batches_and_pruning():
    attention = torch.rand(3, 600, 600, dtype=torch.float64).tril() / 300
    question, answer = torch.arange(600) < 50, torch.arange(600) > 590
    masks = question.expand(3, 600), answer.expand(3, 600)
    here = FlowGraph.from_attention(attention, *masks).prune(mass=0.8)
    with on_gpu() as place:
        there = FlowGraph.from_attention(*place([attention, *masks])).prune(mass=0.8)
        torch.testing.assert_close(there.dropped.cpu(), here.dropped)
        for remote in (there, there.to_sparse()):
            found = solve_graph(remote).throughput
            assert found.device == GPU
            torch.testing.assert_close(found.cpu(), solve_graph(here).throughput)


def test_a_question_that_does_not_reach_the_answer_is_refused():
    attention = chain(4, 0.5)
    attention[2, 1] = 0
    with pytest.raises(ValueError, match="no question token reaches the answer: every path"):
        solve_flow(attention, mask(4, 0, 1), mask(4, 3))
    with pytest.raises(ValueError, match="no question token reaches the answer: every path"):
        solve_flow(chain(4, 0.5), mask(4, 3), mask(4, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_names_the_rows_that_do_not_reach_the_answer(kind):
    cut = chain(3, 0.5)
    cut[1, 0] = 0
    attention = stack_as(kind, [chain(3, 0.5), cut] * 2)
    masks = [held_as(kind, np.stack([mask(3, token)] * 4)) for token in (0, 2)]
    with pytest.raises(ValueError, match=r"reaches the answer in batch rows \[1, 3\]"):
        solve_flow(attention, *masks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", ["uniform", "reach"])
def test_rows_that_do_not_reach_the_answer_may_carry_no_flow(kind, weights):
    cut = chain(3, 0.5)
    cut[1, 0] = 0
    attention = stack_as(kind, [chain(3, 0.5), cut])
    masks = [held_as(kind, np.stack([mask(3, token)] * 2)) for token in (0, 2)]
    flow = solve_flow(attention, *masks, question_weights=weights, unreached="zero")
    np.testing.assert_allclose(dense(flow.throughput), [[1, 1, 1], [0, 0, 0]])
    np.testing.assert_allclose(dense(flow.reach), [[0.25, 0.5, 1], [0, 0.5, 1]])
    np.testing.assert_allclose(dense(flow.sink_flow()), [[0, 0, 1], [0, 0, 0]])
    assert not dense(flow.edge_flow())[1].any()
    assert flow.question_reached.tolist() == [1, 0]
    alone = solve_flow(held_as(kind, cut), [1, 0, 0], [0, 0, 1], unreached="zero")
    assert alone.question_reached == 0
    assert not dense(alone.throughput).any()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_an_origin_may_carry_no_flow(kind):
    cut = chain(3, 0.5)
    cut[2, 1] = 0
    attention = stack_as(kind, [chain(3, 0.5), cut])
    masks = [held_as(kind, np.stack([mask(3, token)] * 2)) for token in (0, 2)]
    flow = solve_flow(attention, *masks, question_weights="origins", unreached="zero")
    np.testing.assert_allclose(dense(flow.throughput), [[0.5, 1, 1], [0, 0, 0]])
    np.testing.assert_allclose(dense(flow.sink_flow()), [[0, 0, 1], [0, 0, 0]])


def test_numbers_that_do_not_fit_are_refused_beside_rows_that_carry_no_flow():
    huge = np.tril(np.full((60, 60), 1e30, np.float32))
    cut = np.zeros((60, 60), np.float32)
    masks = [np.stack([mask(60, token)] * 2) for token in (0, 59)]
    with pytest.raises(FloatingPointError, match=r"does not fit float32 in batch rows \[1\]"):
        solve_flow(np.stack([cut, huge]), *masks, unreached="zero")


def test_a_chain_too_long_for_float32_is_solved_in_float64_as_the_message_says():
    parts = chain(60, 1e-3), mask(60, 0), mask(60, 59)
    with pytest.raises(ValueError, match=r"less than float32 can hold \(float64 attention"):
        solve_flow(parts[0].astype(np.float32), *parts[1:])
    np.testing.assert_allclose(solve_flow(*parts).throughput, np.ones(60))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"question_weights": "equal"}, "must be one of uniform, reach, origins, got"),
        ({"boundary": "open"}, "boundary must be one of literal, absorbing, got 'open'"),
        ({"backend": "gpu"}, "backend must be one of auto, dense, sparse, got 'gpu'"),
        ({"unreached": "skip"}, "unreached must be one of raise, zero, got 'skip'"),
    ],
)
def test_unknown_options_are_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        solve_flow(chain(3, 0.5), mask(3, 0), mask(3, 2), **chosen)


@pytest.mark.parametrize("module", [graph, flow])
def test_docstring_examples(module):
    results = doctest.testmod(module)
    assert results.failed == 0
    assert results.attempted >= 8
