import doctest
import re

import pytest
from hypothesis import given, strategies as st

from flowtracer_plugin.text import answers
from flowtracer_plugin.text.answers import FINDERS, AnswerFinder, FoundAnswer, find_answer


def answer_text(text: str, finder: AnswerFinder) -> str | None:
    found = find_answer(text, finder)
    return text[found.start : found.end] if found else None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", None),
        ("no box", None),
        (r"\boxed{7}", "7"),
        (r"\boxed{1} then \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{ 7 }", "7"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed 7", None),
        (r"\boxed{1} and \boxed{\frac{3}{", "1"),
        (r"\boxed{\frac{3}{4}", None),
        (r"\boxed{unclosed \boxed{2}", "2"),
        (r"\boxed{\boxed{2}}", "2"),
        (r"\boxed{1} \boxed{} \boxed{ }", "1"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"} { \boxed{3} }", "3"),
        (r"\\boxed{4}", "4"),
        (r"\unboxed{4}", None),
    ],
)
def test_boxed_is_the_last_balanced_box_that_holds_something(text, answer):
    assert answer_text(text, "boxed") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", None),
        ("<answer>7</answer>", "7"),
        ("<Answer>\n 7 \n</ANSWER>", "7"),
        ("<answer>1</answer><answer>2</answer>", "2"),
        ("<answer>1</answer><answer> </answer>", "1"),
        ("<answer>1</answer><answer>2", "1"),
        ("<answer>a <answer>b</answer>", "b"),
        ("7</answer>", None),
        ("<answer>7", None),
    ],
)
def test_answer_tag_is_the_last_closed_pair_that_holds_something(text, answer):
    assert answer_text(text, "answer_tag") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", None),
        ("so 3+4=7\n#### 7", "7"),
        ("#### 7\nand more", "7"),
        ("#### 1\n#### 1,234 km\n", "1,234 km"),
        ("#### 1\n####", "1"),
        ("#### 1 ####", "1"),
        ("### 7", None),
        ("##### 7", "7"),
    ],
)
def test_hash_is_the_rest_of_the_last_line_with_four_hashes(text, answer):
    assert answer_text(text, "hash") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", None),
        ("The answer is 7.", "7"),
        ("the final answer is: 7\nThat is all.", "7"),
        ("the answer is 3.5. Then we stop.", "3.5"),
        ("the answer is .5.", ".5"),
        ("the answer is 1,234.", "1,234"),
        ("the answer is 1,234.50", "1,234.50"),
        ("The answer is **7**.", "7"),
        ("The answer is **7.**", "7"),
        ("The answer is $x = 5$.", "x = 5"),
        ("the answer is $5!", "5"),
        ("the answer is 7...", "7"),
        ("The answer is = -7", "-7"),
        ("**Final Answer:** 7", "7"),
        ("**Answer**: 7", "7"),
        ("ANSWER: seven apples", "seven apples"),
        ("Answer:\n\n7", "7"),
        ("answer: 1. answer: 2.", "2"),
        ("the answer is the answer is 3", "3"),
        ("the answer is 1. The answer is", "1"),
        ("the answer isn't known", None),
        ("the answers: 3", None),
        ("The final answer is 四十二。完", "四十二"),
    ],
)
def test_phrase_is_the_rest_of_the_sentence_after_the_last_cue(text, answer):
    assert answer_text(text, "phrase") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", None),
        ("<think>so</think>", None),
        ("<think>so</think> \n", None),
        ("<think>so</think>\n\n It is 7.\n", "It is 7."),
        ("</think>a</think>b", "b"),
        ("<think>7", None),
    ],
)
def test_after_think_is_what_follows_the_last_closing_tag(text, answer):
    assert answer_text(text, "after_think") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", None),
        ("none", None),
        ("1 and 2.", "2"),
        ("3.14.", "3.14"),
        ("= .5", ".5"),
        ("-7", "-7"),
        ("= \N{MINUS SIGN}7", "\N{MINUS SIGN}7"),
        ("9-7", "7"),
        ("f(2)-7", "7"),
        ("1,234,567.89 dollars", "1,234,567.89"),
        ("1,2,3", "3"),
        ("1,2345", "2345"),
        ("3/4 of it", "3/4"),
        ("3/x", "3"),
        ("50%", "50"),
        ("-$5", "5"),
        ("$-5", "-5"),
        ("6.02e23", "6.02e23"),
        ("7 apples, x2 and H2O", "7"),
        ("7 apples with v1.2.3", "7"),
        ("答案是42。", "42"),
        ("10km", "10"),
    ],
)
def test_last_number_comes_without_currency_and_percent(text, answer):
    assert answer_text(text, "last_number") == answer


EVERY_RULE = r"<think>0</think> \boxed{1} <answer>2</answer>" + "\n#### 3\nThe answer is 4.\n5"


@pytest.mark.parametrize(
    ("removed", "rule", "answer"),
    [
        (0, "boxed", "1"),
        (1, "answer_tag", "2"),
        (2, "hash", "3"),
        (3, "phrase", "4"),
        (4, "after_think", None),
        (5, "last_number", "5"),
    ],
)
def test_auto_names_the_first_finder_that_matches(removed, rule, answer):
    text = EVERY_RULE
    for cue in [r"\boxed", "<answer>", "####", "answer is", "</think>"][:removed]:
        text = text.replace(cue, " ")
    found = find_answer(text)
    assert found is not None
    assert found.rule == rule == list(FINDERS)[removed]
    if answer is not None:
        assert text[found.start : found.end] == answer


@given(st.text("\\boxed{}<answer>/# theis:$*.,0123-\n", max_size=60))
def test_found_spans_are_not_empty_and_auto_agrees_with_its_rule(text):
    by_name = {name: find_answer(text, name) for name in FINDERS}
    for found in filter(None, by_name.values()):
        assert text[found.start : found.end].strip() == text[found.start : found.end] != ""
    del by_name["last_word"]  # auto does not try it
    assert find_answer(text) == next(filter(None, by_name.values()), None)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So it is Paris.", "Paris"),
        ("yes", "yes"),
        ('He said "maybe".', "maybe"),
        ("It is **blue**!\n", "blue"),
        ("about .5", ".5"),
        ("he left ...", "left"),
        ("答案是 四十二。", "四十二"),
        ("f(x)", "f(x)"),
        ("", None),
        (" \n", None),
        ("...", None),
    ],
)
def test_last_word_has_no_marks_around_it(text, answer):
    assert answer_text(text, "last_word") == answer


def test_auto_does_not_try_last_word():
    assert find_answer("no idea") is None


@pytest.mark.parametrize(
    "unit",
    [
        "\\boxed{",
        "{",
        "\\boxed ",
        "<answer>",
        "#### ",
        "#",
        "the answer is ",
        "the answer is.",
        "answer:\n.",
        "the ",
        "answer *",
        ".",
        " ",
        "</think>",
        "1,",
        "1,234",
        "1",
        "1/",
        "-",
        "111,",
    ],
)
@pytest.mark.timeout(60)
def test_finders_take_linear_time(unit):
    # quadratic finders take minutes on these, linear ones milliseconds
    text = (unit * (100_000 // len(unit) + 1))[:100_000]
    for name in FINDERS:
        find_answer(text, name)
        find_answer("the answer is <answer>####</think>" + text, name)


def test_thousands_of_nested_boxes():
    assert answer_text(r"\boxed{" * 10_000 + "7" + "}" * 10_000, "boxed") == "7"


@pytest.mark.parametrize(
    ("pattern", "answer"),
    [
        (r"=(\d+)", "34"),
        (r"=(\d*)", "34"),
        (r"(?:x|y)=(\d+)", "34"),
        (r"=(\d)?", "3"),
        (r"z(\d+)", None),
        (r"( )", " "),
    ],
)
def test_the_last_match_of_a_regex_wins(pattern, answer):
    assert answer_text("x=12, y=34, z=", re.compile(pattern)) == answer


def test_the_rule_of_a_regex_is_regex():
    found = find_answer("x=12", re.compile(r"(\d+)"))
    assert found == FoundAnswer(start=2, end=4, rule="regex")


@pytest.mark.parametrize(("pattern", "count"), [(r"\d+", 0), (r"(\d)(\d)", 2)])
def test_a_regex_needs_exactly_one_group(pattern, count):
    with pytest.raises(ValueError, match=rf"exactly one group, the answer, found {count} in"):
        find_answer("12", re.compile(pattern))


@pytest.mark.parametrize("text", ["", "=7"])
def test_a_string_is_a_name_and_never_a_regex(text):
    with pytest.raises(ValueError, match=r"one of \['auto', 'boxed', .*'=\(7\)'.*re\.compile"):
        find_answer(text, "=(7)")
    assert answer_text("=7", re.compile("=(7)")) == "7"


def my_finder(text: str) -> tuple[int, int] | None:
    return (0, 2) if text.startswith("ab") else None


def test_a_callable_finds_the_answer_under_its_name():
    assert find_answer("abc", my_finder) == FoundAnswer(start=0, end=2, rule="my_finder")
    assert find_answer("xyz", my_finder) is None


@pytest.mark.parametrize("span", [(0, 4), (-1, 2), (2, 2), (2, 1)])
def test_a_callable_must_return_a_nonempty_span_in_the_text(span):
    def wild(text):
        return span

    wanted = rf"0 <= start < end <= 3 from the answer finder 'wild', found \({span[0]}, {span[1]}\)"
    with pytest.raises(ValueError, match=wanted):
        find_answer("abc", wild)


@pytest.mark.parametrize("span", ["ab", [0, 1], (0,), (0, 1.0), (False, True), 3])
def test_a_callable_must_return_two_integers(span):
    class Wild:
        def __call__(self, text):
            return span

    with pytest.raises(TypeError, match=r"tuple of two integers from the answer finder 'Wild'"):
        find_answer("abc", Wild())


def test_docstring_examples():
    result = doctest.testmod(answers)
    assert (result.attempted, result.failed) == (2, 0)
