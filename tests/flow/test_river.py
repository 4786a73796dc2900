"""The flow across the cuts of a text, and the strongest flows between its steps."""

from itertools import pairwise
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from flowtracer_plugin.flow.backbone import Step, StepGraph, bin_starts, strongest_flows
from flowtracer_plugin.flow.river import river
from tests.flow import reference, reference_backbone
from tests.flow.strategies import problems
from tests.flow.test_backbone import backbone_of, blocks, options, small_graph


def test_river_of_the_small_graph():
    found = river(small_graph(), 1)
    # Cuts before each token, and after the last. The response has three tokens for five parts.
    assert found.cuts.tolist() == [0, 1, 2, 3, 4]
    assert found.waiting == pytest.approx([1, 0, 0, 0, 0])
    assert found.arrived == pytest.approx([0, 0, 0, 0, 1])
    assert found.bands == ("prompt", "response 1/5", "response 3/5", "response 5/5")
    assert found.band_starts == (0, 1, 2, 3)
    expected = [[0, 0, 0, 0], [1, 0, 0, 0], [0.375, 0.625, 0, 0], [0, 0.25, 0.75, 0], [0] * 4]
    assert found.flow == pytest.approx(np.array(expected))
    assert found.passing == pytest.approx([0, 0.375, 0.25, 0])


bins = st.integers(1, 12)


@settings(max_examples=40)
@given(problems(max_tokens=9), options, blocks, bins)
def test_rivers_equal_their_slow_definition(problem, option, block, count):
    with patch("flowtracer_plugin.flow.backbone.BINS", count):
        found = river(backbone_of(problem, option, block=block), 1)
    flow = reference.flow(*problem.parts, *option)
    starts = [*found.band_starts, len(problem.question)]
    for row, cut in enumerate(found.cuts.tolist()):
        edges, waiting, arrived = reference_backbone.crossing(flow, cut)
        bands = [sum(edges[start:stop]) for start, stop in pairwise(starts)]
        np.testing.assert_allclose(found.flow[row], bands, rtol=1e-9, atol=1e-12)
        assert found.waiting[row] == pytest.approx(waiting, abs=1e-12)
        assert found.arrived[row] == pytest.approx(arrived, abs=1e-12)
    over = [
        reference_backbone.passing_over(flow, start, stop)
        for start, stop in pairwise(found.cuts.tolist())
    ]
    np.testing.assert_allclose(found.passing, over, rtol=1e-9, atol=1e-12)


@settings(max_examples=40)
@given(problems(max_tokens=12), options, bins)
def test_one_unit_crosses_every_cut(problem, option, count):
    with patch("flowtracer_plugin.flow.backbone.BINS", count):
        found = river(backbone_of(problem, option), 1)
    np.testing.assert_allclose(found.waiting + found.flow.sum(1) + found.arrived, 1, rtol=1e-9)
    assert found.flow.min() >= 0


def test_bins_have_equal_length_and_the_response_starts_one():
    assert bin_starts(5, 2).tolist() == [0, 1, 2, 3, 4]
    starts = bin_starts(1000, 333)
    assert 333 in starts
    assert len(starts) == 101
    assert set(np.diff(starts).tolist()) <= {3, 7, 10}
    assert bin_starts(4, 4).tolist() == [0, 1, 2, 3]  # no response


def graph_of(edges):
    steps = [
        Step(start=row, stop=row + 1, text="", region="response", inflow=0.0)
        for row in range(len(edges))
    ]
    return StepGraph(
        steps=tuple(steps), edges=np.array(edges, np.float64), sink=np.zeros(len(edges))
    )


GRAPH = graph_of([[0, 0, 0, 0], [5, 0, 0, 0], [3, 4, 0, 0], [1, 0.5, 2, 0]])  # 15.5 in all


def test_strongest_flows_stop_at_the_share():
    found = strongest_flows(GRAPH, share=0.75)
    assert found.flows == ((0, 1, 5.0), (1, 2, 4.0), (0, 2, 3.0))
    assert found.share == pytest.approx(12 / 15.5)
    assert found.steps == (0, 1, 2)
    assert strongest_flows(GRAPH, share=1.0).share == pytest.approx(1)
    assert strongest_flows(GRAPH, share=0.0).flows == ()


def test_strongest_flows_obey_the_limits():
    assert len(strongest_flows(GRAPH, share=1.0, max_flows=2).flows) == 2
    few = strongest_flows(GRAPH, share=1.0, max_steps=3)
    assert few.steps == (0, 1, 2)
    assert few.share == pytest.approx(12 / 15.5)


def test_flows_that_need_too_many_steps_are_left_out():
    edges = np.zeros((5, 5))
    edges[1, 0], edges[2, 0], edges[4, 3], edges[2, 1] = 9, 8, 7, 1
    found = strongest_flows(graph_of(edges), share=1.0, max_steps=3)
    assert found.flows == ((0, 1, 9.0), (0, 2, 8.0), (1, 2, 1.0))
    assert found.share == pytest.approx(18 / 25)


def test_a_graph_without_flow_has_no_strongest_flows():
    found = strongest_flows(graph_of([[0.0, 0.0], [0.0, 0.0]]))
    assert (found.flows, found.share, found.steps) == ((), 0.0, ())


@settings(max_examples=40)
@given(st.lists(st.integers(0, 9), min_size=10, max_size=10), st.floats(0, 1))
def test_no_smaller_set_holds_the_share(flows, share):
    edges = np.zeros((5, 5))
    edges[np.tril_indices(5, -1)] = flows
    found = strongest_flows(graph_of(edges), share=share)
    assert len(found.flows) == reference_backbone.smallest_flow_set(edges, share)


@pytest.mark.parametrize(
    "wrong", [{"share": 1.1}, {"share": -1.0}, {"max_steps": 1}, {"max_flows": 0}]
)
def test_limits_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="wanted a share from 0 to 1, at least 2 steps and 1 flow"):
        strongest_flows(GRAPH, **wrong)
