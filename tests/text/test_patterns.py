"""All regular expressions of the package search hostile texts in linear time."""

import contextlib
import importlib
import pkgutil
import re
from time import process_time

import pytest

import flowtracer_plugin
from flowtracer_plugin.rewards.judge import MAX_ANSWER
from flowtracer_plugin.rewards.referee import RefusedError, verdict
from flowtracer_plugin.rewards.splitting import is_name
from flowtracer_plugin.text.answers import find_answer
from flowtracer_plugin.text.result_cut import NotComputedError, cut_at_result

UNITS = (
    *(
        "{",
        "}",
        "\\boxed ",
        "<answer>",
        "#### ",
        "the answer is ",
        "answer:\n.",
        ".",
        " ",
        "\n",
        "1,",
    ),
    *(
        "1",
        "1/",
        "-",
        "11,",
        "*",
        "`",
        "$",
        "$$",
        "\\[",
        "= ",
        '"answer": ',
        "a",
        "A ",
        "\nso ",
        "1.",
    ),
    *(
        "1 000 ",
        "10^",
        "\\frac{1}{",
        "½",
        "<|channel|>",
        "答案是",
        "option A ",
        "the final ",
        "=1*",
    ),
    *("_", "\\", "\nQuestion:", '{"', "[1, ", "\nnote ", "</think>", "1h "),
    *("±", "...", "$x$ and ", "**a** or ", "(a) ", "（", "[[A]]", "<b>", "<think ", "actually "),
    *("\\begin{cases}", "the solution to ", "only option ", "\nA - ", "答案", "1+2, which "),
    *("\t", "111.", "yes, a ", "\\begin{array}", "{,}", "x_{1},", "x ", "a \\setminus\\{", "1 h "),
)


def package_patterns():
    found = {}
    for module in pkgutil.walk_packages(flowtracer_plugin.__path__, "flowtracer_plugin."):
        if module.name.endswith(("__main__", "app.blocks")):  # Gradio may be missing
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            members = value if isinstance(value, tuple | list) else (value,)
            for pattern in members:
                pattern = pattern[0] if isinstance(pattern, tuple) else pattern
                if isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str):
                    found[pattern.pattern, pattern.flags] = (f"{module.name}.{name}", pattern)
    return list(found.values())


def seconds(pattern, unit, length):
    text = (unit * (length // len(unit) + 1))[:length]
    start = process_time()
    for _ in pattern.finditer(text):
        pass
    return process_time() - start


@pytest.mark.timeout(120)
def test_patterns_of_the_package_are_linear():
    patterns = package_patterns()
    assert len(patterns) > 140
    assert sum(name.startswith("flowtracer_plugin.rewards.") for name, _ in patterns) > 100
    slow = [
        (name, unit)
        for name, pattern in patterns
        for unit in UNITS
        # four times the text takes four times as long, and sixteen times if it is quadratic
        if seconds(pattern, unit, 1_000) > 0.01  # what is worse than quadratic
        or (
            (long := seconds(pattern, unit, 8_000)) > 0.03
            and long > 9 * min(seconds(pattern, unit, 2_000) for _ in range(3))
        )
    ]
    assert slow == []


def test_the_longest_answers_are_judged_at_once():
    for unit in UNITS:
        text = (unit * MAX_ANSWER)[:MAX_ANSWER]
        start = process_time()
        with contextlib.suppress(RefusedError):
            verdict("7", text)
        assert process_time() - start < 0.5, unit


def test_a_name_is_told_at_once():
    for unit in ("x_{1},", r"\a,", "x_1, ", "f(x),", "x'_{12}, "):
        start = process_time()
        assert not is_name("(" + unit * (MAX_ANSWER // len(unit)))
        assert process_time() - start < 0.1, unit


def test_a_quadratic_pattern_is_seen():
    pattern = re.compile(r"\s*=\s*x")
    assert seconds(pattern, " ", 16_000) > 9 * seconds(pattern, " ", 4_000)


@pytest.mark.timeout(120)  # quadratic finders take hours
def test_finders_and_cutters_take_long_texts():
    for unit in UNITS:
        text = unit * (30_000 // len(unit))
        find_answer(text)
        for response in (text, f"= 7{text}"):
            with contextlib.suppress(NotComputedError):
                cut_at_result(response, "7")
