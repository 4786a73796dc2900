import doctest
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from flowtracer_plugin.text import answers
from flowtracer_plugin.text.answers import FINDERS, AnswerFinder, FoundAnswer, find_answer
from flowtracer_plugin.text.thinking import visible_parts


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
        (r"\boxed 7", "7"),
        (r"\boxed 7 in 3 steps", "7"),
        (r"\boxed\frac{1}{2}, so 3 are left", r"\frac{1}{2}"),
        (r"\boxed x", "x"),
        (r"\boxed", None),
        (r"\boxed{\text{ Paris }}", "Paris"),
        (r"\boxed{(B)}", "B"),
        (r"\boxed{y = 2x}", "y = 2x"),
        ("<|begin_of_box|>7<|end_of_box|>", "7"),
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
        ("<answer>The answer is 7.</answer>", "7"),
        ("<final_answer>$7$</final_answer>", "7"),
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
        ("so 3+4=7 #### 7", "7"),
        ("#### **$7**", "7"),
        ("#### Paris", "Paris"),
        ("#### Paris\nis large", None),
        ("#### Step 1: add\n3+4=7\n\nThe answer is 7.", None),
        ("#### Final Answer\n\n7", None),
        ("3 steps\n#### Step 2:", None),
        ("#### 2\nThe answer is 7.", None),
        (f"#### {'so ' * 40}", None),
    ],
)
def test_hash_is_a_number_or_a_short_last_line_after_four_hashes(text, answer):
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
        ("The answer to the question is 7. There are 3 steps.", "7"),
        ("The answer is approx. 5", "5"),
        ("The answer is roughly 5, since 4.9 is close", "5"),
        ("The answer is:\n\\[\n7\n\\]", "7"),
        ("The answer is:\n```\n7\n```\nin 2 steps", "7"),
        ("The answer is\n\\begin{align*}\nx &= 3 + 4 \\\\\n &= 7\n\\end{align*}", "7"),
        ("The answer is 3 + 4 = 7.", "7"),
        ("The answer is the remainder of 3 times the sum of 4 and 5.", None),
        ("The answer is the sum of the digits, which is 7.", "7"),
        ("The answer is not 5 but 7.", "7"),
        ("The answer is not 5.", None),
        ("The answer is 7, not 8.", "7"),
        ("The wrong answer is 8.", None),
        ("The correct option is (B), not (C).", "B"),
        ("The answer is (B) Paris.", "B"),
        ("Answer: A and C", "A and C"),
        ("So (D) is correct.", "D"),
        ("The answer is A train.", "A train"),
        ("Solution:\n1. Add 3 and 4", None),
        ("**Answer**\n\nParis", "Paris"),
        ("答案是：北京", "北京"),
        ("故选C。", "C"),
        ("答えは7です。", "7"),
        ("Die Antwort lautet: etwa 3,5 km, weil", "3,5 km"),
        ("La réponse est donc 7.", "7"),
        ("Ответ: 7.", "7"),
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
        ("6.02 × 10^23 of them", "6.02 × 10^23"),
        (r"5\times 10^{-3} m", r"5\times 10^{-3}"),
        ("1,00,000 rupees", "1,00,000"),
        ("1.234,56 Euro", "1.234,56"),
        ("1 234 567", "1 234 567"),
        ("1'234'567.5", "1'234'567.5"),
        ("2½ cups", "2½"),
        ("2 1/2 cups", "2 1/2"),
        (r"-\frac{1}{2} of it", r"-\frac{1}{2}"),
        (r"3\sqrt{2} long", r"3\sqrt{2}"),
        ("at 10:30", "10:30"),
        ("on 2024-05-17", "2024-05-17"),
        ("3 + 4i", "3 + 4i"),
        ("(1,2)", "2"),
    ],
)
def test_last_number_comes_without_currency_and_percent(text, answer):
    assert answer_text(text, "last_number") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", None),
        ("So there are 7 apples in 2 boxes.", "7"),
        ("3 + 4 = 7.\n\nHence the ball costs 7 cents, which is 3 more.", "7"),
        ("Thus the set is [1, 2) + {3}.", "[1, 2) + {3}"),
        ("**7** of the 9 are left. Let me know if you need 3 more!", "7"),
        ("Tom is 7. To verify: 7 + 2 = 9.", "7"),
        ("So the statement is false.", "false"),
        ("B. Paris has 2 rivers", "B"),
        ("A. one\nB. two", None),
        ("Yes, 14 is even.", "Yes"),
        ("So we are done.", None),
    ],
)
def test_conclusion_is_the_value_of_the_sentence_that_concludes(text, answer):
    assert answer_text(text, "conclusion") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", None),
        ("(1, 2)", "(1, 2)"),
        ("f(x) = x^2", "x^2"),
        (r"It is $\{1, 2\}$.", r"\{1, 2\}"),
        (r"\[ k = 4. \]", "4"),
        ("for $k$ of them", None),
        ("$1$ or 2", None),
        ("$5 and $6", None),
        ("```\nhello\n```", "hello"),
    ],
)
def test_formula_is_an_expression_alone_or_the_last_formula(text, answer):
    assert answer_text(text, "formula") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", None),
        ('{"answer": 7, "confidence": 0.9}', "7"),
        ('{"final_answer": "18 km", "steps": 3}', "18 km"),
        ("{'Answer': 'it is'}", "it is"),
        ('{"answer": [1, 2], "n": 2}', "[1, 2]"),
        ('{"choice": "C", "answer": -3.5}', "-3.5"),
        ('{"result": true}', "true"),
        ('{"answer": "', None),
        ('{"answers_seen": 3}', None),
    ],
)
def test_json_is_the_value_of_a_field_for_the_answer(text, answer):
    assert answer_text(text, "json") == answer


@pytest.mark.parametrize(
    ("text", "rule", "answer"),
    [
        (r"\boxed{1} <answer>2</answer>", "boxed", "1"),
        ('<answer>2</answer> {"answer": 3}', "answer_tag", "2"),
        ('{"answer": 3}\n#### 4', "json", "3"),
        ("The answer is 5.\n#### 4", "hash", "4"),
        ("The answer is 5. So it is 6.", "phrase", "5"),
        ("</think>(1, 2)", "after_think", "(1, 2)"),
        ("So it is 6. $x$ 7", "conclusion", "6"),
        ("It is $x^2$.", "formula", "x^2"),
        ("</think>He has 7 apples. It took 2 days.", "first_sentence", "7"),
        ("He has 7 apples.", "last_number", "7"),
        ("</think>It is Paris.", "after_think", "It is Paris."),
    ],
)
def test_auto_names_the_first_finder_that_matches(text, rule, answer):
    found = find_answer(text)
    assert found is not None
    assert (found.rule, text[found.start : found.end]) == (rule, answer)


@pytest.mark.parametrize(
    ("text", "literal", "span"),
    [
        ("Lyon is in France, so she is in France.", "France", (32, 38)),
        ("12 and 2 and 21", "2", (7, 8)),
        ("It costs $5.", "$5", (9, 11)),
        ("<think>Paris or Rome</think>Rome", "Paris", None),
        ("a (b) c", "(b)", (2, 5)),
        ("Frances", "France", None),
    ],
)
def test_an_answer_that_is_named_itself(text, literal, span):
    found = find_answer(text, f"text:{literal}")
    assert (found and (found.start, found.end, found.rule)) == (span and (*span, "text"))


def test_an_answer_that_is_named_without_a_mark_is_refused():
    with pytest.raises(ValueError, match="for the answer itself write 'text:France'"):
        find_answer("in France", "France")
    with pytest.raises(ValueError, match=r"found 'text: '; for .* write 'text:Paris'"):
        find_answer("in France", "text: ")


@given(st.text("\\boxed{}<answer>/# theis:$*.,0123-\n", max_size=60))
def test_found_spans_are_not_empty_and_auto_agrees_with_its_rule(text):
    for name in FINDERS:
        found = find_answer(text, name)
        if found:
            assert text[found.start : found.end].strip() == text[found.start : found.end] != ""
    found = find_answer(text)
    assert found is None or found == find_answer(text, found.rule)


CUES = (
    *(r"\boxed{", r"\boxed ", "{", "}", "<answer>", "</answer>", "#### ", "**", "`", "$", "$$"),
    *(r"\[", r"\]", r"\(", r"\begin{align}", r"\end{align}", r"\text{", "&", r"\\", "=", "(", ")"),
    *("The answer is ", "Answer: ", "答案是", "选", "A. ", "(B) ", "option C ", " is correct"),
    *(", which is ", "because ", " and ", " not ", "So ", "Therefore, ", "\nNote: ", "\nQ: "),
    *("<think>", "</think>", "[THINK]", "<|channel|>final<|message|>", "<response>", "<b>"),
    *('{"answer": ', '"', ": ", ", ", ".", "。", "!", "?", "~", "✅", "°", "%", "€", "-", "±"),
    *("7", "1,234", "1.234,56", "6.02 × 10^23", "2½", r"\frac{1}{2}", "x = ", "Paris", " cm"),
    *(" ", "\n", "\n\n", "\r\n", "\t", "\xa0", "\u2028", "\u3000", "\x00", "\x1c", "\ud800", "İ"),
)


@given(
    st.lists(st.sampled_from(CUES) | st.text(max_size=2), max_size=9).map("".join), st.booleans()
)
def test_spans_have_no_blanks_around_them_and_hold_no_thinking(text, in_thinking):
    parts = visible_parts(text, in_thinking=in_thinking)
    for finder in ["auto", *FINDERS]:
        found = find_answer(text, finder, in_thinking=in_thinking)
        if found is not None:
            said = text[found.start : found.end]
            assert said == said.strip() != ""
            assert any(part.start <= found.start and found.end <= part.end for part in parts)


@pytest.mark.parametrize("end", ["3 + 4 =", f"{'so ' * 30}we add 3 to the", '{"steps": "3'])
def test_a_number_is_not_guessed_where_a_text_breaks_off(end):
    assert find_answer(f"There are 3.\n{end}" if end[0] != "{" else end) is None


@pytest.mark.parametrize("said", ["I cannot help with the 3 bombs.", "Please upload the 2 files."])
def test_a_number_is_not_guessed_where_a_text_refuses(said):
    assert find_answer(said) is None


def marked(text: str) -> tuple[str, str | None]:
    start, end = text.find("⟦"), text.find("⟧")
    return text.translate({0x27E6: None, 0x27E7: None}), text[start + 1 : end] if end > 0 else None


def test_responses_as_models_write_them():
    table = tomllib.loads((Path(__file__).parent / "responses.toml").read_text("utf-8"))
    missed = [marked(row["text"]) for row in table.pop("missed")]
    responses = [marked(row["text"]) for rows in table.values() for row in rows]
    assert len(responses) > 400
    found = [(text, answer_text(text, "auto")) for text, _ in responses]
    assert found == responses
    # an improvement moves its response up
    assert [text for text, answer in missed if answer_text(text, "auto") == answer] == []


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
