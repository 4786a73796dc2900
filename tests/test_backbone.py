from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtracer_plugin.backbone import (
    FlowPath,
    checkpoint_scores,
    hub_scores,
    likely_paths,
    step_bounds,
    step_graph,
)
from flowtracer_plugin.flow import solve_flow
from tests import reference, reference_backbone
from tests.strategies import problems

OPTIONS = [(w, b) for w in ("uniform", "reach") for b in ("literal", "absorbing")]
options = st.sampled_from(OPTIONS)


def solved(problem, option):
    weights, boundary = option
    return solve_flow(*problem.parts, question_weights=weights, boundary=boundary)


@pytest.fixture
def drawn():
    """A drawing with numbers: 0 asks, 1 and 2 think, 3 answers.

    From the question a half goes to each thought; the second also listens to the first.
    """
    attention = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0.25, 0.75, 0]])
    return solve_flow(attention, [1, 0, 0, 0], [0, 0, 0, 1])


def test_drawn_example_has_these_paths(drawn):
    # h = 1, 0.625, 0.75, 1; from 0: 0.625 to token 1, 0.375 to token 2; from 1: 0.4 to 3, 0.6 to 2
    found = {path.tokens: path.probability for path in likely_paths(drawn, 5)}
    assert found == pytest.approx({(0, 1, 2, 3): 0.375, (0, 2, 3): 0.375, (0, 1, 3): 0.25})


def test_drawn_example_has_these_scores(drawn):
    assert drawn.throughput == pytest.approx([1, 0.625, 0.75, 1])
    fork, join = 0.625**-0.625 * 0.375**-0.375, 0.25**-0.25 * 0.75**-0.75
    split = 0.4**-0.4 * 0.6**-0.6
    assert hub_scores(drawn) == pytest.approx([fork, 0.625 * split, 0.75, 1])
    assert checkpoint_scores(drawn) == pytest.approx([1, 0.625, 0.75 * 2, join])


def test_drawn_example_has_these_steps(drawn):
    graph = step_graph(drawn, ["Q", "a", "b", "A"], [(0, 1), (1, 3), (3, 4)], ["x", "y", "z", "w"])
    assert graph.edges == pytest.approx(np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]]))
    assert graph.sink == pytest.approx([0, 0, 1])
    assert [(step.text, step.region, step.inflow) for step in graph.steps] == [
        ("Q", "x", 1.0),
        ("ab", "z", 1.0),
        ("A", "w", 1.0),
    ]


@settings(deadline=None, max_examples=60)
@given(problems(max_tokens=8), options)
def test_scores_equal_their_slow_definition(problem, option):
    flow, slow = solved(problem, option), reference.flow(*problem.parts, *option)
    hubs, checkpoints = reference_backbone.hub_and_checkpoint_scores(slow)
    np.testing.assert_allclose(hub_scores(flow), hubs, rtol=1e-9)
    np.testing.assert_allclose(checkpoint_scores(flow), checkpoints, rtol=1e-9)


@settings(deadline=None, max_examples=100)
@given(problems(max_tokens=8), options, st.integers(1, 12))
def test_likely_paths_are_the_likeliest_of_all(problem, option, count):
    everything = reference_backbone.all_paths(*problem.parts, *option)
    ranked = sorted(everything.values(), reverse=True)
    found = likely_paths(solved(problem, option), count)
    assert len(found) == min(count, len(ranked))
    assert len({path.tokens for path in found}) == len(found)
    np.testing.assert_allclose([p.probability for p in found], ranked[:count], rtol=1e-9)
    for path in found:
        assert path.probability == pytest.approx(everything[path.tokens], rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(problems(max_tokens=8), options)
def test_all_paths_together_carry_the_unit(problem, option):
    flow = solved(problem, option)
    found = likely_paths(flow, 2 ** len(flow.throughput))
    assert sum(path.probability for path in found) == pytest.approx(1)
    through = np.zeros(len(flow.throughput))
    for path in found:
        through[list(path.tokens)] += path.probability
        assert problem.question[path.tokens[0]]
        assert problem.answer[path.tokens[-1]]
    np.testing.assert_allclose(through, flow.throughput, rtol=1e-9, atol=1e-15)


def test_of_thousands_of_paths_the_likeliest_come_first():
    tokens = 13
    attention = np.tril(np.random.default_rng(0).random((tokens, tokens)))
    parts = (
        attention / attention.sum(1, keepdims=True),
        np.arange(tokens) < 2,
        np.arange(tokens) > 9,
    )
    everything = sorted(reference_backbone.all_paths(*parts).values(), reverse=True)
    assert len(everything) > 5000
    found = [path.probability for path in likely_paths(solve_flow(*parts), 400)]
    np.testing.assert_allclose(found, everything[:400], rtol=1e-9)


def test_one_path_is_all_there_is():
    flow = solve_flow(np.array([[0.0, 0], [1, 0]]), [1, 0], [0, 1])
    assert likely_paths(flow, 3) == (FlowPath(tokens=(0, 1), probability=1.0),)


def test_no_paths_are_no_wish(drawn):
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        likely_paths(drawn, 0)


@st.composite
def cuts(draw):
    problem = draw(problems(max_tokens=10))
    inner = draw(st.sets(st.integers(1, len(problem.question) - 1)))
    edges = [0, *sorted(inner), len(problem.question)]
    return problem, list(pairwise(edges))


@settings(deadline=None, max_examples=60)
@given(cuts(), options)
def test_flow_between_steps_equals_its_slow_definition_and_is_conserved(cut, option):
    problem, bounds = cut
    flow, slow = solved(problem, option), reference.flow(*problem.parts, *option)
    pieces = [chr(97 + token) for token in range(len(problem.question))]
    graph = step_graph(flow, pieces, bounds, pieces)
    edges, inflow, sink = reference_backbone.step_sums(slow, bounds)
    found = [step.inflow for step in graph.steps]
    np.testing.assert_allclose(graph.edges, edges, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(found, inflow, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(graph.sink, sink, rtol=1e-9, atol=1e-15)
    # what enters a step leaves it: to later steps, or into the sink
    np.testing.assert_allclose(found, graph.edges.sum(0) + graph.sink, rtol=1e-9, atol=1e-12)
    assert graph.sink.sum() == pytest.approx(1)
    assert "".join(step.text for step in graph.steps) == "".join(pieces)
    assert [step.region for step in graph.steps] == [pieces[stop - 1] for _, stop in bounds]


def steps_of(*pieces, prompt_length=0):
    return ["".join(pieces[a:b]) for a, b in step_bounds(pieces, prompt_length)]


@pytest.mark.parametrize(
    ("pieces", "steps"),
    [
        (["One", ".", " Two", "!", " Three", "?", " Four"], ["One.", " Two!", " Three?", " Four"]),
        (["a", "\n", "b", "\n\n", "c"], ["a\n", "b\n\n", "c"]),
        (["It", " is", " 3", ".", "5", " m", "."], ["It is 3.5 m."]),
        (["v", "1", ".", "2", ".", "3", " ok"], ["v1.2.3 ok"]),
        (["a", ".", "\r\n", "b", "\r\n", "\r\n", "c"], ["a.\r\n", "b\r\n\r\n", "c"]),
        (["a", "\r", "\n", "\r", "\n", "b"], ["a\r\n\r\n", "b"]),
        (["a", "\n", "   ", "b"], ["a\n   ", "b"]),
        (["a", " ", "\n", " ", "\n", "b"], ["a \n \n", "b"]),
        (["\n", "\n", "a", ".", " b"], ["\n\na.", " b"]),
        (["1", ".", " Add", "\n", "12", ".", " Halve"], ["1. Add\n", "12. Halve"]),
        (["It", " is", " 5", ".", " So"], ["It is 5.", " So"]),
        (["是", "。", "所以", "42", "。"], ["是。", "所以42。"]),
        (["Wait", "...", " no"], ["Wait...", " no"]),
        (["a", ".\n\n", "b"], ["a.\n\n", "b"]),
        # a token that spans the border stays with the step in which it begins, blanks aside
        (["a", ".\nb", "c"], ["a.\nb", "c"]),
        (["a", ".", "\nb", "c"], ["a.", "\nbc"]),
        # the first bytes of a split character are empty pieces, and stay with it
        (["a", ".", " ", "", "", "€", "!"], ["a. ", "€!"]),
        (["a", "\n", "", "", ""], ["a\n"]),
        ([" "], [" "]),
        ([""], [""]),
        ([], []),
    ],
)
def test_steps_are_lines_and_sentences(pieces, steps):
    assert steps_of(*pieces) == steps


def test_first_bytes_of_a_character_are_in_its_step():
    assert step_bounds(["a", "\n", "", "€"], 0) == ((0, 2), (2, 4))


def test_prompt_and_response_never_share_a_step():
    assert steps_of("What", " is", " it", " a", " dog", prompt_length=3) == ["What is it", " a dog"]
    assert step_bounds(["a", "b"], 2) == ((0, 2),)
    assert step_bounds(["a", "b"], 0) == ((0, 2),)


pieces_of_text = st.lists(
    st.sampled_from(["", "a", " b", ".", ". ", "\n", "\r\n", " ", "3", "?\n\n", "  ", "é", "。"]),
    max_size=20,
)


@given(pieces_of_text, st.integers(0, 20))
def test_steps_partition_the_tokens(pieces, border):
    border = min(border, len(pieces))
    bounds = step_bounds(pieces, border)
    assert [token for a, b in bounds for token in range(a, b)] == list(range(len(pieces)))
    assert all(a < b for a, b in bounds)
    assert not any(a < border < b for a, b in bounds)


@given(pieces_of_text)
def test_no_step_is_blank_unless_the_text_is(pieces):
    steps = steps_of(*pieces)
    assert all(step.strip() for step in steps) or not "".join(pieces).strip()
