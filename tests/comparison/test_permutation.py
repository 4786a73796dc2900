"""Differences between two sides: means, p-values, the shared beginning, words."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import sparse

from flowtracer_plugin.comparison import permutation
from flowtracer_plugin.comparison.permutation import (
    MOST_DEALS,
    Sides,
    compare_measures,
    compare_sides,
    first_identical,
    sides_by_truth,
)
from flowtracer_plugin.comparison.texts import (
    compare_beginnings,
    compare_words,
    least_texts,
    shared_length,
)
from tests.comparison import reference_contrast as slow

NAMES = ("right", "wrong")


def make_sides(first, second):
    return Sides(names=NAMES, first=tuple(first), second=tuple(second))


@st.composite
def dealt(draw):
    """Values of a few texts and two sides; values are in quarters, so that ties are common."""
    count, things = draw(st.integers(3, 5)), draw(st.integers(1, 3))
    values = draw(
        st.lists(
            st.lists(st.integers(0, 4).map(lambda n: n / 4), min_size=things, max_size=things),
            min_size=count,
            max_size=count,
        )
    )
    order = draw(st.permutations(range(count)))
    left, right = sorted(draw(st.sets(st.integers(1, count), min_size=2, max_size=2)))
    return values, order[:left], order[left:right]


@given(dealt())
def test_p_values_are_those_of_all_orders_in_exact_fractions(case):
    values, sides = np.array(case[0]), make_sides(*case[1:])
    found = compare_sides(values, sides)
    rows = slow.exact(values)
    expected = [
        float(slow.difference(rows, sides.first, sides.second, thing))
        for thing in range(values.shape[1])
    ]
    np.testing.assert_allclose(found.difference, expected, atol=1e-12)
    if len(sides.members) == 2:
        assert found.p is found.p_corrected is None
    else:
        alone, of_any = slow.p_values(values.tolist(), sides.first, sides.second)
        np.testing.assert_allclose(found.p, alone)
        np.testing.assert_allclose(found.p_corrected, of_any)


def test_a_hand_counted_case():
    # 1 and 2 against 0, 0 and 0: only one of the ten pairs has a mean of 1.5.
    found = compare_sides(np.array([[1.0], [0], [2], [0], [0]]), make_sides((0, 2), (1, 3, 4)))
    assert (found.first.tolist(), found.second.tolist()) == ([1.5], [0.0])
    assert (found.p.tolist(), found.p_corrected.tolist()) == ([0.1], [0.1])


def test_texts_on_neither_side_do_not_count():
    values = np.array([[1.0], [99], [2], [0], [0], [0]])
    alone = compare_sides(values, make_sides((0, 2), (3, 4, 5)))
    assert alone.first.tolist() == [1.5]
    assert alone.p.tolist() == [0.1]


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 2), (3, 3), (2, 4), (1, 5)])
def test_no_p_is_below_the_lowest_and_one_case_attains_it(first, second):
    sides = make_sides(range(first), range(first, first + second))
    assert sides.deals == comb(first + second, first) == sides.tried
    values = np.array([[1.0]] * first + [[0.0]] * second)
    assert compare_sides(values, sides).p.tolist() == [pytest.approx(sides.lowest_p)]


def test_a_sample_of_assignments_is_close_to_all_of_them():
    rng = np.random.default_rng(3)
    values = rng.random((18, 3)) + np.array([0.0, 0.2, 5.0]) * (np.arange(18) < 9)[:, None]
    sides = make_sides(range(9), range(9, 18))
    assert sides.deals > MOST_DEALS
    assert sides.tried == MOST_DEALS // 2
    found = compare_sides(values, sides)
    chosen = np.array(list(combinations(range(18), 9)))
    weights = np.full((len(chosen), 18), -1 / 9)
    np.put_along_axis(weights, chosen, 1 / 9, 1)
    whole = (np.abs(weights @ values) >= np.abs(found.difference) - 1e-9).mean(0)
    np.testing.assert_allclose(found.p, whole, atol=0.02)
    assert 1e-4 == sides.lowest_p <= found.p[2] <= found.p_corrected[2] <= 3e-4
    assert (found.p <= found.p_corrected).all()
    assert compare_sides(values, sides).p.tolist() == found.p.tolist()


def test_very_many_texts_are_dealt_less_often_and_their_ways_are_not_counted():
    sides = make_sides(range(30_000), range(30_000, 100_000))
    assert (sides.counted, sides.tried) == (False, 2_000)
    assert make_sides(range(2_000_000), range(2_000_000, 4_000_000)).tried == 1_000
    assert make_sides(range(9), range(9, 18)).tried == MOST_DEALS // 2
    for first, second in ((1, 10**6), (3, 200), (20, 20)):
        few = make_sides(range(first), range(first, first + second))
        assert few.counted
        assert few.deals == comb(first + second, first)


def test_blocks_of_assignments_do_not_change_the_numbers(monkeypatch):
    values, sides = np.random.default_rng(1).random((21, 4)), make_sides(range(9), range(9, 21))
    whole = compare_sides(values, sides)
    monkeypatch.setattr(permutation, "_CELLS", 21 * 7)
    assert compare_sides(values, sides).columns() == whole.columns()
    assert compare_sides(sparse.csr_array(values), sides).p.tolist() == whole.p.tolist()


def test_measures_of_several_units_are_corrected_in_standard_deviations():
    rng, sides = np.random.default_rng(2), make_sides(range(6), range(6, 12))
    values = rng.random((12, 3)) + np.array([0, 0, 1.5]) * (np.arange(12) < 6)[:, None]
    units = np.array([1000.0, 1.0, 1e-3])
    plain, scaled = compare_measures(values, sides), compare_measures(values * units, sides)
    np.testing.assert_allclose(scaled.first, plain.first * units)
    np.testing.assert_allclose(scaled.second, plain.second * units)
    assert scaled.p.tolist() == plain.p.tolist() == compare_sides(values, sides).p.tolist()
    assert scaled.p_corrected.tolist() == plain.p_corrected.tolist()
    assert plain.p[2] <= plain.p_corrected[2] < 0.05 < plain.p_corrected[:2].min()
    # In raw units the measure with the largest numbers hides all others.
    assert compare_sides(values * units, sides).p_corrected[2] == 1
    same = compare_measures(np.full((12, 1), 0.1), sides)
    assert (same.difference.tolist(), same.p.tolist()) == ([pytest.approx(0)], [1.0])


def test_low_p_values_are_rare_if_there_is_no_difference():
    """If sides are random, at most a share p of them has a p-value, alone or corrected, up to p."""
    rng, sides = np.random.default_rng(5), make_sides(range(4), range(4, 8))
    lowest = [compare_sides(rng.random((8, 12)) ** 3, sides) for _ in range(300)]
    alone = np.array([one.p[0] for one in lowest])
    of_any = np.array([one.p_corrected.min() for one in lowest])
    for level in (0.1, 0.3, 0.6):
        bound = level + 3 * (level * (1 - level) / 300) ** 0.5
        assert (alone <= level).mean() <= bound
        assert (of_any <= level).mean() <= bound
    # The lowest of twelve single p-values is often low.
    assert (np.array([one.p.min() for one in lowest]) <= 0.1).mean() > 0.5


def test_without_sides_the_highest_and_the_lowest_are_reported():
    found = compare_sides(np.array([[1.0, 5], [4, 5], [2, 5]]), None)
    assert found.columns() == [
        {"first": 4.0, "second": 1.0, "p": None, "p_corrected": None},
        {"first": 5.0, "second": 5.0, "p": None, "p_corrected": None},
    ]
    assert found.difference.tolist() == [3, 0]


def test_identical_texts_with_the_same_flow_count_once():
    flow = np.array([0.5, 0.25])
    texts, flows = ["a", "b", "a", "a", "b"], [flow, flow, flow + 1e-8, 2 * flow, flow]
    assert first_identical(texts, flows) == (0, 1, 0, 3, 1)
    sides = sides_by_truth(NAMES, [True, False, True, None, False], first_identical(texts, flows))
    assert sides == make_sides([0], [1])
    assert sides_by_truth(NAMES, [True, None, True], (0, 1, 2)) is None


TEXTS = st.lists(st.lists(st.integers(0, 1), max_size=6), min_size=1, max_size=4)


@given(TEXTS)
def test_the_shared_length_is_the_largest_that_fits(texts):
    assert shared_length(texts) == slow.shared(texts)


@given(TEXTS)
def test_continuations_hold_every_text_once(texts):
    flows = [np.arange(len(text), dtype=float) for text in texts]
    pieces = [[f"<{token}>" for token in text] for text in texts]
    found = compare_beginnings(texts, pieces, flows, None)
    length = slow.shared(texts)
    assert found.length == length
    assert found.contrast.first.tolist() == list(range(length))
    if all(text == texts[0] for text in texts):
        assert found.continuations == ()
        return
    assert sorted(text for way in found.continuations for text in way.texts) == list(
        range(len(texts))
    )
    for way in found.continuations:
        group = [texts[text][length:] for text in way.texts]
        assert way.text == "".join(f"<{token}>" for token in group[0][: slow.shared(group)])
        assert len({tuple(rest[:1]) for rest in group}) == 1
    sizes = [len(way.texts) for way in found.continuations]
    assert sizes == sorted(sizes, reverse=True)


def test_a_long_continuation_is_cut():
    texts = [[0, *range(1, 40)], [0, 90]]
    pieces = [[str(token) for token in text] for text in texts]
    ways = compare_beginnings(texts, pieces, [np.ones(40), np.ones(2)], None).continuations
    assert [way.text for way in ways] == ["123456789101112", "90"]


PIECES = st.sampled_from(["", "a", " a", "b", "\n", " ", "B", "é"])


@given(st.data())
def test_words_are_shares_of_each_texts_flow(data):
    count = data.draw(st.integers(2, 4))
    rows = [
        data.draw(
            st.lists(st.tuples(PIECES, st.integers(0, 4), st.booleans()), min_size=1, max_size=6)
        )
        for _ in range(count)
    ]
    pieces = [[piece for piece, _, _ in row] for row in rows]
    flows = [np.array([flow / 4 for _, flow, _ in row]) for row in rows]
    counted = [np.array([kept for *_, kept in row]) for row in rows]
    first = data.draw(st.integers(0, count - 1))
    sides = make_sides(range(first), range(first, count)) if first else None
    shares = [slow.word_shares(*row) for row in zip(pieces, flows, counted, strict=True)]
    groups = [range(first), range(first, count)] if first else [range(count)]
    names = {word for own in shares for word in own}
    least = 2 if count > 2 else 1
    expected = {w for w in names if sum(w in own for own in shares) >= least}
    found = compare_words(pieces, flows, counted, sides)
    assert {word.text for word in found} == expected
    for word in found:
        values = [float(own.get(word.text, 0)) for own in shares]
        means = [sum(values[text] for text in group) / len(group) for group in groups]
        assert (word.first, word.second) == pytest.approx(
            means if sides else (max(values), min(values))
        )
        assert word.texts == tuple(
            sum(word.text in shares[text] for text in group) for group in groups
        )
    sizes = [abs(word.difference) for word in found]
    assert sizes == sorted(sizes, reverse=True)


def test_a_hand_counted_case_of_words():
    pieces = [[" The", " 4", "", "€", "4", "\n"], ["The", "4"], ["x", "4"], ["y"]]
    flows = [np.array([1, 2, 3, 1, 2, 1.0]), np.array([3, 1.0]), np.array([0, 1.0]), np.ones(1)]
    counted = [np.array([True] * 5 + [False]), *(np.ones(n, bool) for n in (2, 2, 1))]
    found = compare_words(pieces, flows, counted, make_sides([0, 1], [2]))
    shown = [(word.text, word.first, word.second, word.texts, word.tokens) for word in found]
    assert (
        shown
        == [
            ("The", pytest.approx((1 / 9 + 3 / 4) / 2), 0.0, (2, 0), (2, 0)),
            ("4", pytest.approx((4 / 9 + 1 / 4) / 2), 1.0, (2, 1), (3, 1)),
        ][::-1]
    )
    assert [least_texts(texts) for texts in (2, 3, 8)] == [1, 2, 2]


def test_words_of_texts_on_neither_side_are_not_listed():
    pieces, flows, counted = [["a"], ["a"], ["b"]], [np.ones(1)] * 3, [np.ones(1, bool)] * 3
    (word,) = compare_words(pieces, flows, counted, make_sides([0], [1]))
    assert (word.text, word.texts) == ("a", (1, 1))


def test_a_text_without_flow_has_no_shares():
    found = compare_words([["a"], ["a"]], [np.zeros(1), np.ones(1)], [np.ones(1, bool)] * 2, None)
    assert (found[0].first, found[0].second) == (1.0, 0.0)
    nothing = compare_words(
        [[], [""]], [np.zeros(0), np.ones(1)], [np.ones(n, bool) for n in (0, 1)], None
    )
    assert nothing == ()
