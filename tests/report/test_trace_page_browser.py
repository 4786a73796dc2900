"""The page of a trace in a real browser: clicks, keys and drags."""

import json

import numpy as np
import pytest
from markupsafe import escape

from flowtracer_plugin.report import render_notebook, render_page
from flowtracer_plugin.report.display import show
from flowtracer_plugin.text.visible import visible
from tests.browsing import violations
from tests.report.test_trace_page import WORDS, make_trace

pytestmark = pytest.mark.browser

LINES = [word for line in range(9) for word in (f"{line}", " +", " 1", " =", f" {line + 1}", "\n")]
TOKENS = ("<s>", *WORDS, *LINES, "So", " it", " is", " 9", ".")


@pytest.fixture(scope="module")
def trace():
    return make_trace(TOKENS, prompt=13)


@pytest.fixture(scope="module")
def html(trace):
    return render_page(trace, drops={20: 0.25, 21: 1.5})


@pytest.fixture
def page(visits, html):
    return visits.open(html)


def tokens_of(page):
    return page.locator("#pane .text > span")


def classes(page):
    return set(page.evaluate("document.documentElement.className").split())


def numbers(page, selector):
    """The numbers of the tokens that match a selector."""
    return page.evaluate(
        """(selector) => [...document.querySelectorAll("#pane .text > span")]
           .flatMap((unit, number) => (unit.matches(selector) ? [number] : []))""",
        selector,
    )


def carried(trace, token):
    """The share of a token's flow that passed each earlier token, edge by edge."""
    edges, share = trace.flow.edge_flow(), np.zeros(len(trace.tokens))
    share[token] = 1
    for later in range(token, 0, -1):
        share[:later] += share[later] * edges[later, :later] / max(trace.throughput[later], 1e-12)
    return share


# The text


def test_pointing_at_a_token_shows_its_numbers(page, trace):
    tokens_of(page).nth(20).hover()
    where = page.locator("#where").inner_text()
    ranked = [at for at in range(13, len(TOKENS)) if not show(trace).plain[at]]
    order = sorted(ranked, key=lambda at: -trace.throughput[at])
    place = f"rank {order.index(20) + 1} of {len(ranked)}"
    assert where.startswith(f"token 20 · reasoning · {place} in the")
    assert page.locator("#token").inner_text() == json.dumps(trace.tokens[20])
    assert page.locator("#amount").inner_text().startswith(f"{100 * trace.throughput[20]:.2f}"[:3])
    sources = page.locator("#sources button")
    edges = trace.flow.edge_flow()[20]
    best = np.argsort(-edges, kind="stable")[:3].tolist()
    assert [int(name) for name in sources.locator("small").all_inner_texts()] == best
    shares = [float(one.split()[0]) for one in sources.locator("b").all_inner_texts()]
    assert shares == pytest.approx(100 * edges[best] / trace.throughput[20], abs=0.06)
    assert page.locator("#targets button").count() == 3
    page.mouse.move(5, 5)
    assert page.locator("#hint").is_visible()


def test_a_character_of_several_tokens_has_the_flow_that_passes_all_of_them(visits):
    # So few tokens that the page holds every edge.
    trace = make_trace(("<s>", "", "👩", "x", "", "界", "b", "7", "."), prompt=4)
    edges, unit_of = trace.flow.edge_flow(), np.array([0, 1, 1, 2, 3, 3, 4, 5, 6])
    between = np.zeros((7, 7))
    np.add.at(between, (unit_of[:, None], unit_of), edges)
    np.fill_diagonal(between, 0)
    started = np.bincount(unit_of, trace.spans.question / trace.spans.question.sum())
    page = visits.open(render_page(trace))
    for unit in range(1, 6):
        passing = between[unit].sum() + started[unit]
        tokens_of(page).nth(unit).dispatch_event("pointermove", {"bubbles": True})
        said = page.locator("#amount").inner_text().split()[0]
        assert float(said) == pytest.approx(100 * passing, rel=0.006)
        for side, flows in (("sources", between[unit]), ("targets", between[:, unit])):
            best = [one for one in np.argsort(-flows, kind="stable")[:3] if flows[one] > 0.001]
            rows = page.locator(f"#{side} button")
            named = [
                int(one) for one in rows.evaluate_all("all => all.map(one => one.dataset.unit)")
            ]
            assert named[: len(best)] == best
            shares = [float(one.split()[0]) for one in rows.locator("b").all_inner_texts()]
            wanted = (100 * flows[best] / passing).tolist()
            assert shares[: len(best)] == pytest.approx(wanted, abs=0.06)
        if started[unit]:
            begins = float(page.locator("#sources li b").first.inner_text().split()[0])
            assert begins == pytest.approx(100 * started[unit] / passing, abs=0.06)


def test_question_and_answer_show_where_flow_starts_and_ends(page):
    tokens_of(page).nth(5).hover()
    assert "starts here" in page.locator("#sources").inner_text()
    tokens_of(page).nth(len(TOKENS) - 2).hover()
    assert "ends here, in the answer" in page.locator("#targets").inner_text()
    tokens_of(page).nth(len(TOKENS) - 1).hover()
    assert "· after the answer ·" in page.locator("#where").inner_text()
    assert page.locator("#detail").get_attribute("aria-live") == "off"
    page.keyboard.press("j")
    assert page.locator("#detail").get_attribute("aria-live") == "polite"


def test_a_click_keeps_the_tokens_that_its_flow_passes(page, trace):
    tokens_of(page).nth(40).click()
    assert {"selecting", "inspecting"} <= classes(page)
    assert numbers(page, ".selected") == [40]
    above, below = numbers(page, ".upstream"), numbers(page, ".downstream")
    assert max(above) < 40 < min(below)
    share = carried(trace, 40)
    # The page lacks weak edges: it may miss tokens, but every token that it keeps has enough flow.
    assert all(share[token] >= 0.0095 for token in above)
    assert set(np.flatnonzero(share[:40] > 0.15)) <= set(above)
    assert page.evaluate("location.hash") == "#t40"
    assert f"kept: {len(above)} before" in page.locator("#kept").inner_text()
    assert page.locator("#above").get_attribute("d").count("M") == len(above)
    page.keyboard.press("Escape")
    assert "selecting" not in classes(page)
    assert numbers(page, ".upstream, .downstream, .selected") == []
    assert page.evaluate("location.hash") == ""


def test_the_address_keeps_the_selection(visits, html):
    page = visits.open(html, fragment="#t25")
    assert numbers(page, ".selected") == [25]
    page.evaluate("location.hash = '#t30'")
    page.wait_for_function("document.querySelector('.selected')?.matches('.shown')")
    assert numbers(page, ".selected") == [30]
    assert numbers(visits.open(html, fragment="#t999"), ".selected") == []


def test_keys_go_from_token_to_token_and_from_mark_to_mark(page):
    tokens_of(page).nth(20).click()
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowRight")
    assert page.locator("#where").inner_text().startswith("token 21 ·")
    page.keyboard.press("ArrowLeft")
    marked = numbers(page, "[data-hub], [data-checkpoint]")
    page.keyboard.press("j")
    after = next(mark for mark in marked if mark > 20)
    assert page.locator("#where").inner_text().startswith(f"token {after} ·")
    page.keyboard.press("k")
    before = [mark for mark in marked if mark < after][-1]
    assert page.locator("#where").inner_text().startswith(f"token {before} ·")
    page.keyboard.press("Enter")
    assert numbers(page, ".selected") == [before]
    assert numbers(page, "[role=button]") == numbers(page, "[tabindex]") == [before]
    page.locator("#share").focus()
    page.keyboard.press("j")
    assert page.locator("#where").inner_text().startswith(f"token {after} ·")


def test_keys_win_over_a_pointer_that_rests_on_the_text(visits):
    page = visits.open(render_page(make_trace(TOKENS[:13] + tuple(LINES) * 12, prompt=13)))
    tokens_of(page).nth(20).hover()
    for _ in range(40):
        page.keyboard.press("j")
    assert page.evaluate("scrollY") > 300
    page.wait_for_timeout(200)  # until the browser tells what came to lie beneath the pointer
    assert numbers(page, ".shown") == numbers(page, ":focus")
    page.mouse.move(5, 5)
    assert numbers(page, ".shown") == numbers(page, ":focus")


def test_shade_by_amount_follows_the_throughput(page, trace):
    by_rank = [numbers(page, f".h{heat}") for heat in range(1, 6)]
    page.locator("#by-amount").click()
    flow = trace.throughput.astype(np.float32)
    highest = np.delete(flow, len(flow) - 2).max()
    with np.errstate(divide="ignore"):
        heats = np.clip(6 + np.floor(np.log2(flow / highest)), 0, 5)
    for heat in range(1, 6):
        assert numbers(page, f".h{heat}") == np.flatnonzero(heats == heat).tolist()
    assert page.locator("p.by-amount").is_visible()
    assert not page.locator("p.by-rank").is_visible()
    page.locator("#by-rank").click()
    assert [numbers(page, f".h{heat}") for heat in range(1, 6)] == by_rank


def test_blanks_can_be_shown_and_hidden(page):
    text = page.locator(".response .text")
    before = text.text_content()
    page.locator("#blanks").click()
    assert text.text_content() == before.replace(" ", "·\u200b")  # where a line may break
    assert page.locator("#blanks").get_attribute("aria-pressed") == "true"
    page.locator("#blanks").click()
    assert text.text_content() == before


def test_blanks_and_formatting_get_ranks_and_rows_on_request(visits):
    trace = make_trace(("<s>", "What", "?", *[" is", "\n", " 3", "**"] * 6, "7", "."))
    page, shown = visits.open(render_page(trace)), show(trace)
    plain = {at for at in range(3, 27) if shown.plain[at]}
    assert plain

    def marked():
        return set(numbers(page, "[data-hub]")) | set(numbers(page, "[data-checkpoint]"))

    def rows():
        found = page.locator("#tokentable tbody tr:visible td:first-child").all_inner_texts()
        return {int(one) for one in found}

    few = marked()
    assert not plain & (few | rows())
    tokens_of(page).nth(min(plain)).hover()
    assert "blank or formatting, without a rank" in page.locator("#where").inner_text()
    page.locator("#plain").click()
    every = [token.index for token in trace.hubs(4, skip="")]
    assert [int(tokens_of(page).nth(at).get_attribute("data-hub")) for at in every] == [1, 2, 3, 4]
    assert plain & marked()
    assert plain & rows()
    ticks = page.locator("#marks").get_attribute("d").count("M")
    assert ticks == len(numbers(page, "[data-hub]"))
    assert page.locator(".flag").count() == len(numbers(page, "[data-checkpoint]"))
    first = page.locator(f"#tokentable tr:has(button[data-unit='{every[0]}']) td.hub")
    assert first.get_attribute("data-value") == "1"
    page.locator("#plain").click()
    assert marked() == few
    assert not plain & rows()


@pytest.mark.parametrize("asked", ["click", "key"])
def test_to_the_answer(visits, asked):
    page = visits.open(render_page(make_trace(TOKENS[:13] + tuple(LINES) * 12, prompt=13)))
    assert page.evaluate("scrollY") == 0
    page.keyboard.press("a") if asked == "key" else page.locator("#to-answer").click()
    (answer,) = numbers(page, ".part .answer")
    assert numbers(page, ":focus") == [answer]
    assert page.locator("#where").inner_text().startswith(f"token {answer} · answer")
    assert 100 < tokens_of(page).nth(answer).bounding_box()["y"] < 800
    assert numbers(page, ".selected") == []


def test_a_long_prompt_shows_its_end_until_it_is_unfolded(visits):
    prompt = ("<s>", *[" word", " after"] * 240, "?")
    trace = make_trace((*prompt, " It", " is", "7", "."), prompt=len(prompt))
    page = visits.open(render_page(trace))
    fold, button = page.locator("#fold"), page.locator("#unfold")
    low, top = fold.evaluate("(fold) => fold.offsetHeight"), fold.bounding_box()["y"]
    tops = {unit: tokens_of(page).nth(unit).bounding_box()["y"] for unit in (1, 480, 481)}
    assert [unit for unit, y in tops.items() if y >= top] == [480, 481]
    assert button.inner_text() == "Show all 482 tokens"
    window, ribbon = (page.locator(one).bounding_box() for one in ("#window", "#ribbon"))
    assert window["x"] - ribbon["x"] > ribbon["width"] / 3  # what is folded is not in view
    button.click()
    assert fold.evaluate("(fold) => fold.offsetHeight") > low
    assert button.get_attribute("aria-expanded") == "true"
    button.click()
    assert fold.evaluate("(fold) => fold.offsetHeight") == low
    page.evaluate("location.hash = '#t5'")
    page.wait_for_function("!document.querySelector('.folded')")
    assert numbers(page, ".selected") == [5]
    page.emulate_media(media="print")
    assert not button.is_visible()


def test_on_a_phone_the_text_comes_before_the_legend(visits, html):
    page = visits.open(html, width=375, height=667)
    text, legend = (page.locator(one).bounding_box()["y"] for one in (".response .text", ".legend"))
    assert text < legend
    assert page.locator(".prompt .text").bounding_box()["y"] < 900
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_ranks_stand_above_the_text_and_take_no_room(page):
    before, after = page.locator(".response [data-hub='1']").evaluate(
        """(one) => {
            const before = one.getBoundingClientRect().width;
            delete one.dataset.hub;
            return [before, one.getBoundingClientRect().width];
        }"""
    )
    assert before == after


def test_search_finds_across_tokens(page):
    page.keyboard.press("/")
    page.keyboard.type("1 = 2")
    assert page.locator("#matches").inner_text() == "1 of 1"
    start = TOKENS.index("1", 13) + 2
    assert numbers(page, ".found.current") == [start, start + 1, start + 2]
    page.locator("#query").fill(" IS")
    places = [at for at, token in enumerate(TOKENS) if token == " is"]
    assert page.locator("#matches").inner_text() == f"1 of {len(places)}"
    assert numbers(page, ".found") == places
    page.keyboard.press("Enter")
    assert numbers(page, ".current") == places[1:2]
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Shift+Enter")
    assert numbers(page, ".current") == places[-1:]
    page.locator("#query").dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    assert numbers(page, ".current") == places[-1:]  # it ended the writing of a character
    page.locator("#share").focus()
    page.keyboard.press("/")
    assert page.locator("#query").evaluate("(field) => field === document.activeElement")
    page.locator("#query").fill("no such text")
    assert page.locator("#matches").inner_text() == "none"
    page.keyboard.press("Escape")
    assert numbers(page, ".found") == []


# The ribbon


def test_the_ribbon_goes_to_a_token_and_can_be_dragged(visits, trace):
    long = make_trace(TOKENS[:13] + tuple(LINES) * 12, prompt=13)
    page = visits.open(render_page(long))
    box = page.locator("#ribbon").bounding_box()
    page.mouse.click(box["x"] + box["width"] - 1, box["y"] + 5)
    assert numbers(page, ".selected") == [len(long.tokens) - 1]
    page.keyboard.press("Escape")
    before = page.evaluate("scrollY")
    window = page.locator("#window").bounding_box()
    box = page.locator("#ribbon").bounding_box()
    page.mouse.move(window["x"] + window["width"] / 2, box["y"] + 10)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 10, steps=5)
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 10, steps=5)
    page.mouse.up()
    assert page.evaluate("scrollY") < before - 100
    assert numbers(page, ".selected") == []
    page.wait_for_timeout(100)
    window = page.locator("#window").bounding_box()
    middle = (window["x"] + window["width"] / 2 - box["x"]) / box["width"]
    assert middle == pytest.approx(0.25, abs=0.1)


def test_the_window_disappears_when_no_text_is_in_view(page):
    assert page.locator("#window").is_visible()
    page.locator("#about").scroll_into_view_if_needed()
    page.locator("#window").wait_for(state="hidden")
    page.locator("#pane").scroll_into_view_if_needed()
    page.locator("#window").wait_for(state="visible")


# The steps


def shown_steps(page):
    return [int(one) for one in page.locator("#steplist li:visible .number").all_inner_texts()]


def test_the_slider_shows_the_smallest_set_of_flows(page, trace):
    edges = trace.steps().edges
    flows = -np.sort(-edges[edges > 0])
    for share in (80, 20, 100):
        page.locator("#share").fill(str(share))
        count = int(np.searchsorted(np.cumsum(flows), share / 100 * flows.sum() - 1e-6)) + 1
        assert page.locator("#arcs path").count() == min(count, len(flows), 150)
        said = page.locator("#shown").inner_text()
        assert f"and {min(count, len(flows), 150)} of {len(flows)} flows" in said
    page.locator("#share").fill("20")
    assert len(shown_steps(page)) < len(edges)
    assert page.locator("#steplist li.gap").count() > 0


def test_a_shorter_list_of_steps_takes_less_room(page):
    high = page.locator("#steplist").evaluate("(list) => list.offsetHeight")
    page.locator("#share").fill("5")
    shown = page.locator("#steplist li:visible").count()
    assert page.locator("#steplist").evaluate("(list) => list.offsetHeight") == 32 * shown < high


def test_widths_are_square_roots_of_flows(page, trace):
    paths = page.locator("#arcs path")
    edges = trace.steps().edges
    numbers = [int(one) - 1 for one in page.locator("#steplist .number").all_inner_texts()]
    for path in (paths.first, paths.last):
        earlier, later = (int(path.get_attribute(f"data-{end}")) for end in ("source", "target"))
        flow = edges[numbers[later], numbers[earlier]]
        width = max(7 * (flow / edges.max()) ** 0.5, 0.75)
        assert float(path.get_attribute("stroke-width")) == pytest.approx(width, abs=0.02)


def test_a_click_on_a_step_keeps_the_steps_before_and_after_it(page):
    buttons = page.locator("#steplist li button")
    row = buttons.count() // 2
    buttons.nth(row).click()
    page.mouse.move(5, 5)
    above, below = (
        page.locator(f"#steplist li.{kind}").count() for kind in ("upstream", "downstream")
    )
    assert above > 0
    assert below > 0
    assert page.locator("#arcs path.upstream").count() > 0
    assert buttons.nth(row).get_attribute("aria-pressed") == "true"
    buttons.nth(row).click()
    assert page.locator("#steplist li.upstream").count() == 0  # though it is still pointed at
    page.mouse.move(5, 5)
    page.locator("#steplist li a").last.click()
    assert page.locator("#pane .flash").count() > 0


# The river


def test_the_river_shows_the_numbers_of_every_cut(page, trace):
    river = trace.river()
    stream = page.locator("#stream")
    box = stream.bounding_box()
    for cut in (3, 20, 50):
        place = box["x"] + box["width"] * cut / len(trace.tokens)
        stream.scroll_into_view_if_needed()
        box = stream.bounding_box()
        page.mouse.move(place, box["y"] + 60)
        said = page.locator("#cutsays").inner_text()
        assert said.startswith(f"before token {cut}: ")
        at = river.cuts.tolist().index(cut)
        if river.waiting[at] > 1e-3:
            assert f"{100 * river.waiting[at]:.1f}"[:3] in said
        shares = [float(part.split()[0]) for part in said.split(": ")[1].split(";")[0].split(", ")]
        assert sum(shares) == pytest.approx(100, abs=0.3)
    page.mouse.click(place, box["y"] + 60)
    assert numbers(page, ".selected") == [50]
    stream.focus()
    page.keyboard.press("End")
    assert page.locator("#cutsays").inner_text().startswith("after the last token: 100")
    assert stream.get_attribute("aria-valuenow") == str(len(trace.tokens))


def test_keys_lead_along_the_river_and_into_the_text(page, trace):
    stream, cuts = page.locator("#stream"), trace.river().cuts
    stream.focus()
    for key, cut in {"Home": 0, "ArrowUp": 1, "PageUp": 11, "ArrowDown": 10, "PageDown": 0}.items():
        page.keyboard.press(key)
        assert stream.get_attribute("aria-valuenow") == str(cuts[cut])
    page.keyboard.press("End")
    page.keyboard.press("PageUp")  # at the end already
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    assert numbers(page, ".selected:focus") == [cuts[-2]]


# The tables


def column(page, table, number):
    return page.locator(f"#{table} tbody td:nth-child({number})").evaluate_all(
        "cells => cells.map((cell) => cell.dataset.value)"
    )


def test_headings_sort(page):
    flow = [float(one) for one in column(page, "tokentable", 5)]
    assert flow == sorted(flow, reverse=True)
    assert page.locator("#tokentable th[aria-sort=descending]").inner_text() == "flow"
    assert page.locator("#steptable th[aria-sort=ascending]").inner_text() == "step"
    heading = page.locator("#tokentable th").nth(0)
    heading.locator("button").click()
    places = [int(one) for one in column(page, "tokentable", 1)]
    assert places == sorted(places, reverse=True)
    assert heading.get_attribute("aria-sort") == "descending"
    heading.locator("button").click()
    assert [int(one) for one in column(page, "tokentable", 1)] == places[::-1]
    page.locator("#tokentable th").nth(2).locator("button").click()
    page.locator("#tokentable th").nth(2).locator("button").click()
    hubs = [int(one) for one in column(page, "tokentable", 3) if one]
    assert hubs == sorted(hubs)
    assert column(page, "tokentable", 3)[-1] == ""  # those without a number come last
    inflow, outflow, sink = (column(page, "steptable", number) for number in (4, 6, 7))
    for come, go, stay in zip(inflow, outflow, sink, strict=True):
        assert float(come) == pytest.approx(float(go) + float(stay), abs=1e-6)
    page.locator("#steptable th").nth(3).locator("button").click()
    inflow = [float(one) for one in column(page, "steptable", 4)]
    assert inflow == sorted(inflow, reverse=True)


def test_tables_without_rows_can_be_sorted_and_copied(visits):
    page = visits.open(render_page(make_trace(("<s>", "a", "b", "7"), prompt=3, answer=(3,))))
    assert "No token of the reasoning" in page.locator("#tokentable").inner_text()
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    for heading in page.locator("#tokentable th button").all():
        heading.click()
    page.locator(".copy").first.click()
    head = "index,context,hub,checkpoint,throughput,from_prompt,sources,targets"
    assert page.evaluate("window.copied") == f"{head}\r\n"


def test_measured_drops_stand_beside_the_scores(page, visits, trace):
    places = [int(one) for one in column(page, "tokentable", 1)]
    drops = dict(zip(places, column(page, "tokentable", 9), strict=True))
    for token, drop in {20: "0.25", 21: "1.5"}.items():
        assert drops.get(token, drop) == drop
    assert "1.5" in drops.values() or "0.25" in drops.values()
    assert "knock-out" not in visits.open(render_page(trace)).locator("#tokens").inner_text()


def test_tables_are_copied_as_csv(page, trace):
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.locator(".copy").first.click()
    lines = page.evaluate("window.copied").split("\r\n")
    head = "index,context,hub,checkpoint,throughput,from_prompt,sources,targets,drop"
    assert lines[0] == head
    first = lines[1].split(",")
    best = int(first[0])
    assert float(first[4]) == trace.throughput[best]
    page.wait_for_function("document.querySelector('.copy').textContent === 'Copied'")


def test_table_and_paths_lead_into_the_text(page):
    button = page.locator("#tokentable td button").first
    number = int(button.get_attribute("data-unit"))
    button.click()
    assert numbers(page, ".selected") == [number]
    path = page.locator(".paths button").first
    path.click()
    assert numbers(page, ".selected") == [int(path.get_attribute("data-unit"))]


# Looks


def test_colours_follow_the_system_and_the_switch(visits, html):
    for scheme in ("light", "dark"):
        page = visits.open(html, color_scheme=scheme)
        paper = "getComputedStyle(document.body).backgroundColor"
        own = page.evaluate(paper)
        page.locator("#theme").click()  # light
        light = page.evaluate(paper)
        page.locator("#theme").click()  # dark
        dark = page.evaluate(paper)
        assert light != dark
        assert own == {"light": light, "dark": dark}[scheme]
        page.locator("#theme").click()
        assert page.evaluate(paper) == own


@pytest.mark.parametrize(
    ("scheme", "width"), [("dark", 375), ("light", 1280), ("dark", 1280), ("light", 2560)]
)
def test_axe_finds_nothing_serious(visits, html, scheme, width):
    page = visits.open(html, color_scheme=scheme, width=width)
    assert violations(page) == []
    tokens_of(page).nth(40).click()
    page.locator("#steplist li button").nth(2).click()
    page.locator("#query").fill("is")
    page.locator("#by-amount").click()
    assert "\n".join(violations(page)) == ""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_print_leaves_out_the_controls(page):
    page.emulate_media(media="print")
    for name in (".tools", "#detail", "nav", ".copy"):
        assert not page.locator(name).first.is_visible()
    assert page.locator("#pane .text").first.is_visible()
    assert page.locator("#stream").is_visible()


def test_the_dark_page_is_printed_as_the_light_one(page):
    colours = """[...document.querySelectorAll("#pane .text > span, small")]
        .map((one) => getComputedStyle(one).backgroundColor + getComputedStyle(one).color)"""
    page.emulate_media(media="print")
    light = page.evaluate(colours)
    page.locator("#theme").evaluate("(button) => { button.click(); button.click(); }")
    assert "dark" in classes(page)
    assert page.evaluate(colours) == light


def test_on_a_phone_the_detail_does_not_cover_its_token(visits, trace):
    long = make_trace(TOKENS[:13] + tuple(LINES) * 6, prompt=13)
    page = visits.open(render_page(long), width=375, height=667, has_touch=True)
    tokens_of(page).nth(200).tap()
    for side in ("sources", "targets"):
        page.locator(f"#{side} button").first.tap()
        token = page.locator("#pane .selected").bounding_box()
        assert token["y"] + token["height"] <= page.locator("#detail").bounding_box()["y"]


def test_reset_leaves_the_focus_at_the_token(page):
    tokens_of(page).nth(40).click()
    page.locator("#reset").focus()
    page.keyboard.press("Enter")
    assert "selecting" not in classes(page)
    assert numbers(page, ":focus") == [40]


def test_lines_break_between_words_when_blanks_are_shown(visits):
    prose = make_trace(("<s>", "What", "?", *[" is", " anything"] * 30, "7", "."))
    page = visits.open(render_page(prose), width=375)
    page.locator("#blanks").click()
    lines = """(unit) => {
        const range = document.createRange();
        range.setStart(unit.firstChild, unit.textContent.length - 8);
        range.setEnd(unit.firstChild, unit.textContent.length);
        return range.getClientRects().length;
    }"""
    words = tokens_of(page).filter(has_text="anything").all()
    assert {word.evaluate(lines) for word in words} == {1}


def test_the_address_keeps_the_selection_while_sections_are_visited(page):
    tokens_of(page).nth(40).click()
    page.locator("nav a[href='#river']").click()
    assert page.evaluate("scrollY") > 300
    assert page.evaluate("location.hash") == "#t40"
    page.keyboard.press("Escape")
    page.locator("nav a[href='#tokens']").click()
    assert page.evaluate("location.hash") == "#tokens"


def test_all_writing_systems_are_shown_whole(visits):
    words = (
        "<s>",
        "问题",
        "是",
        "什么",
        "？",
        "\n",
        "שלום",
        " עולם",
        "👩",
        "\u200d🚀",
        "🇩🇪",
        "नमस्ते",
        " ٣",
        "7",
    )
    trace = make_trace(words, prompt=6, answer=(-1,))
    page = visits.open(render_page(trace))
    assert tokens_of(page).all_text_contents() == [
        visible(unit.text).replace("\n", "⏎") for unit in show(trace).units
    ]
    right = "(one) => one.getBoundingClientRect().right"
    assert tokens_of(page).nth(1).evaluate(right) < 400  # each line in its own direction
    assert tokens_of(page).nth(6).evaluate(right) > 600
    direction = "(text) => getComputedStyle(text).direction"
    assert page.locator(".prompt .text").evaluate(direction) == "ltr"
    assert page.locator(".response .text").evaluate(direction) == "rtl"
    left = "(one) => one.getBoundingClientRect().left"
    cell = page.locator("#tokentable button[data-unit='8']")
    assert cell.locator(".before").evaluate(left) > cell.locator(".after").evaluate(left)
    tokens_of(page).nth(8).dispatch_event("pointermove", {"bubbles": True})
    assert "👩" in page.locator("#token").inner_text()


# The notebook cell


def test_notebook_cells_do_not_affect_each_other(visits, trace):
    cell = render_notebook(trace)
    page = visits.open(f"<style>span {{ color: red }}</style>{cell}{cell}")
    assert len(page.frames) == 3
    for frame in page.frames[1:]:
        assert frame.locator(".text > span").count() >= len(TOKENS)
        assert frame.locator(".ribbon svg").is_visible()
        colour = frame.locator(".response .text > span").first
        assert colour.evaluate("(one) => getComputedStyle(one).color") != "rgb(255, 0, 0)"


def shades(page):
    """The set of classes of each token."""
    return [set((one.get_attribute("class") or "").split()) for one in tokens_of(page).all()]


def test_another_score_shades_the_text(visits, trace):
    place = np.arange(len(trace.tokens), dtype=float)
    page = visits.open(render_page(trace, scores={"place": place}))
    before = shades(page)
    page.select_option("#score", label="place")
    assert "h5" in tokens_of(page).nth(len(trace.tokens) - 1).get_attribute("class")
    assert page.locator("#by-amount").is_disabled()
    assert page.locator("#shaded-by").inner_text() == "place"
    page.select_option("#score", label="flow")
    assert shades(page) == before
    assert page.locator("#by-amount").is_enabled()
    assert page.locator("#shaded-by").inner_text() == "throughput"


def test_the_page_works_in_a_frame_without_an_address(visits, html):
    frame = f'<iframe sandbox="allow-scripts" srcdoc="{escape(html)}"></iframe>'
    style = "<style>iframe { width: 1200px; height: 800px }</style>"
    page = visits.open(f"<!doctype html><meta charset='utf-8'>{style}{frame}")
    inside = page.frame_locator("iframe")
    inside.locator("#pane .text > span").nth(30).click()
    inside.locator("#facts").wait_for()
    where = inside.locator("#where").inner_text()
    inside.locator(".carried a").first.click()
    assert inside.locator("#where").inner_text() != where
    inside.get_by_role("link", name="About").click()
    assert inside.locator("#about").evaluate("(one) => one.getBoundingClientRect().top < 800")
