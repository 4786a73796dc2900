"""Responses cut after the equation that computes their answer."""

import re

import pytest

import flowtracer_plugin as ft
from flowtracer_plugin.bulk.examples import Example
from flowtracer_plugin.evaluation.ranked_tokens import KnockOutOptions
from flowtracer_plugin.evaluation.run import evaluate
from flowtracer_plugin.text.result_cut import NotComputedError, cut_at_result
from tests.tiny import tiny_llama, tiny_tokenizer


@pytest.mark.parametrize(
    ("response", "answer", "cut"),
    [
        ("He has 9 * 2 = $18 left.\n#### 18", "18", "He has 9 * 2 = $18"),
        ("2 + 3 = 5\n5 + 4 = 9.\nThe answer is 9", "9", "2 + 3 = 5\n5 + 4 = 9"),
        ("So 900 + 900 = 1,800, as said. 1800", "1800", "So 900 + 900 = 1,800"),
        ("x=-4 then x = -4", "-4", "x=-4"),
        ("1.5 + 1 = 2.50 dollars: 2.50", "2.50", "1.5 + 1 = 2.50"),
        ("18.5 - 8 = 10.5\n6 * 3 = 18", "18", "18.5 - 8 = 10.5\n6 * 3 = 18"),
        ("118 - 100 = 18", "18", "118 - 100 = 18"),
        ("x = 20 - 2 = 18 apples", "18 apples", "x = 20 - 2 = 18"),
        ("9 + 9 = **18** eggs", "18", "9 + 9 = **18"),
        (r"9 + 9 = \boxed{18}", "18", r"9 + 9 = \boxed{18"),
        (r"9 + 9 = \$18.00", "$18", r"9 + 9 = \$18.00"),
    ],
)
def test_a_response_ends_with_the_result_that_is_the_answer(response, answer, cut):
    assert cut_at_result(response, answer) == cut


@pytest.mark.parametrize(
    ("response", "answer", "message"),
    [
        ("The answer is 18", "18", "no equation in the response has the result '18'"),
        ("9 * 2 = 18, so 19", "19", "no equation in the response has the result '19'"),
        ("From 18 sheep, 9 * 2 = 18 are", "18", "'18' is in the response before"),
        ("Take 18. 9 * 2 = 18", "18", "'18' is in the response before"),
        ("", "18", "no equation"),
        ("x = 18 * 2 = 36, 36 / 2 = 18", "18", "'18' is in the response before"),
        ("half = 18/2, so 9 + 9 = 18", "18", "'18' is in the response before"),
        ("It is 1800 here. 900 + 900 = 1,800", "1800", "'1800' is in the response before"),
        ("It costs $2.50. 5 / 2 = 2.5", "2.5", "'2.5' is in the response before"),
        ("17,18 then 9 * 2 = 18", "18", "'18' is in the response before"),
        ("9 + 9 = eighteen", "eighteen", "no equation"),
    ],
)
def test_an_answer_that_could_be_copied_is_refused(response, answer, message):
    with pytest.raises(NotComputedError, match=re.escape(message)):
        cut_at_result(response, answer)


def test_the_setting_compute_cuts_responses_at_their_result():
    tracer = ft.wrap(tiny_llama(), tiny_tokenizer(), mode="dense", preset="paper")
    worked = "She had 3 apples and buys one, so that she has 3 + 1 = 4 apples. The answer is 4"
    copied = "She has 4 apples. The answer is 4"
    asked = [Example(row=row, prompt="How many?\n", response=said)
             for row, said in enumerate([worked, copied])]  # fmt: skip
    options = KnockOutOptions(percents=(20,), gaps=(0,), draws=1)
    found = list(evaluate(tracer, asked, options, setting="compute", predicted_only=False))
    assert [one.left_out for one in found] == [None, "not_computed"]
    whole = list(evaluate(tracer, asked, options, predicted_only=False))
    counts = [one[0].measured["knock_out"]["candidates"][0] for one in (found, whole)]
    assert counts[0] < counts[1]
    with pytest.raises(ValueError, match="setting must be one of given, compute, got 'copy'"):
        list(evaluate(tracer, asked, options, setting="copy"))
