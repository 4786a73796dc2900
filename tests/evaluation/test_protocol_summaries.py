"""Summaries of every protocol, against means and differences by hand."""

import numpy as np
import pytest

from flowtracer_plugin.evaluation.summaries import bootstrap_interval, summarise_all

HOP = "attention:decision"


def curve(score, deletion, insertion):
    return {"score": score, "deletion_area": deletion, "insertion_area": insertion}


def again(score, side, changed, turned):
    return {"score": score, "side": side, "changed": changed, "reversed": turned}


def example(rng, *, turned=True):
    draw = rng.random(20).tolist()
    effect = {"gap": 0, "flipped": [0.0], "divergence": [0.0]}
    return {
        "knock_out": {
            "effects": [
                {**effect, "score": score, "side": "top", "drop": [draw[place]]}
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
