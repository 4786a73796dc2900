from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import flowtracer_plugin.flow.backbone
from flowtracer_plugin.flow.backbone import (
    FlowPath,
    Outline,
    step_bounds,
    step_graph,
    strongest_edges,
)
from flowtracer_plugin.flow.solve import QUESTION_WEIGHTS
from flowtracer_plugin.flow.streamed import stream_stored
from tests.flow import reference, reference_backbone
from tests.flow.strategies import Problem, problems

OPTIONS = [(w, b) for w in QUESTION_WEIGHTS for b in ("literal", "absorbing")]
options = st.sampled_from(OPTIONS)


def backbone_of(problem, option=OPTIONS[0], *, bounds=None, **chosen):
    weights, boundary = option
    size = len(problem.question)
    return stream_stored(
        *problem.parts,
        Outline(prompt_length=1, bounds=bounds or [(0, size)]),
        question_weights=weights,
        boundary=boundary,
        **chosen,
    )


def small_graph(**chosen):
    """A graph small enough to check by hand: token 0 is the question, token 3 the answer."""
    attention = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0.25, 0.75, 0]])
    question, answer = np.array([1, 0, 0, 0], bool), np.array([0, 0, 0, 1], bool)
    return backbone_of(Problem(attention=attention, question=question, answer=answer), **chosen)


def test_paths_of_the_small_graph():
    # h = 1, 0.625, 0.75, 1; from 0: 0.625 to token 1, 0.375 to token 2; from 1: 0.4 to 3, 0.6 to 2
    found = {path.tokens: path.probability for path in small_graph().paths}
    assert found == pytest.approx({(0, 1, 2, 3): 0.375, (0, 2, 3): 0.375, (0, 1, 3): 0.25})


def test_scores_of_the_small_graph():
    fork, join = 0.625**-0.625 * 0.375**-0.375, 0.25**-0.25 * 0.75**-0.75
    split = 0.4**-0.4 * 0.6**-0.6
    assert small_graph().hubs == pytest.approx([fork, 0.625 * split, 0.75, 1])
    assert small_graph().checkpoints == pytest.approx([1, 0.625, 0.75 * 2, join])


def test_strongest_edges_of_the_small_graph():
    found = {(earlier, later): flow for earlier, later, flow in strongest_edges(small_graph())}
    edges = {(0, 1): 0.625, (0, 2): 0.375, (1, 2): 0.375, (1, 3): 0.25, (2, 3): 0.75}
    assert found == pytest.approx(edges)
    assert [edge[:2] for edge in strongest_edges(small_graph(), 0.4)] == [(0, 1), (2, 3)]
    one = small_graph(edges=1)
    assert one.sources.token[:, 0].tolist() == [0, 0, one.sources.token[2, 0], 2]
    assert one.targets.token[:, 0].tolist() == [
        1,
        2,
        3,
        3,
    ]  # the last has none


def test_steps_of_the_small_graph():
    bounds = [(0, 1), (1, 3), (3, 4)]
    graph = step_graph(
        small_graph(bounds=bounds), ["Q", "a", "b", "A"], bounds, ["x", "y", "z", "w"]
    )
    assert graph.edges == pytest.approx(np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]]))
    assert graph.sink == pytest.approx([0, 0, 1])
    assert [(step.text, step.region, step.inflow) for step in graph.steps] == [
        ("Q", "x", 1.0),
        ("ab", "z", 1.0),
        ("A", "w", 1.0),
    ]


blocks = st.integers(1, 9)


@settings(max_examples=40)
@given(problems(max_tokens=8), options, blocks)
def test_scores_equal_their_slow_definition(problem, option, block):
    found, slow = (
        backbone_of(problem, option, block=block),
        reference.flow(*problem.parts, *option),
    )
    hubs, checkpoints = reference_backbone.hub_and_checkpoint_scores(slow)
    np.testing.assert_allclose(found.hubs, hubs, rtol=1e-9)
    np.testing.assert_allclose(found.checkpoints, checkpoints, rtol=1e-9)
    for name, wanted in (("source", slow["source"]), ("sink", slow["sink_flow"])):
        np.testing.assert_allclose(getattr(found, name), wanted, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(found.prompt_inflow, slow["edge_flow"][:, 0], atol=1e-12)
    assert found.question_reached == np.count_nonzero(slow["reach"][problem.question])


@settings(max_examples=40)
@given(problems(max_tokens=9), options, blocks, st.integers(1, 10))
def test_kept_edges_are_the_strongest_of_each_token(problem, option, block, kept):
    found = backbone_of(problem, option, block=block, edges=kept)
    flow = reference.flow(*problem.parts, *option)["edge_flow"]
    for edges, wanted in ((found.sources, flow), (found.targets, flow.T)):
        few = min(kept, np.flatnonzero(problem.answer)[-1] + 1)
        best = -np.sort(-wanted, axis=1)[:, :few]
        np.testing.assert_allclose(edges.flow, best, rtol=1e-9, atol=1e-15)
        token = np.arange(len(flow))[:, None]
        at_end = wanted[token, edges.token]
        np.testing.assert_allclose(at_end * (edges.flow > 0), best, rtol=1e-9, atol=1e-15)
        np.testing.assert_array_equal((edges.token == token), edges.flow == 0)


@settings(max_examples=40)
@given(problems(max_tokens=8), options, st.integers(1, 12), blocks)
def test_likely_paths_are_the_likeliest_of_all(problem, option, count, block):
    everything = reference_backbone.all_paths(*problem.parts, *option)
    ranked = sorted(everything.values(), reverse=True)
    found = backbone_of(problem, option, paths=count, block=block).paths
    assert len(found) == min(count, len(ranked))
    assert len({path.tokens for path in found}) == len(found)
    np.testing.assert_allclose([p.probability for p in found], ranked[:count], rtol=1e-9)
    for path in found:
        assert path.probability == pytest.approx(everything[path.tokens], rel=1e-9)


@settings(max_examples=40)
@given(problems(max_tokens=8), options, blocks)
def test_all_paths_together_carry_the_unit(problem, option, block):
    throughput = reference.flow(*problem.parts, *option)["throughput"]
    found = backbone_of(problem, option, paths=2 ** len(throughput), block=block).paths
    assert sum(path.probability for path in found) == pytest.approx(1)
    through = np.zeros(len(throughput))
    for path in found:
        through[list(path.tokens)] += path.probability
        origins = ~problem.answer if option[0] == "origins" else problem.question
        assert origins[path.tokens[0]]
        assert problem.answer[path.tokens[-1]]
    np.testing.assert_allclose(through, throughput, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("block", [4, 256])
def test_the_likeliest_of_thousands_of_paths_are_found(block):
    tokens = 13
    attention = np.tril(np.random.default_rng(0).random((tokens, tokens)))
    problem = Problem(
        attention=attention / attention.sum(1, keepdims=True),
        question=np.arange(tokens) < 2,
        answer=np.arange(tokens) > 9,
    )
    everything = sorted(reference_backbone.all_paths(*problem.parts).values(), reverse=True)
    assert len(everything) > 5000
    found = [path.probability for path in backbone_of(problem, paths=400, block=block).paths]
    np.testing.assert_allclose(found, everything[:400], rtol=1e-9)


def test_a_graph_with_a_single_path():
    attention = np.array([[0.0, 0], [1, 0]])
    problem = Problem(
        attention=attention, question=np.array([True, False]), answer=np.array([False, True])
    )
    assert backbone_of(problem).paths == (FlowPath(tokens=(0, 1), probability=1.0),)


@st.composite
def cuts(draw):
    problem = draw(problems(max_tokens=10))
    inner = draw(st.sets(st.integers(1, len(problem.question) - 1)))
    edges = [0, *sorted(inner), len(problem.question)]
    return problem, list(pairwise(edges))


@settings(max_examples=40)
@given(cuts(), options, blocks)
def test_flow_between_steps_equals_its_slow_definition_and_is_conserved(cut, option, block):
    problem, bounds = cut
    slow = reference.flow(*problem.parts, *option)
    pieces = [chr(97 + token) for token in range(len(problem.question))]
    found = backbone_of(problem, option, bounds=bounds, block=block)
    graph = step_graph(found, pieces, bounds, pieces)
    edges, inflow, sink = reference_backbone.step_sums(slow, bounds)
    found = [step.inflow for step in graph.steps]
    np.testing.assert_allclose(graph.edges, edges, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(found, inflow, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(graph.sink, sink, rtol=1e-9, atol=1e-15)
    # flow into a step equals the flow out of it, to later steps or into the sink
    np.testing.assert_allclose(found, graph.edges.sum(0) + graph.sink, rtol=1e-9, atol=1e-12)
    assert graph.sink.sum() == pytest.approx(1)
    assert "".join(step.text for step in graph.steps) == "".join(pieces)
    assert [step.region for step in graph.steps] == [pieces[stop - 1] for _, stop in bounds]


def test_too_many_steps_are_merged_within_prompt_and_response(monkeypatch):
    pieces = ["a\n"] * 5 + ["b\n"] * 8
    assert len(step_bounds(pieces, 5)) == 13
    monkeypatch.setattr(flowtracer_plugin.flow.backbone, "MAX_STEPS", 5)
    assert step_bounds(pieces, 5) == ((0, 3), (3, 5), (5, 8), (8, 11), (11, 13))
    assert step_bounds(["a\n"] * 5, 0) == tuple((i, i + 1) for i in range(5))


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
        # a token belongs to the step of its first character that is not whitespace
        (["a", ".\nb", "c"], ["a.\nb", "c"]),
        (["a", ".", "\nb", "c"], ["a.", "\nbc"]),
        # the first bytes of a split character are empty pieces, in the step of the character
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
