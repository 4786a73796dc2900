import pytest
from hypothesis import given, strategies as st

from flowtracer_plugin.model.layers import select_layers

TWELVE = list(range(12))
HYBRID = [3, 7, 11, 15, 19, 23]  # attention in every fourth layer


@pytest.mark.parametrize(
    ("selection", "layers"),
    [
        ("all", range(12)),
        ("early", range(4)),
        ("middle", range(4, 8)),
        ("late", range(8, 12)),
        ("all:2", [0, 11]),
        ("middle:1", [4]),
        ("middle:3", [4, 6, 7]),
        ("late:99", range(8, 12)),
        ([7, 2, 2], [2, 7]),
        ((0,), [0]),
    ],
)
def test_what_a_selection_means(selection, layers):
    assert select_layers(selection, TWELVE) == tuple(layers)


@pytest.mark.parametrize(
    ("selection", "layers"), [("middle", (11, 15)), ("early", (3, 7)), ("late:1", (19,))]
)
def test_layers_without_attention_do_not_count(selection, layers):
    assert select_layers(selection, HYBRID) == layers


@pytest.mark.parametrize(
    ("count", "layers"),
    [(1, [0]), (2, [0, 1]), (3, [1]), (4, [1, 2]), (5, [2]), (30, range(10, 20))],
)
def test_the_middle_is_as_far_from_the_first_layer_as_from_the_last(count, layers):
    assert select_layers("middle", range(count)) == tuple(layers)


def test_two_layers_have_no_middle_so_both_count():
    assert select_layers("middle", [4, 9]) == (4, 9)
    assert select_layers("middle", [4]) == select_layers("late", [4]) == (4,)


@given(
    st.sampled_from(["all", "early", "middle", "late"]),
    st.integers(1, 20),
    st.lists(st.integers(0, 200), min_size=1, unique=True).map(sorted),
)
def test_picks_are_distinct_in_order_and_from_end_to_end(name, number, available):
    band, picks = select_layers(name, available), select_layers(f"{name}:{number}", available)
    assert band  # also of a model with one layer
    assert set(band) <= set(available)
    assert len(picks) == min(number, len(band))
    assert list(picks) == sorted(set(picks))
    assert set(picks) <= set(band)
    assert picks[0] == band[0]
    assert len(picks) == 1 or picks[-1] == band[-1]


@given(st.lists(st.integers(0, 200), min_size=1, unique=True).map(sorted))
def test_the_three_parts_of_a_model_share_no_layer(available):
    parts = [select_layers(name, available) for name in ("early", "middle", "late")]
    if len(available) >= 3:
        assert sum(parts, ()) == tuple(available)
        assert len(parts[0]) == len(parts[2])
        assert abs(len(parts[1]) - len(parts[0])) <= 1


@pytest.mark.parametrize(
    "selection", ["", "center", "middle:", "middle:0", "middle:00", "middle:-1", "middle:x", "4"]
)
def test_unknown_selections_are_refused(selection):
    with pytest.raises(ValueError, match=r"one of all, early, middle, late.*'middle:5'.*got"):
        select_layers(selection, TWELVE)


def test_unknown_layers_are_refused():
    with pytest.raises(ValueError, match=r"layers \[-1, 4\] have no attention.*\[3, 7, 11"):
        select_layers([4, 7, -1], HYBRID)
    assert select_layers([7], HYBRID) == (7,)


def test_an_empty_selection_is_refused():
    with pytest.raises(ValueError, match="empty selection"):
        select_layers([], TWELVE)
