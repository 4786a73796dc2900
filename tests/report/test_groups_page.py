"""The page of two groups of a traced data set, and its charts."""

import csv
import dataclasses
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from flowtracer_plugin.comparison.different import most_different
from flowtracer_plugin.comparison.groups import (
    FLOW_MEASURES,
    MEASURES,
    GroupComparison,
    ShownRollout,
)
from flowtracer_plugin.comparison.permutation import Sides, compare_measures
from flowtracer_plugin.comparison.texts import contrast_words, word_table
from flowtracer_plugin.options import FlowOptions
from flowtracer_plugin.report import render_group_comparison, write_group_comparison
from flowtracer_plugin.report.display import points
from flowtracer_plugin.report.pages.charts import histogram, paired_bars, round_bounds, round_step
from flowtracer_plugin.report.pages.groups_page import measure_lines
from tests.pages import HOSTILE, Page, assert_loads_nothing, assert_only_text

SETTINGS = {
    "model": "tiny",
    "rows": 14,
    "flow": {**dataclasses.asdict(FlowOptions()), "layers": [1, 2]},
}


def make_comparison(
    names=("right", "wrong"), *, texts=("What is 3 + 4?", "7"), words=("So", "then"), pages=()
):
    """Twelve rollouts, of which the right ones have more flow in their reasoning."""
    rng, count = np.random.default_rng(4), 12
    sides = Sides(names=names, first=tuple(range(6)), second=tuple(range(6, 12)))
    values = rng.random((count, len(MEASURES))) * 0.2
    values[:6, 0] += 0.6
    values[:, MEASURES.index("response_tokens")] = rng.integers(20, 60, count)
    values[:, MEASURES.index("in_answer")] = 1 + rng.random(count) * 1e-9
    rows = [[(word, rng.random()) for word in words] for _ in range(count)]
    flow = values[:, : len(FLOW_MEASURES)]
    different = most_different(flow, FLOW_MEASURES, sides, [n % 6 // 2 for n in range(count)], 5)
    prompt, answer = texts
    examples = [
        tuple(
            ShownRollout(
                row=one, id=answer, prompt=prompt, answer=answer, page=dict(pages).get(one)
            )
            for one in pair
        )
        for pair in different.pairs
    ]
    return GroupComparison(
        by="correct",
        sides=sides,
        rows=np.arange(count),
        left_out={"not traced": 2, "equal to another": 0},
        done=14,
        total=1400,
        settings=SETTINGS,
        values=values,
        measures=compare_measures(values, sides),
        words=contrast_words(word_table(rows), sides),
        words_found=len(words),
        different=different,
        examples=tuple(examples),
    )


def rows_of(html, table):
    body = re.search(rf'<table id="{table}">.*?</table>', html, re.DOTALL)[0]
    return [
        [float(value) for value in re.findall(r'data-value="([^"]*)"', row)]
        for row in body.split("<tr>")[2:]
    ]


def test_the_table_holds_every_measure():
    comparison = make_comparison()
    html = render_group_comparison(comparison)
    numbers = comparison.measures.columns()
    for found, one, effect in zip(
        rows_of(html, "measures-table"), numbers, comparison.effects, strict=True
    ):
        wanted = one["first"], one["second"], one["first"] - one["second"], effect
        assert found == pytest.approx([*wanted, one["p"], one["p_corrected"]], rel=1e-5, abs=1e-9)
    assert '<h1 class="value">Right against wrong</h1>' in html
    assert "<b>6 and 6</b>" in html
    assert "right, wrong; 2 not traced</small>" in html
    assert "<b>14 of 1,400</b>" in html
    assert "chance" not in html


def test_only_what_chance_does_not_explain_is_in_colour():
    lines = {line.name: line for line in measure_lines(make_comparison())}
    assert lines["reasoning_share"].style == "plus"
    assert {line.style for name, line in lines.items() if name != "reasoning_share"} == {""}
    turned = measure_lines(make_comparison(names=("a", "b")))
    assert turned[0].style == "plus"


def test_no_difference_is_shown_as_minus_zero():
    lines = {line.name: line for line in measure_lines(make_comparison())}
    assert lines["in_answer"].difference == (0.0, "0")
    assert (lines["in_answer"].effect, lines["in_answer"].p) == (0.0, (1.0, 1.0))
    assert [points(share) for share in (-1e-9, 0.0, 1e-9, -0.0312, 0.5)] == [
        *("0.00", "0.00", "0.00", "−3.12", "+50.00")
    ]
    assert not re.search("[-−]0(\\.0+)?<", render_group_comparison(make_comparison()))


def test_measures_that_are_zero_in_all_rollouts_have_no_row():
    full = make_comparison()
    values = full.values.copy()
    values[:, MEASURES.index("in_prompt")] = 0.0
    values[1:, MEASURES.index("tenth_3")] = 0.0
    held = dataclasses.replace(full, values=values, measures=compare_measures(values, full.sides))
    shown = [line.name for line in measure_lines(held)]
    assert shown == [name for name in MEASURES if name != "in_prompt"]


def test_hostile_text_becomes_text_and_nothing_else():
    harmless = Page(render_group_comparison(make_comparison(), Path()))
    for text in HOSTILE:
        made = make_comparison(texts=(text, text), words=(text, "y"))
        changed = dataclasses.replace(made, settings={**SETTINGS, "model": text})
        assert_only_text(Page(render_group_comparison(changed, Path())), harmless)
        # Names of groups are also in attributes, as the headings of the table that is copied.
        named = Page(render_group_comparison(make_comparison((text, "b")), Path()))
        assert {(tag, *attrs) for tag, attrs in named.tags} == {
            (tag, *attrs) for tag, attrs in harmless.tags
        }


def test_page_loads_nothing_and_is_written_whole(tmp_path):
    comparison = make_comparison()
    path = write_group_comparison(comparison, tmp_path / "new" / "page.html")
    assert path.read_text("utf-8") == render_group_comparison(comparison, path.parent)
    assert_loads_nothing(path.read_text("utf-8"))


def test_pages_of_examples_are_linked_from_where_the_page_lies(tmp_path):
    pages = {row: tmp_path / "out" / "pages" / f"{row}.html" for row in range(12)}
    comparison = make_comparison(pages=pages)
    for place, wanted in (("out", "pages/"), ("other/x", "../../out/pages/")):
        html = write_group_comparison(comparison, tmp_path / place / "x.html").read_text("utf-8")
        links = re.findall(r'<a href="([^"]*)"', html)
        assert len(links) == 10
        assert all(link.startswith(wanted) for link in links)
    assert "<a href" not in render_group_comparison(comparison)


def test_pairs_that_answer_one_prompt_show_it_once():
    html = render_group_comparison(make_comparison())
    assert "The first 3 pairs answer the same prompt. Other pairs are the extremes" in html
    assert html.count("the same prompt</small>") == 3


def test_two_rollouts_have_no_p_values():
    made = make_comparison()
    sides = Sides(names=("right", "wrong"), first=(0,), second=(6,))
    html = render_group_comparison(
        dataclasses.replace(
            made, sides=sides, measures=compare_measures(made.values, sides), words=()
        )
    )
    assert "no p-value can be computed" in html
    assert "p (corrected)" not in html


# Charts


@pytest.mark.parametrize(
    ("least", "step"),
    [(0.0, 1.0), (1.0, 1.0), (1.01, 2.0), (0.03, 0.05), (0.05, 0.05), (7e3, 1e4), (2e-9, 2e-9)],
)
def test_steps_are_round(least, step):
    assert round_step(least) == pytest.approx(step)


NUMBERS = st.lists(st.floats(-1e3, 1e3).map(lambda one: round(one, 3)), min_size=1, max_size=30)


@given(NUMBERS, NUMBERS)
def test_a_histogram_holds_every_value_of_both_groups(first, second):
    found = histogram(np.array(first), np.array(second))
    assert 1 <= len(found.ticks) <= 6 or len({*first, *second}) == 1
    areas = []
    for path in found.paths:
        heights = [100 - float(y) for y in re.findall(r"V([\d.]+)H", path)]
        assert len(heights) <= 26
        areas.append(sum(heights))
    # Both groups have the same area, and the highest bar has the whole height.
    assert areas[0] == pytest.approx(areas[1], abs=0.1 * 26)
    tops = [min(map(float, re.findall(r"V([\d.]+)H", path))) for path in found.paths]
    assert min(tops) == 0


def test_a_histogram_by_hand():
    found = histogram(np.array([0.0, 0.0, 24.0]), np.array([12.0]))
    assert found.ticks == ((0.0, "0"), (120.0, "10"), (240.0, "20"))
    bars = re.findall(r"V([\d.]+)H", found.paths[0])
    assert [at for at, top in enumerate(bars) if top != "100.0"] == [0, 24]
    assert bars[0] == "33.3"
    bars = re.findall(r"V([\d.]+)H", found.paths[1])
    assert [at for at, top in enumerate(bars) if top != "100.0"] == [12]


def test_outliers_of_many_are_in_the_outermost_bars():
    values = np.concatenate([np.linspace(0, 1, 400), [1e6]])
    assert [said for _, said in histogram(values, values).ticks] == [*("0", "0.5", "1")]


@given(st.floats(-1e100, 1e100), st.floats(-1e100, 1e100) | st.floats(0, 1e-6))
@example(0.0, 0.0)
@example(0.3, 0.3)
@example(1.0, 1.0 + 2**-52)
def test_an_axis_has_a_few_round_numbers_around_its_values(one, other):
    low, high = sorted((one, other))
    lines = round_bounds(low, high)
    assert 2 <= len(lines) <= 7
    step = lines[1] - lines[0]
    assert step > 0
    rounding = 1e-8 * max(step, abs(low), abs(high))
    assert lines[0] <= low + rounding
    assert lines[-1] >= high - rounding
    assert np.allclose(np.diff(lines), step, rtol=1e-6)
    assert round(step / 10.0 ** math.floor(math.log10(step) + 1e-6), 4) in (1, 2, 5)


def test_bars_side_by_side_share_their_scale():
    found = paired_bars(np.array([0.31, 0.1]), np.array([0.0, 0.2]))
    assert [said for _, said in found.ticks] == [
        f"{n}\N{NO-BREAK SPACE}%" for n in (0, 10, 20, 30, 40)
    ]
    heights = [(group, height) for *_, height, group in found.bars]
    assert heights == [(0, 77.5), (0, 25.0), (1, 0.0), (1, 50.0)]


# A real browser


@pytest.mark.browser
@pytest.mark.parametrize("width", [375, 1280, 2560])
def test_page_fits_every_width_and_axe_finds_nothing_serious(visits, width):
    from tests.browsing import violations

    long = make_comparison(("n" * 50, "verified false"), texts=("word " * 60, "9" * 80))
    page = visits.open(render_group_comparison(long), width=width)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert violations(page) == []


@pytest.mark.browser
def test_measures_are_copied_as_csv(visits):
    html = render_group_comparison(make_comparison())
    page = visits.open(html, permissions=["clipboard-read", "clipboard-write"])
    page.locator("#measures .copy").click()
    page.get_by_text("Copied").wait_for()
    header, *lines = csv.reader(io.StringIO(page.evaluate("navigator.clipboard.readText()")))
    assert header == ["measure", "right", "wrong", "difference", "effect", "p", "p_corrected"]
    assert lines[0][0] == "reasoning share"
    assert [[float(cell) for cell in line[1:]] for line in lines] == rows_of(html, "measures-table")
