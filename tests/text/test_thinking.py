import doctest
import re

import pytest

from flowtracer_plugin.text import thinking
from flowtracer_plugin.text.answers import FINDERS, find_answer
from flowtracer_plugin.text.thinking import THINKING_MARKS, leaves_thinking_open, visible_parts

MARKS = [
    ("<think>", "</think>"),
    ("<Thinking>", "</Thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("analysisWe see ", "assistantfinal"),
    ("<|channel>thought\n", "<channel|>"),
    ("<unused94>thought\n", "<unused95>"),
    ("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("◁think▷", "◁/think▷"),
    ("<|open|>think<|sep|>", "<|close|>think<|sep|><|open|>response<|sep|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|><|begin_of_solution|>"),
    ("<|plamo:begin_think:plamo|>", "<|plamo:end_think:plamo|>"),
    ("[unused16]", "[unused17]"),
    ("<|im_start|>think\n", "<|im_start|>answer\n"),
    ("to=self<|message|>", "<|eom|><|start|>assistant<|message|>"),
    ("Thinking...\n", "\n...done thinking.\n"),
    ("Here is my thought process: ", "\nHere's my response: "),
]
THOUGHT = (
    'Is it \\boxed{12}? <answer>12</answer> {"answer": 12} The answer is 12. $x = 12$ so 12\n'
    "#### 12"
)


def visible(text, *, in_thinking=False):
    return [text[part.start : part.end] for part in visible_parts(text, in_thinking=in_thinking)]


def test_every_mark_of_the_table_has_an_example():
    for mark in THINKING_MARKS:
        assert any(re.search(mark.opens, opens, re.IGNORECASE | re.M) for opens, _ in MARKS), mark
        assert any(re.search(mark.closes, closes, re.IGNORECASE) for _, closes in MARKS), mark


@pytest.mark.parametrize(("opens", "closes"), MARKS, ids=[opens.strip() for opens, _ in MARKS])
def test_no_finder_looks_into_thinking(opens, closes):
    for name in ("auto", *FINDERS):
        assert find_answer(opens + THOUGHT, name) is None, name
        found = find_answer(f"{opens}{THOUGHT}{closes}It is Paris.", name)
        assert found is None or found.start >= len(opens + THOUGHT + closes), name
    text = f"{opens}{THOUGHT}{closes}\nThe answer is 7."
    found = find_answer(text)
    assert found is not None
    assert text[found.start : found.end] == "7"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("7", ["7"]),
        ("<think>a</think>", []),
        ("<think>a", []),
        ("7 <think>a", ["7 "]),
        ('<think type="deep">a', []),
        ("<reason>a</reason>7", ["7"]),
        ("a</think>7", ["7"]),
        ("b</think>a</think>7", ["7"]),
        ("6<think>a</think>5</think>7", ["7"]),
        ("<think>a</think>6<think>b</think>7", ["6", "7"]),
        ("<think>a <think>b</think> c</think>7", ["7"]),
        ("<think>a</think><response>7</response> bye", ["7", " bye"]),
        ("I think 7 is right", ["I think 7 is right"]),
    ],
)
def test_visible_parts_are_outside_thinking(text, parts):
    assert visible(text) == parts


def test_a_prompt_may_have_opened_the_thinking():
    assert leaves_thinking_open("<|im_start|>assistant\n<think>\n")
    assert leaves_thinking_open("[THINK]")
    assert not leaves_thinking_open("<think></think>\n")
    assert not leaves_thinking_open("Write <think> first.")
    assert visible("It is 7", in_thinking=True) == []
    assert visible("It is 7</think>8", in_thinking=True) == ["8"]
    assert find_answer("It is 7", in_thinking=True) is None


def test_an_earlier_visible_part_counts_if_the_last_has_no_answer():
    text = "The answer is 7. <think>really? 12</think> I am sure."
    found = find_answer(text)
    assert found is not None
    assert text[found.start : found.end] == "7"


def test_docstring_examples():
    result = doctest.testmod(thinking)
    assert (result.attempted, result.failed) == (2, 0)
