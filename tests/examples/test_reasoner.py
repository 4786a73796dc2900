"""The embedded reasoner: its stories, its tokenizer, and the model in the repository."""

import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from examples.reasoner.problems import (
    LARGEST_VALUE,
    Sloppiness,
    find_answer,
    is_correct,
    make_problems,
    sloppy_response,
    split_of,
)
from examples.reasoner.train import MODEL_DIR, accuracy

GAINS = {"buys", "finds", "gets"}
LOSSES = {"lends", "loses", "sells"}
RIGHT = Sloppiness(misread=0, distracted=0, slip=0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def solve(prompt: str) -> tuple[int, list[int]]:
    """The answer and all intermediate values, from the words of the prompt alone."""
    sentences = re.findall(r"[A-Z]\w+ (\w+) (\d+)", prompt)
    assert sentences[0][0] == "has"
    values = [int(sentences[0][1])]
    for verb, amount in sentences[1:]:
        if verb in GAINS | LOSSES:
            values.append(values[-1] + (int(amount) if verb in GAINS else -int(amount)))
    return values[-1], values


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_problem_has_the_answer_that_its_words_give(split):
    for problem in make_problems(500, 3, split):
        expected, values = solve(problem.prompt)
        assert problem.answer == expected
        assert is_correct(problem.response, expected)
        assert all(0 <= value <= LARGEST_VALUE for value in values)
        assert 3 <= len(values) - 1 <= 5


def test_every_line_of_a_right_response_is_true():
    for problem in make_problems(500, 4):
        *lines, last = problem.response.split("\n")
        _, values = solve(problem.prompt)
        for line, value in zip(lines, values[1:], strict=True):
            left, right = line.split(" = ")
            first, sign, second = left.split(" ")
            assert int(first) + int(sign + second) == int(right) == value
        assert last == rf"The answer is \boxed{{{values[-1]}}}"


def test_the_same_seed_gives_the_same_problems_and_another_seed_others():
    assert make_problems(50, 5) == make_problems(50, 5)
    assert make_problems(50, 5) != make_problems(50, 6)


def test_the_splits_share_no_prompt():
    train = {problem.prompt for seed in range(3) for problem in make_problems(3000, seed)}
    held_out = {problem.prompt for problem in make_problems(3000, 0, "held_out")}
    assert not train & held_out
    assert {split_of(prompt) for prompt in train} == {"train"}


def test_a_pupil_who_is_not_sloppy_is_right():
    for problem in make_problems(200, 8):
        assert sloppy_response(problem, random.Random(0), RIGHT) == problem.response


def test_a_sloppy_pupil_is_right_about_half_of_the_time():
    rng = random.Random(0)
    problems = make_problems(2000, 9)
    hits = [is_correct(sloppy_response(p, rng, Sloppiness()), p.answer) for p in problems]
    assert 0.4 < sum(hits) / len(hits) < 0.65


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"The answer is \boxed{7}", 7),
        (r"\boxed{3} no, \boxed{12}", 12),
        (r"\boxed{3", None),
        ("7", None),
    ],
)
def test_the_last_box_is_the_answer(text, expected):
    assert find_answer(text) == expected


def test_the_tokenizer_gives_every_text_back(tokenizer):
    rng = random.Random(1)
    for problem in make_problems(300, 10):
        sloppy = sloppy_response(problem, rng, Sloppiness())
        for text in (problem.prompt, problem.response, sloppy, problem.prompt + sloppy):
            token_ids = tokenizer.encode(text)
            assert tokenizer.unk_token_id not in token_ids
            assert tokenizer.decode(token_ids, skip_special_tokens=True) == text


def test_special_tokens_are_readable_and_a_number_is_one_token(tokenizer):
    token_ids = [*tokenizer.encode(r"The answer is \boxed{12}"), tokenizer.eos_token_id]
    assert tokenizer.decode(token_ids) == r"<bos>The answer is \boxed{12}<eos>"
    assert tokenizer.convert_ids_to_tokens(token_ids)[4:] == [r" \boxed{", "12", "}", "<eos>"]


def test_the_model_is_small():
    files = [file for file in Path(MODEL_DIR).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 2_000_000


def test_the_model_is_right_often_but_not_always(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    assert model.dtype == torch.float32
    problems = make_problems(256, 11, "held_out")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert 0.3 <= accuracy(model, tokenizer, problems, sample=True) <= 0.6
