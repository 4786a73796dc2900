"""The tasks of the ablation: their texts, what solves them, and what matters in a completion."""

import random
import re

import numpy as np
import pytest

from examples.ablation import countdown, house
from examples.ablation.plan import TASKS
from examples.ablation.pupil import tokenizer_of

BOTH = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def problems(task, count=200, seed=1):
    rng = random.Random(seed)
    return [task.draw(rng) for _ in range(count)]


def demonstrations(task, count=200, seed=2):
    rng = random.Random(seed)
    return [(problem, task.demonstrate(problem, rng)) for problem in problems(task, count)]


@BOTH
def test_a_text_is_one_token_for_each_word_and_none_is_unknown(task):
    tokenizer = tokenizer_of(task)
    lengths = set()
    for problem, said in demonstrations(task):
        ids = tokenizer.encode(problem.prompt + said)
        assert len(ids) == 1 + len((problem.prompt + said).split())
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == problem.prompt + said
        lengths.add((len(problem.prompt.split()), len(said.split())))
        assert len(said.split()) + 1 <= task.max_new_tokens
    assert len(lengths) == 1  # so imitation needs no padding


@BOTH
def test_a_pupil_is_sometimes_right_and_its_answer_is_found(task):
    solved = [task.is_solved(said, problem) for problem, said in demonstrations(task, 600)]
    assert 0.25 < np.mean(solved) < 0.6
    for _, said in demonstrations(task, 20):
        found = task.answer.search(said)
        assert said.endswith(found[1])
        words = said[said.index(" answer") :].split()
        assert len(words) + 1 == task.answer_tokens  # and the end token


@BOTH
def test_a_truncated_completion_is_not_solved_and_nothing_in_it_matters(task):
    for problem, said in demonstrations(task, 20):
        assert not task.is_solved(said[:40], problem)
        assert task.what_matters(said[:40]) == []
        assert not task.is_solved(said + " answer", problem)


def test_in_the_house_the_answer_is_where_the_doors_lead():
    for problem in problems(house.HOUSE):
        asked = re.search(r"Where is (\w+) \?", problem.prompt)[1]
        way = re.search(rf"{asked} (\w+) (\w+) (\w+)", problem.prompt).groups()
        room = way[0]
        for door in way[1:]:
            room = house.LEADS[room, door]
        assert problem.answer == f"{asked} {room}"
        assert house.is_solved(f" … answer {asked} {room}", problem)
        assert not house.is_solved(f" … answer {asked} roof", problem)


def test_in_the_house_steps_follow_from_each_other_and_are_wrong_as_learned():
    wrong = total = 0
    for problem, said in demonstrations(house.HOUSE, 400):
        at = dict(re.findall(r"(\w+) (\w+) \w+ \w+ [,.]", problem.prompt))
        for person, door, room in re.findall(r"(\w+) (\w+) = (\w+)", said):
            wrong += room != house.LEADS[at[person], door]
            total += 1
            at[person] = room
    expected = house.LEARNED_WRONG * house.SAID_WRONG + house.SLIP / 2
    assert wrong / total == pytest.approx(expected, abs=0.08)


def test_in_the_house_the_steps_of_the_person_asked_for_and_the_answer_matter():
    for problem, said in demonstrations(house.HOUSE, 50):
        asked = problem.answer.split()[0]
        matters = "".join(said[start:end] for start, end in house.what_matters(said)).split()
        steps = [words for words in re.findall(r"\w+ \w+ = \w+", said) if words.startswith(asked)]
        assert matters == " ".join(steps).split() + said.split()[-3:]
        assert len(steps) == house.STEPS


def test_in_countdown_every_sum_is_true_and_a_solution_makes_the_target():
    for problem, said in demonstrations(countdown.COUNTDOWN):
        numbers = problem.prompt.split()[1:4]
        sums = re.findall(r"(-?\d+) ([+-]) (\d+) = (?=(-?\d+))", said)
        assert len(sums) == 2 * len(countdown.TRIES)
        for first, sign, second, result in sums:
            assert int(first) + int(sign + second) == int(result)
        words = said.split()
        expression = words[words.index("answer") + 2 :]
        assert expression[::2] == numbers
        value = sum(int(one) for one in re.findall(r"[+-]?\d+", "".join(expression)))
        assert countdown.is_solved(said, problem) == (value == int(problem.answer))


@pytest.mark.parametrize(
    "said",
    [
        " answer two 3 + 5",  # not all numbers
        " answer two 5 + 3 - 2",  # another order
        " answer two 3 + 5 - 2 + 2",  # one too many
        " two 3 + 5 = 8 - 2 = 6",  # no answer
        "",
    ],
)
def test_in_countdown_an_expression_of_other_numbers_is_no_solution(said):
    problem = countdown.Problem(prompt="Numbers 3 5 2 make 6 .", answer="6")
    assert countdown.is_solved(" answer two 3 + 5 - 2", problem)
    assert not countdown.is_solved(said, problem)


def test_in_countdown_the_named_try_and_the_answer_matter():
    said = " one 3 + 5 = 8 - 2 = 6 two 3 - 5 = -2 + 2 = 0 three 3 + 5 = 8 + 2 = 10 answer two 3 - 5"
    parts = [said[start:end] for start, end in countdown.what_matters(said)]
    assert parts == [" two 3 - 5 = -2 + 2 = 0", " answer two 3 - 5"]
    assert countdown.what_matters(" answer two 3 - 5") == [(0, 17)]
