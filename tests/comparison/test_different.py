"""The most different rollouts of two groups."""

import numpy as np

from flowtracer_plugin.comparison.different import most_different
from flowtracer_plugin.comparison.permutation import Sides

NAMES = ("flat", "telling")
SIDES = Sides(names=("right", "wrong"), first=(0, 1, 2), second=(3, 4, 5))
VALUES = np.array([[0.5, 0.9], [0.4, 0.7], [0.5, 0.8], [0.5, 0.1], [0.4, 0.3], [0.5, 0.2]])


def pairs(prompts, count=9, values=VALUES):
    found = most_different(values, NAMES, SIDES, prompts, count)
    return found.measure, found.pairs, found.same_prompt


def test_answers_to_one_prompt_come_first_and_then_the_extremes():
    #          0    1    2    3    4    5
    prompts = "a", "b", "c", "b", "a", "b"
    # Of prompt b the wrong answer 3 is further from 1 than 5 is.
    assert pairs(prompts) == ("telling", ((0, 4), (1, 3), (2, 5)), 2)
    assert pairs(prompts, 1) == ("telling", ((0, 4),), 1)


def test_without_common_prompts_the_extremes_are_paired():
    assert pairs("abcdef") == ("telling", ((0, 3), (2, 5), (1, 4)), 0)


def test_the_group_with_the_lower_mean_gives_its_lowest():
    assert pairs("abcdef", values=-VALUES) == ("telling", ((0, 3), (2, 5), (1, 4)), 0)


def test_a_pair_against_the_trend_is_no_example_of_it():
    values = VALUES.copy()
    values[1, 1] = 0.0
    assert pairs(("a", "b", "c", "b", "e", "f"), values=values)[1:] == (
        ((0, 3), (2, 5), (1, 4)),
        0,
    )


def test_equal_values_are_in_the_order_of_the_rows():
    values = np.zeros((6, 2))
    assert pairs("abcdef", values=values) == ("flat", ((0, 3), (1, 4), (2, 5)), 0)
    assert pairs("aaaaaa", values=values) == ("flat", ((0, 3), (1, 4), (2, 5)), 0)
