import json
from dataclasses import asdict

import numpy as np
import pytest

from flowtracer_plugin.evaluation.faithfulness import Effect
from flowtracer_plugin.evaluation.summaries import bootstrap_interval, effects_of, summarise
from tests.evaluation import reference_knockout as slow


def effect(score, drop, side="top", gap=0, flipped=(0.0, 1.0)):
    return Effect(
        gap=gap, score=score, side=side, drop=drop, flipped=flipped, divergence=(0.0, 0.0)
    )


def example(rng):
    draw = [tuple(rng.normal(size=2).tolist()) for _ in range(4)]
    return (
        effect("flow", draw[0], flipped=(float(rng.random()), 1.0)),
        effect("flow", draw[1], side="bottom"),
        effect("attention:decision", draw[2]),
        effect("random", draw[3]),
    )


@pytest.mark.parametrize("size", [2, 7])
def test_intervals_are_percentiles_of_resampled_means(size):
    values = np.random.default_rng(1).normal(size=size)
    found = bootstrap_interval(values, seed=5, resamples=200)
    drawn = np.random.default_rng(5).integers(0, size, (200, size))
    low, high = slow.interval(values.tolist(), drawn.tolist())
    assert found.mean == pytest.approx(np.mean(values))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_intervals_hold_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        found = bootstrap_interval(rng.normal(size=40), resamples=300)
        inside += found.low <= 0 <= found.high
    assert 0.9 < inside / 300 < 0.98


def test_a_single_example_has_no_interval():
    found = bootstrap_interval(np.array([3.0]))
    assert (found.mean, found.low, found.high) == (3.0, None, None)


def test_summaries_are_means_and_paired_differences():
    rng = np.random.default_rng(2)
    examples = [example(rng) for _ in range(6)]
    found = {(one.score, one.side): one for one in summarise(examples, seed=3, resamples=50)}
    flow = found["flow", "top"]
    drops = {
        one: np.array([e.drop for each in examples for e in each if (e.score, e.side) == one])
        for one in found
    }
    own, chance = drops["flow", "top"], drops["random", "top"]
    hop = drops["attention:decision", "top"]
    for k in range(2):
        assert flow.drop[k] == bootstrap_interval(own[:, k], seed=3, resamples=50)
    assert flow.aopc == bootstrap_interval(own.mean(1), seed=3, resamples=50)
    assert flow.over_chance == bootstrap_interval((own - chance).mean(1), seed=3, resamples=50)
    assert flow.over_one_hop.mean == pytest.approx((own - hop).mean())
    assert found["flow", "bottom"].over_one_hop.mean == pytest.approx(
        (drops["flow", "bottom"] - hop).mean()
    )
    assert found["random", "top"].over_chance is None
    assert found["attention:decision", "top"].over_one_hop is None
    flips = [each[0].flipped for each in examples]
    assert flow.flips.mean == pytest.approx(np.mean(flips))
    assert flow.flipped[0].mean == pytest.approx(np.mean(flips, axis=0)[0])


def test_without_the_baseline_there_is_no_difference_to_it():
    (found,) = summarise([[effect("flow", (1.0, 2.0))]] * 3)
    assert (found.over_chance, found.over_one_hop) == (None, None)
    assert found.aopc.mean == 1.5
    assert summarise([]) == ()


def test_examples_that_were_measured_otherwise_are_refused():
    with pytest.raises(ValueError, match="effects of different scores or gaps"):
        summarise([[effect("flow", (1.0, 2.0))], [effect("flow", (1.0, 2.0), gap=5)]])


def test_effects_come_back_as_they_were_written():
    rng = np.random.default_rng(0)
    effects = example(rng)
    assert effects_of(json.loads(json.dumps([asdict(one) for one in effects]))) == effects
