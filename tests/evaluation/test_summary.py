"""Summaries of every protocol, against means and differences by hand."""

from functools import partial

import numpy as np
import pytest

from flowtracer_plugin.evaluation.summary import (
    bootstrap_interval,
    summarise_all,
    summarise_knock_outs,
)
from tests.evaluation import reference_knockout as slow

HOP = "attention:decision"


# --- intervals ---


@pytest.mark.parametrize("size", [2, 7])
def test_intervals_are_percentiles_of_resampled_means(size):
    values = np.random.default_rng(1).normal(size=size)
    found = bootstrap_interval(values, seed=5, resamples=200)
    drawn = np.random.default_rng(5).integers(0, size, (200, size))
    low, high = slow.interval(values.tolist(), drawn.tolist())
    assert found.mean == pytest.approx(np.mean(values))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_intervals_contain_the_mean_as_often_as_they_claim():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        found = bootstrap_interval(rng.normal(size=40), resamples=300)
        inside += found.low <= 0 <= found.high
    assert 0.9 < inside / 300 < 0.98


def test_a_single_example_has_no_interval():
    found = bootstrap_interval(np.array([3.0]))
    assert (found.mean, found.low, found.high) == (3.0, None, None)


# --- knock-outs ---


def effect(score, drop, side="top", gap=0, flipped=(0.0, 1.0)):
    return {"gap": gap, "score": score, "side": side, "drop": drop, "flipped": flipped}


def effects(rng):
    draw = [tuple(rng.normal(size=2).tolist()) for _ in range(4)]
    return (
        effect("flow", draw[0], flipped=(float(rng.random()), 1.0)),
        effect("flow", draw[1], side="bottom"),
        effect(HOP, draw[2]),
        effect("random", draw[3]),
    )


def test_knock_outs_are_means_and_paired_differences():
    rng = np.random.default_rng(2)
    examples = [effects(rng) for _ in range(6)]
    interval = partial(bootstrap_interval, seed=3, resamples=50)
    found = {(one.score, one.side): one for one in summarise_knock_outs(examples, interval)}
    flow = found["flow", "top"]
    drops = {
        key: np.array(
            [e["drop"] for each in examples for e in each if (e["score"], e["side"]) == key]
        )
        for key in found
    }
    own, chance, hop = (drops[name, "top"] for name in ("flow", "random", HOP))
    assert flow.drop == (interval(own[:, 0]), interval(own[:, 1]))
    assert flow.aopc == interval(own.mean(1))
    assert flow.over_chance == interval((own - chance).mean(1))
    assert flow.over_one_hop.mean == pytest.approx((own - hop).mean())
    assert found["flow", "bottom"].over_one_hop.mean == pytest.approx(
        (drops["flow", "bottom"] - hop).mean()
    )
    assert found["random", "top"].over_chance is None
    assert found[HOP, "top"].over_one_hop is None
    flips = [each[0]["flipped"] for each in examples]
    assert flow.flips.mean == pytest.approx(np.mean(flips))
    assert flow.flipped[0].mean == pytest.approx(np.mean(flips, axis=0)[0])


def test_without_the_baseline_there_is_no_difference_to_it():
    examples = [[effect("flow", (1.0, 2.0))]] * 3
    (found,) = summarise_knock_outs(examples, bootstrap_interval)
    assert (found.over_chance, found.over_one_hop) == (None, None)
    assert found.aopc.mean == 1.5


def test_examples_with_different_effects_are_refused():
    one, other = effect("flow", (1.0, 2.0)), effect("flow", (1.0, 2.0), gap=5)
    with pytest.raises(ValueError, match="effects of different scores or gaps"):
        summarise_knock_outs([[one], [other]], bootstrap_interval)


# --- all protocols ---


def curve(score, deletion, insertion):
    return {"score": score, "deletion_area": deletion, "insertion_area": insertion}


def again(score, side, changed, turned):
    return {"score": score, "side": side, "changed": changed, "reversed": turned}


def example(rng, *, turned=True):
    draw = rng.random(20).tolist()
    return {
        "knock_out": {
            "effects": [
                effect(score, [draw[place]], flipped=[0.0])
                for place, score in enumerate(("flow", HOP, "random"))
            ]
        },
        "curves": [
            curve("flow", draw[3], draw[4]),
            curve(HOP, draw[5], draw[6]),
            curve("random", draw[7], draw[8]),
        ],
        "lines": {
            "by_sum": {"flow": draw[9], HOP: draw[10]},
            "by_max": {"flow": draw[11], HOP: draw[12]},
        },
        "edges": [{"percent": 10, "backbone": draw[13], "others": draw[14]}],
        "regeneration": [
            again("flow", "top", draw[15], draw[16] if turned else None),
            again("flow", "bottom", draw[17], draw[18] if turned else None),
            again("random", "top", draw[19], 0.0 if turned else None),
        ],
    }


@pytest.fixture
def examples():
    rng = np.random.default_rng(3)
    return [example(rng) for _ in range(5)]


def values(examples, *path):
    found = []
    for one in examples:
        for step in path:
            one = one[step]
        found.append(one)
    return np.array(found)


def test_curves(examples):
    found = {one.score: one for one in summarise_all(examples, seed=4).curves}
    deletion = values(examples, "curves", 0, "deletion_area")
    gaps = [
        values(examples, "curves", place, "insertion_area")
        - values(examples, "curves", place, "deletion_area")
        for place in range(3)
    ]
    flow = found["flow"]
    assert flow.deletion == bootstrap_interval(deletion, seed=4)
    assert flow.gap == bootstrap_interval(gaps[0], seed=4)
    assert flow.over_one_hop == bootstrap_interval(gaps[0] - gaps[1], seed=4)
    assert flow.over_chance == bootstrap_interval(gaps[0] - gaps[2], seed=4)
    assert found[HOP].over_one_hop is None
    assert found["random"].over_chance is None


def test_lines_count_where_every_score_orders_them(examples):
    examples[1]["lines"]["by_max"][HOP] = None
    kept = [one for place, one in enumerate(examples) if place != 1]
    assert summarise_all(examples).counted["lines"] == 4
    found = {one.score: one for one in summarise_all(examples, seed=4).lines}
    sums = {name: values(kept, "lines", "by_sum", name) for name in ("flow", HOP)}
    assert found["flow"].by_sum == bootstrap_interval(sums["flow"], seed=4)
    assert found["flow"].over_one_hop == bootstrap_interval(sums["flow"] - sums[HOP], seed=4)
    for one in examples:
        one["lines"]["by_sum"]["flow"] = None
    assert summarise_all(examples).lines == ()


def test_edges(examples):
    (found,) = summarise_all(examples, seed=4).edges
    ours, others = (values(examples, "edges", 0, name) for name in ("backbone", "others"))
    assert found.percent == 10
    assert found.over_others == bootstrap_interval(ours - others, seed=4)


def test_regeneration(examples):
    found = {(one.score, one.side): one for one in summarise_all(examples, seed=4).regeneration}
    changed = values(examples, "regeneration", 0, "changed")
    chance = values(examples, "regeneration", 2, "changed")
    top = found["flow", "top"]
    assert top.changed == bootstrap_interval(changed, seed=4)
    assert top.over_chance == bootstrap_interval(changed - chance, seed=4)
    assert top.reversed == bootstrap_interval(
        values(examples, "regeneration", 0, "reversed"), seed=4
    )
    assert found["random", "top"].over_chance is None
    unknown = [example(np.random.default_rng(0), turned=False)]
    assert summarise_all(unknown).regeneration[0].reversed is None


def test_what_was_skipped_or_not_asked_for_does_not_count(examples):
    examples[0]["lines"] = {"skipped": "two lines"}
    del examples[1]["curves"]
    found = summarise_all(examples)
    assert found.counted == {
        "knock_out": 5, "curves": 4, "lines": 4, "edges": 5, "regeneration": 5
    }  # fmt: skip
    nothing = summarise_all([{"knock_out": one["knock_out"]} for one in examples])
    assert (nothing.curves, nothing.lines, nothing.edges, nothing.regeneration) == ((), (), (), ())
    assert nothing.counted == {"knock_out": 5}
    assert summarise_all([]).knock_out == ()
