"""The page of a comparison, and the comparison of two sides on the page of a group."""

import csv
import io
import json
import math
import re
from html import unescape

import numpy as np
import pytest
from hypothesis import given, strategies as st

from flowtracer_plugin.comparison.traces import compare
from flowtracer_plugin.options import FlowOptions
from flowtracer_plugin.report import (
    CompletionView,
    group_page,
    render_comparison,
    write_comparison,
)
from flowtracer_plugin.report.pages import comparison_page
from flowtracer_plugin.report.pages.two_sides import (
    MOST_WORDS,
    difference_levels,
    difference_scale,
    shade_bounds,
)
from flowtracer_plugin.text.visible import visible
from tests.comparison.compared import GROUP, PROMPT_TOKENS, RIGHT, TRUTHS, WRONG, make_trace
from tests.pages import HOSTILE, Page, assert_loads_nothing, assert_only_text

WORLD = ("שלום", " עולם", " 七", "加", "八", "\n", "é", " مرحبا", " 7")
TRICKY = ('say "4",', "=1+1", "\n", "@x", "a\nb")


@pytest.fixture
def hostile():
    """Traces whose every text is hostile, with labels to match."""
    options = {"model": HOSTILE[0], "options": FlowOptions(answer=HOSTILE[1])}
    made = [
        make_trace((*HOSTILE, *ending, "7"), prompt=("<s>", *HOSTILE), seed=seed, **options)
        for seed, ending in enumerate([HOSTILE[:2], HOSTILE[2:5], HOSTILE[5:9]])
    ]
    return made, [HOSTILE[2], HOSTILE[16], HOSTILE[4]]


def visible_tokens(trace):
    return [visible(text).replace("\n", "⏎") for text in trace.tokens]


def data_of(html):
    """The data for the page's script, by the id of its element."""
    found = re.findall(r'<script type="application/json" id="(\w+)">(.*?)</script>', html)
    return {name: json.loads(text) for name, text in found}


# Safety


def test_hostile_text_becomes_text_and_nothing_else(hostile):
    traces, labels = hostile
    html = render_comparison(traces, labels=labels, right=[True, False, False])
    page, harmless = Page(html), Page(render_comparison(GROUP, right=TRUTHS))
    assert_only_text(page, harmless)
    assert len(page.scripts) == 3
    assert page.scripts[2] == harmless.scripts[2]
    for data in page.scripts[:2]:
        assert re.search(r"[<>&\u2028\u2029]|[^\x00-\x7f]", data) is None
    shared = data_of(html)["differences"]["shared"]
    assert "".join(one["text"] for one in shared) == "".join(("<s>", *HOSTILE, *HOSTILE))
    html.encode()


def test_page_loads_nothing_and_allows_its_own_script_and_style_only():
    assert_loads_nothing(render_comparison(GROUP, right=TRUTHS))


def test_page_is_deterministic_and_written_whole(tmp_path):
    path = tmp_path / "new" / "compare.html"
    assert write_comparison(GROUP, str(path), right=TRUTHS) == path
    assert path.read_text("utf-8") == render_comparison(GROUP, right=TRUTHS)
    with pytest.raises(ValueError, match="at least two traces"):
        write_comparison([RIGHT], path)
    assert path.read_text("utf-8") == render_comparison(GROUP, right=TRUTHS)
    with pytest.raises(IsADirectoryError):
        write_comparison(GROUP, tmp_path)


# What is shown


def columns(html):
    """The name, the verdict and the token texts of each column."""
    articles = re.findall(r'<article class="completion".*?</article>', html, re.DOTALL)
    return [
        (
            re.search(r'<span class="label value">(.*?)</span>', one)[1],
            re.search(r'<span class="verdict[^>]*>(.*?)</span>', one)[1],
            Page(one).tokens,
        )
        for one in articles
    ]


def test_right_traces_come_first_and_equal_traces_share_a_column():
    html = render_comparison(GROUP, right=TRUTHS)
    shown = columns(html)
    assert [one[:2] for one in shown] == [
        ("A, E", "✓ right"),
        ("C", "✓ right"),
        ("B", "✗ wrong"),
        ("D", "✗ wrong"),
    ]
    assert '<h1 class="value">Right against wrong</h1>' in html
    assert "same as A</small>" in html
    assert "3 right, 2 wrong; 4 different" in html
    # From the first line on which the texts differ; that is the first line of the response.
    for (_, _, tokens), trace in zip(shown, [GROUP[at] for at in (0, 2, 1, 3)], strict=True):
        assert tokens == visible_tokens(trace)[len(PROMPT_TOKENS) :]


def test_the_shared_beginning_is_shown_once_and_coloured_by_the_difference():
    html = render_comparison(GROUP, right=TRUTHS)
    comparison = compare(GROUP, right=TRUTHS)
    parts = re.findall(r'<div class="text shared".*?</div>', html, re.DOTALL)
    spans = re.findall(r'<span(?: class="([^"]*)")?>', "".join(parts))
    differences = comparison.beginning.contrast.difference
    levels = [
        next(
            (
                int(name[1]) * (1 if name[0] == "p" else -1)
                for name in one.split()
                if name[0] in "pn"
            ),
            0,
        )
        for one in spans
    ]
    assert levels == difference_levels(differences, shade_bounds(differences)).tolist()
    assert spans[0] == "outside"
    numbers = [one["numbers"] for one in data_of(html)["differences"]["shared"]]
    for shown, known in zip(numbers, comparison.beginning.contrast.columns(), strict=True):
        assert shown == [pytest.approx(value, rel=1e-3) for value in known.values()]
    assert html.count("<h3>The texts part here</h3>") == 1
    assert re.findall(r"<q class=\"value\">([^<]*)</q>\s*<span><a", html) == [" 4", " 5⏎No 8"]


def test_equal_texts_are_shared_to_the_end_and_each_has_its_column():
    other = make_trace(RIGHT.tokens[len(PROMPT_TOKENS) :], seed=5, model="other")
    html = render_comparison([RIGHT, other], labels=["base", "trained"])
    assert "The texts are the same to the end" in html
    assert "base against trained" in html
    assert "One text against one: no p-value can be computed" in html
    assert "tiny / other" in html
    response = visible_tokens(RIGHT)[len(PROMPT_TOKENS) :]
    assert [tokens for *_, tokens in columns(html)] == [response, response]


def test_texts_that_share_nothing_are_shown_whole():
    other = make_trace(("No", " 7"), prompt=("Why", "?"))
    html = render_comparison([RIGHT, other])
    assert "they share no token" in html
    assert columns(html)[1][2] == ["Why", "?", "No", " 7"]


def test_a_text_that_ends_where_others_go_on_says_so():
    short = make_trace(RIGHT.tokens[len(PROMPT_TOKENS) : -2], answer=(-1,))
    assert "<i>the text ends here</i>" in render_comparison([RIGHT, short])


def test_the_caution_states_the_counts():
    html = render_comparison(GROUP, right=TRUTHS)
    assert "2 right against 2 wrong, with equal texts counted once" in html
    assert "There are 6 ways to assign these labels" in html
    assert "it cannot be lower than 0.33" in html
    assert "There are no two sides" in render_comparison(GROUP)


def word_table(html):
    """The headings, and the text and numbers of each word."""
    table = re.search(r'<table id="words">.*?</table>', html, re.DOTALL)[0]
    rows = [
        (
            unescape(re.search(r"<code[^>]*>(.*?)</code>", row, re.DOTALL)[1]),
            [float(value) for value in re.findall(r'data-value="([^"]*)"', row)],
        )
        for row in table.split("<tr>")[2:]
    ]
    return re.findall(r'data-kind="([^"]*)"', table), rows


def test_the_table_holds_the_words_as_they_differ():
    words = compare(GROUP, right=TRUTHS).words
    headings, rows = word_table(render_comparison(GROUP, right=TRUTHS))
    assert headings == [
        *("word", "right", "wrong", "difference", "p", "p_corrected"),
        *("texts, right", "texts, wrong"),
    ]
    for (text, numbers), word in zip(rows, words, strict=True):
        assert text == word.text.replace("\n", "⏎")
        shares = (word.first, word.second, word.difference, word.p, word.p_corrected)
        assert numbers == pytest.approx([*shares, *word.texts], rel=1e-5)


@pytest.mark.parametrize(
    ("right", "last"),
    [(None, ["texts"]), ([True, False, False, False, True], ["tokens, right", "texts, wrong"])],
)
def test_the_table_counts_texts_or_tokens(right, last):
    headings, rows = word_table(render_comparison(GROUP, right=right))
    words = compare(GROUP, right=right).words
    assert headings[-len(last) :] == last
    for (_, numbers), word in zip(rows, words, strict=True):
        counts = word.texts if right is None else (word.tokens[0], word.texts[1])
        assert tuple(numbers[-len(last) :]) == counts


def test_the_table_of_words_has_a_limit():
    said = [tuple(f" w{at}" for at in range(300)), tuple(f" w{at}" for at in range(299, -1, -1))]
    html = render_comparison([make_trace((*one, "7")) for one in said])
    assert f"The {MOST_WORDS} of 300 words that differ most" in html


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=8))
def test_the_strongest_shade_has_the_largest_difference_or_begins_at_a_point(differences):
    bounds = shade_bounds(np.array(differences))
    largest = max(map(abs, differences))
    assert len(bounds) == (3 if largest else 0)
    slow = [
        int(math.copysign(sum(100 * abs(value) * (1 + 1e-6) >= one for one in bounds), value))
        for value in differences
    ]
    assert difference_levels(np.array(differences), bounds).tolist() == slow
    if largest >= 0.01:
        assert max(map(abs, slow)) == 3
        assert bounds[-1] * (1 - 1e-6) <= 100 * largest < 3.34 * bounds[-1]
    elif largest:
        assert bounds == (0.1, 0.3, 1)


def test_a_difference_on_a_bound_has_the_shade_that_begins_there():
    found = np.array([0.27, 0.1, 0.03, -0.01, 0.00999, 0.3 / 3, 0.0])
    assert shade_bounds(found) == (1, 3, 10)
    assert difference_levels(found, shade_bounds(found)).tolist() == [3, 3, 2, -1, 0, 3, 0]


def test_the_scale_names_the_steps():
    assert difference_scale((1.0, 3.0, 10.0), both=True) == [
        ("n3", "10 and more"),
        ("n2", "3 to 10"),
        ("n1", "1 to 3"),
        ("", "below 1"),
        ("p1", "1 to 3"),
        ("p2", "3 to 10"),
        ("p3", "10 and more"),
    ]
    one_side = difference_scale((0.1, 0.3, 1.0), both=False)
    assert [style for style, _ in one_side] == ["", "p1", "p2", "p3"]
    assert [text for _, text in one_side] == ["below 0.1", "0.1 to 0.3", "0.3 to 1", "1 and more"]
    assert difference_scale((), both=True) == []


# Size


def test_eight_responses_of_a_thousand_tokens_are_below_a_megabyte():
    traces = [
        make_trace((*(f" tok{(at * (seed + 3)) % 97}" for at in range(1000)), " 7"), seed=seed)
        for seed in range(8)
    ]
    assert len(render_comparison(traces, right=[True, False] * 4).encode()) < 1_000_000


def test_the_middle_of_a_long_text_is_left_out(monkeypatch):
    assert comparison_page._MOST_TOKENS == 4_000
    monkeypatch.setattr(comparison_page, "_MOST_TOKENS", 40)
    long = [make_trace((first, *(f" {at}" for at in range(50)), "\n", "7")) for first in "ab"]
    html = render_comparison(long)
    assert html.count(" are left out</p>") == 2
    assert [len(tokens) for *_, tokens in columns(html)] == [40, 40]


# The page of a group


def make_view(trace, advantage, **changes):
    border = trace.spans.prompt_length
    length = len(trace.tokens) - border
    made = {
        "tokens": trace.tokens[border:],
        "weights": np.ones(length),
        "throughput": trace.throughput[border:],
        "advantage": advantage,
        "rewards": {"accuracy": advantage},
        "answer": trace.spans.answer[border:],
        "competing": np.ones(length, bool),
    }
    return CompletionView(**{**made, **changes})


def show_group(*views):
    return group_page("?", views, title="a run", step=1)


def test_small_differences_get_no_full_colours():
    small = np.array([0.0, 0.0001, -0.003])
    assert shade_bounds(small) == (0.1, 0.3, 1)
    assert difference_levels(small, shade_bounds(small)).tolist() == [0, 0, -2]
    assert shade_bounds(np.array([1.0, -0.2])) == (10, 30, 100)
    assert shade_bounds(np.zeros(3)) == shade_bounds(np.zeros(0)) == ()


def test_a_group_says_what_right_completions_do_differently():
    views = [
        make_view(trace, 1.0 if right else -1.0) for trace, right in zip(GROUP, TRUTHS, strict=True)
    ]
    html = show_group(*views)
    assert "<h2>Advantage above 0 against below 0</h2>" in html
    assert "2 above against 2 below" in html
    assert "✓" not in html
    (heads, rows), (_, same) = map(word_table, (html, render_comparison(GROUP, right=TRUTHS)))
    assert rows == same
    assert heads[1:3] == ["above", "below"]
    shared = data_of(html)["differences"]["shared"]
    assert [one["text"] for one in shared] == ["3", " +"]
    # The numbers are the places on the page, where the best come first.
    assert re.findall(r'href="#completion-(\d)" class="plus">▲&nbsp;\1</a>', html) == [
        "1",
        "2",
        "3",
    ]
    assert re.findall(r'href="#completion-(\d)" class="minus">▼&nbsp;\1</a>', html) == ["4", "5"]


@pytest.mark.parametrize("advantages", [(1.0, 1.0), (0.0, 0.0), (1.0, 0.0), (-1.0, -0.5)])
def test_a_group_of_one_side_compares_nothing(advantages):
    html = show_group(*map(make_view, (RIGHT, WRONG), advantages))
    assert "against below 0" not in html
    assert "differences" not in data_of(html)


def test_completions_without_flow_are_not_compared():
    untraced = make_view(WRONG, -1.0, throughput=np.zeros(9))
    assert "against below 0" not in show_group(make_view(RIGHT, 1.0), untraced)
    html = show_group(make_view(RIGHT, 1.0), untraced, make_view(GROUP[3], -1.0))
    assert "One text against one" in html


# A real browser


@pytest.mark.browser
def test_axe_finds_nothing_serious(visits, hostile):
    from tests.browsing import violations

    compared = render_comparison(GROUP, right=TRUTHS)
    group = show_group(make_view(RIGHT, 1.0), make_view(WRONG, -1.0))
    pages = [
        *((html, scheme) for html in (compared, group) for scheme in ("light", "dark")),
        (render_comparison([RIGHT, WRONG]), "dark"),
        (render_comparison(hostile[0], labels=hostile[1]), "light"),
    ]
    for html, scheme in pages:
        page = visits.open(html, color_scheme=scheme)
        page.locator(".completion .text > span").first.hover()
        assert violations(page) == []


@pytest.mark.browser
@pytest.mark.parametrize("width", [375, 1280, 2560])
def test_page_fits_every_width(visits, width):
    long = make_trace(("x" * 300, " y", "\n", *WORLD), answer=(-1,))
    html = render_comparison([long, *GROUP], labels=["n" * 60, "B", "C", "D", "E", "F"])
    page = visits.open(html, width=width)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


@pytest.mark.browser
def test_browser_runs_nothing_from_the_data_and_shows_it_all(visits, hostile):
    traces, labels = hostile
    page = visits.open(render_comparison(traces, labels=labels, right=[True, False, None]))
    assert page.title() == "Right against wrong · FlowTracer"
    shared = page.locator(".shared > span").all_text_contents()
    assert shared == [visible(text) for text in ("<s>", *HOSTILE, *HOSTILE)]
    assert page.locator("article").count() == 3


@pytest.mark.browser
def test_right_to_left_and_wide_letters_are_shown_whole(visits):
    traces = [make_trace((*WORLD[:-1], last)) for last in (" 7", " 8")]
    page = visits.open(render_comparison(traces))
    shown = page.locator(".shared > span").all_text_contents()
    assert shown == [text.replace("\n", "⏎") for text in (*PROMPT_TOKENS, *WORLD[:-1])]
    direction = page.locator(".shared").nth(1).evaluate("one => getComputedStyle(one).direction")
    assert direction == "rtl"


@pytest.mark.browser
def test_keys_lead_through_all_texts_and_twins_light_up(visits):
    page = visits.open(render_comparison(GROUP, right=TRUTHS))
    tip, spans = page.locator("#tip"), page.locator(".text > span[tabindex]")
    assert tip.is_hidden()
    page.locator(".shared > span").nth(1).click()
    assert page.locator("#token").text_content() == '"What"'
    assert page.locator("#where").text_content() == "in all texts · token 1"
    terms = page.locator("#numbers dt").all_text_contents()
    assert terms == ["right", "wrong", "difference", "p", "p (corrected)"]
    for _ in range(7):
        page.keyboard.press("ArrowRight")
    assert page.locator("#token").text_content() == '"3"'
    # Every column has "3" once; the next token after the shared text is in the first column.
    assert page.locator(".twin").all_text_contents() == ["3"] * 4
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("#where").text_content().startswith("A, E · token 8")
    assert spans.count() == 1
    page.keyboard.press("j")
    assert "hub" in page.locator("#where").text_content()
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    assert page.locator(".twin").count() == 0


@pytest.mark.browser
def test_keys_win_over_a_pointer_that_rests_on_the_text(visits):
    words = ("So", " then", "\n") * 60
    page = visits.open(render_comparison([make_trace((*words, one)) for one in (" 7", " 8")]))
    tokens = page.locator(".text > span")
    tokens.nth(len(PROMPT_TOKENS) + 3).click()
    for _ in range(150):
        page.keyboard.press("ArrowRight")
    page.wait_for_timeout(200)  # until the browser tells what came to lie beneath the pointer
    assert page.evaluate("document.querySelector('.shown') === document.activeElement")


@pytest.mark.browser
def test_the_table_is_sorted_by_its_headings(visits):
    html = render_comparison(GROUP, right=TRUTHS)
    page, rows = visits.open(html), word_table(html)[1]
    shown = page.locator("#words tbody code")
    assert shown.all_text_contents() == [text for text, _ in rows]
    heading = page.locator("#words thead th").nth(3)
    for key, turned, order in (("Enter", True, "descending"), ("Space", False, "ascending")):
        heading.locator("button").press(key)
        expected = [text for text, _ in sorted(rows, key=lambda row: row[1][2], reverse=turned)]
        assert shown.all_text_contents() == expected
        assert heading.get_attribute("aria-sort") == order


@pytest.mark.browser
def test_the_table_is_copied_as_csv(visits):
    traces = [make_trace((*TRICKY, " 7")), make_trace((*TRICKY, "z", " 7"), seed=3)]
    html = render_comparison(traces)
    page = visits.open(html, permissions=["clipboard-read", "clipboard-write"])
    page.locator("#contrast .copy").click()
    page.get_by_text("Copied").wait_for()
    text = page.evaluate("navigator.clipboard.readText()")
    header, *lines = csv.reader(io.StringIO(text, newline=""))
    headings, rows = word_table(html)
    assert header == headings
    assert [line[0].removeprefix("'") for line in lines] == [word for word, _ in rows]
    assert {line[0] for line in lines} >= {'say "4",', "'=1+1", "⏎", "'@x", "a⏎b", "z"}
    for line, (_, numbers) in zip(lines, rows, strict=True):
        assert [float(cell) for cell in line[1:]] == numbers


@pytest.mark.browser
def test_nothing_is_clipped_in_print(visits):
    said = [tuple(f" w{at}" for at in range(size)) for size in (90, 100, 110)]
    traces = [make_trace((*one, "7")) for one in said]
    page = visits.open(render_comparison(traces, right=[True, False, False]), width=720)
    clipped = """[...document.querySelectorAll(".scroller, .text")]
        .filter((one) => one.scrollHeight > one.clientHeight + 1).length"""
    assert page.evaluate(clipped) > 0
    page.emulate_media(media="print")
    assert page.evaluate(clipped) == 0
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


@pytest.mark.browser
def test_the_page_of_a_group_answers_in_both_texts(visits):
    page = visits.open(show_group(make_view(RIGHT, 1.0), make_view(WRONG, -1.0)))
    page.locator(".shared > span").first.click()
    assert page.locator("#where").text_content() == "in all texts · token 0"
    assert page.locator("#numbers dt").all_text_contents() == ["above", "below", "difference"]
    page.locator("article .text > span").nth(1).click()
    assert page.locator("#where").text_content() == "completion 1 · token 1"
    assert page.locator("#numbers dt").first.text_content() == "weight"
