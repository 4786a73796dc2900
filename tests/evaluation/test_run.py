import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from flowtracer_plugin import wrap
from flowtracer_plugin.bulk.examples import Example
from flowtracer_plugin.credit.choosing import InvalidScoreError
from flowtracer_plugin.credit.token_scores import TOKEN_SCORES, token_score
from flowtracer_plugin.evaluation.ranked_tokens import KnockOutOptions, measure_knock_outs
from flowtracer_plugin.evaluation.run import (
    FORMAT,
    VERSION,
    evaluate,
    evaluate_to_file,
    part_file,
    part_files,
)
from flowtracer_plugin.files import RecordFile
from tests.evaluation.planted import planted_story, planted_text
from tests.tiny import PROMPT, RESPONSE

FEW = KnockOutOptions(percents=(20,), gaps=(1,), draws=2)
SETTINGS = {"model": "planted", "percents": (20,)}


def example(row, kind="good"):
    """A text whose answer is measured, or is left out for a reason."""
    prompt, response = planted_story(row)
    if kind == "unlikely":
        node = response[-1]
        response = response[:-1] + ("b" if node == "a" else "a")
    elif kind == "short":
        prompt, response = prompt + response[:32], response[32:]
    elif kind == "none":
        response = response[:-2]
    return Example(row=row, prompt=prompt, response=response)


def examples(*kinds):
    return [example(row, kind) for row, kind in enumerate(kinds)]


def test_examples_are_measured_or_left_out_with_the_reason(planted):
    asked = examples("good", "unlikely", "short", "none")
    asked[0] = replace(asked[0], answer=planted_text(0)[3].upper())
    found = list(evaluate(planted, asked, FEW))
    assert [one.left_out for one in found] == [None, "not_predicted", "few_tokens", "no_answer"]
    wanted = measure_knock_outs(planted, planted.trace(asked[0].prompt, asked[0].response), FEW)
    assert found[0].measured["knock_out"]["log_prob"] == wanted.log_prob
    assert found[0].measured["knock_out"]["effects"][0]["drop"] == wanted.effects[0].drop
    assert found[0].correct is True
    assert re.search(r"log-probability of -\d+.*and one is not the likeliest", found[1].detail)
    assert "only 4 tokens" in found[2].detail
    assert "no answer found by" in found[3].detail
    assert [one.correct for one in found[1:]] == [None] * 3


def test_a_text_that_does_not_fit_is_left_out_and_the_others_go_on(planted, monkeypatch):
    from flowtracer_plugin.trace.memory import TooLittleMemoryError

    real, asked = type(planted).trace, examples("good", "good")

    def trace(self, prompt, response, **options):
        if response == asked[0].response:
            raise TooLittleMemoryError("mode='streamed'")
        return real(self, prompt, response, **options)

    monkeypatch.setattr(type(planted), "trace", trace)
    found = list(evaluate(planted, asked, FEW))
    assert [one.left_out for one in found] == ["not_traced", None]
    assert "takes more memory than is free" in found[0].detail


def test_a_solution_in_the_data_means_its_answer(planted, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "flowtracer_plugin.evaluation.run.measure_example",
        lambda example, _settings: seen.append(example.right) or {},
    )
    asked = replace(example(0), answer="1 + 1 = 2\n#### 2")
    list(evaluate(planted, [asked, example(1)], FEW))
    assert seen == ["2", None]


def test_unlikely_answers_can_be_kept(planted):
    (found,) = evaluate(planted, examples("unlikely"), FEW, predicted_only=False)
    assert found.measured["knock_out"]["predicted"] is False


def test_without_a_response_the_model_answers(reasoner):
    asked = "Ann has 4 apples. Ann buys 1. Ann gets 3. Ann sees 6. Ann buys 6. How many apples?\n"
    wrong, right, short = (
        Example(row=n, prompt=asked, answer=answer)
        for n, answer in enumerate(["13", "#### 14", ""])
    )
    found = list(evaluate(reasoner, [wrong, right], FEW))
    assert [one.correct for one in found] == [False, True]
    assert all(one.measured["knock_out"]["predicted"] for one in found)
    (cut,) = evaluate(reasoner, [short], FEW, max_new_tokens=1)
    assert cut.left_out == "few_tokens"


def test_what_cannot_be_traced_is_left_out_and_mistakes_are_not(tiny):
    long = Example(row=0, prompt=PROMPT * 40, response=RESPONSE)
    (found,) = evaluate(tiny, [long], FEW)
    assert (found.left_out, found.measured) == ("not_traced", None)
    assert "more than the model's context" in found.detail
    half = Example(row=0, prompt="\ud800" + PROMPT, response=RESPONSE)
    (found,) = evaluate(tiny, [half], FEW)
    assert (found.left_out, found.measured) == ("not_traced", None)
    assert "wanted text that UTF-8 can hold, found half a character" in found.detail
    short = Example(row=0, prompt=PROMPT, response=RESPONSE)
    with pytest.raises(ValueError, match="matched to one of the scores"):
        list(evaluate(tiny, [short], FEW, scores={}, predicted_only=False))


def test_an_example_that_fails_costs_no_other(planted):
    def finder(text):
        if text == examples("good", "good")[0].response:
            raise KeyError("no such answer")
        return planted.answer.search(text).span(1)

    tracer = wrap(planted.model, planted.tokenizer, answer=finder, mode="dense", preset="paper")
    found = list(evaluate(tracer, examples("good", "good"), FEW))
    assert [one.left_out for one in found] == ["not_traced", None]
    assert "raised KeyError: 'no such answer'" in found[0].detail


def test_a_score_that_is_not_finite_costs_its_example(planted):
    first = planted.trace(examples("good")[0].prompt, examples("good")[0].response)

    def score(text):
        values = TOKEN_SCORES["recency"](text)
        same = text.trace.token_ids.tolist() == first.token_ids.tolist()
        return values + np.inf if same else values

    scores = {"flow": TOKEN_SCORES["flow"], "odd": score}
    found = list(evaluate(planted, examples("good", "good"), FEW, scores=scores))
    assert [one.left_out for one in found] == ["invalid_score", None]
    assert found[0].detail == "the score 'odd' is not finite at some tokens"


def below(rollouts):
    """An own scorer with negative scores."""
    return -torch.ones(rollouts.competing.shape)


def test_an_invalid_score_of_an_own_scorer_ends_the_run(planted):
    scores = {"flow": TOKEN_SCORES["flow"], "below": token_score(below)}
    wanted = r"scores of '.*:below' must be finite and not negative, got -1.0"
    with pytest.raises(InvalidScoreError, match=wanted):
        next(evaluate(planted, examples("good"), FEW, scores=scores))


# --- the file ---


def test_outcomes_have_the_order_of_the_examples_whenever_they_are_known(planted, tmp_path):
    path, asked = tmp_path / "results.jsonl", examples("none", "short", "none")

    def backwards(left):
        return evaluate(planted, reversed(left), FEW)

    found = evaluate_to_file(backwards, asked, path, SETTINGS)
    assert [one.row for one in found] == [0, 1, 2]
    rows = [json.loads(line)["row"] for line in path.read_text().splitlines()[1:]]
    assert rows == [2, 1, 0]
    assert evaluate_to_file(backwards, asked, path, SETTINGS) == found


def test_what_parts_hold_is_not_measured_again(planted, tmp_path):
    path, asked = tmp_path / "results.jsonl", examples("none", "short", "none", "none")
    part, measured_rows = part_file(path, 1, 2), []

    def measured(left):
        measured_rows.append([one.row for one in left])
        return evaluate(planted, left, FEW)

    evaluate_to_file(measured, asked[::2], part, SETTINGS)
    with part.open("a") as file:
        file.write('{"row": 3, "di')  # as another process may have written by now
    before = part.read_bytes()
    (tmp_path / "results-1-of-2-old.jsonl").write_text("mine")
    assert part_files(path) == [part]
    found = evaluate_to_file(measured, asked[:3], path, SETTINGS, parts=part_files(path))
    assert [one.row for one in found] == [0, 1, 2]
    assert measured_rows == [[0, 2], [1]]
    assert part.read_bytes() == before
    changed = [replace(asked[0], response="other"), *asked[1:]]
    with pytest.raises(ValueError, match=r"results-1-of-2.*holds row 0 with other texts"):
        evaluate_to_file(measured, changed, None, SETTINGS, parts=[part])


def test_a_run_continues_where_it_stopped(planted, tmp_path):
    path, asked = tmp_path / "results.jsonl", examples("good", "none", "good", "good")

    measured_rows = []

    def measured(left):
        for outcome in evaluate(planted, left, FEW):
            measured_rows.append(outcome.row)
            yield outcome

    def crashing(left):
        for number, outcome in enumerate(measured(left)):
            if number == 2:
                raise KeyboardInterrupt
            yield outcome

    with pytest.raises(KeyboardInterrupt):
        evaluate_to_file(crashing, asked, path, SETTINGS)
    assert [json.loads(line).get("row") for line in path.read_text().splitlines()] == [None, 0, 1]
    with path.open("a") as file:
        file.write('{"row": 2, "dig')
    measured_rows.clear()
    found = evaluate_to_file(measured, asked, path, SETTINGS)
    assert measured_rows == [2, 3]
    assert [one.row for one in found] == [0, 1, 2, 3]
    whole = evaluate_to_file(measured, asked, tmp_path / "whole.jsonl", SETTINGS)
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()
    drops = [
        [one.measured["knock_out"]["effects"][0]["drop"] for one in ones if one.measured]
        for ones in (found, whole)
    ]
    assert drops[0] == [pytest.approx(drop) for drop in drops[1]]
    measured_rows.clear()
    assert len(evaluate_to_file(measured, asked[:2], path, SETTINGS)) == 2
    assert measured_rows == []


def test_results_with_other_settings_or_data_are_refused_and_another_file_helps(tmp_path):
    path = tmp_path / "results.jsonl"
    evaluate_to_file(lambda _: iter(()), [], path, SETTINGS)
    other = {**SETTINGS, "percents": (5,)}
    with pytest.raises(ValueError, match=r"percents is \[20\] there and \[5\] now.*another file"):
        evaluate_to_file(lambda _: iter(()), [], path, other)
    assert evaluate_to_file(lambda _: iter(()), [], tmp_path / "other.jsonl", other) == ()
    row = {"row": 0, "digest": "0", "left_out": "no_answer", "detail": "", "measured": None}
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="holds row 0 with other texts: the data have changed"):
        evaluate_to_file(lambda _: iter(()), examples("good"), path, SETTINGS)


@pytest.mark.parametrize("content", ["hello\n", '{"format": "x"}\n', "[1]\n", "{}\n{}\n"])
def test_other_files_are_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"wanted results of the format flowtracer\.evaluation 2"):
        RecordFile(path, FORMAT, VERSION, SETTINGS)
    assert path.read_text() == content


def outcome_line(**changes):
    row = {"row": 0, "digest": "0", "left_out": None, "detail": None, "measured": None}
    return json.dumps(row | {"correct": None} | changes) + "\n"


MEASURED = {"answer_tokens": 1, "log_prob": -1, "predicted": True, "candidates": [1], "effects": []}
EFFECT = {"gap": 0, "score": "a", "side": "top", "drop": [1], "flipped": [0], "divergence": [0]}
CURVE = {"score": "a", "shares": [0], "deletion": [1], "insertion": [1]}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[1]\n", "it must be an object"),
        ("{}\n", "it lacks 'digest'"),
        (outcome_line(row="0"), "row must be a whole number, found '0'"),
        (outcome_line(digest=None), "digest must be text"),
        (outcome_line(correct="yes"), "correct must be true or false, found 'yes'"),
        (outcome_line(left_out="love"), "left_out must be one of no_answer, .* found 'love'"),
        (outcome_line(unheard_of=1), "it has 'unheard_of', which is unknown"),
        (outcome_line(measured=[]), "measured must be an object"),
        (outcome_line(measured={"love": {}}), "wanted protocols of knock_out, .* found 'love'"),
        (outcome_line(measured={"knock_out": {}}), "knock_out lacks 'answer_tokens'"),
        (outcome_line(measured={"knock_out": MEASURED | {"effects": 3}}), "effects must be a list"),
        (
            outcome_line(measured={"knock_out": MEASURED | {"effects": [EFFECT | {"drop": "1"}]}}),
            "drop must be a list, found '1'",
        ),
        (outcome_line(measured={"curves": [CURVE]}), r"curves\[0\] lacks 'deletion_area'"),
        (outcome_line(measured={"lines": {"skipped": 3}}), "must be text, found 3"),
    ],
)
def test_damaged_results_are_named_and_left_alone(tmp_path, line, problem):
    path = tmp_path / "results.jsonl"
    evaluate_to_file(lambda _: iter(()), [], path, SETTINGS)
    good = outcome_line(measured={"knock_out": MEASURED | {"effects": [EFFECT]}})
    path.write_text(path.read_text() + good + line + '{"row": 1, "dig')
    before = path.read_text()
    with pytest.raises(ValueError, match=rf"results\.jsonl': line 3 is damaged: .*{problem}"):
        evaluate_to_file(lambda _: iter(()), [], path, SETTINGS)
    assert path.read_text() == before


def test_an_empty_file_is_a_new_one(tmp_path):
    path = tmp_path / "results.jsonl"
    path.touch()
    evaluate_to_file(lambda _: iter(()), [], path, SETTINGS)
    assert json.loads(path.read_text())["model"] == "planted"
