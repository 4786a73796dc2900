"""The page, the notebook cell and the terminal view of a trace."""

import base64
import re
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from flowtracer_plugin.credit.weights import token_credit
from flowtracer_plugin.report import render_notebook, render_page, write_page
from flowtracer_plugin.report.display import (
    HEAT_SHARES,
    Piece,
    direction,
    is_long,
    percent,
    piece_starts,
    ranges,
    show,
)
from flowtracer_plugin.report.pages.trace_page_data import EDGES_PER_UNIT
from flowtracer_plugin.report.terminal import render_trace
from flowtracer_plugin.result.token_heads import TokenHeads
from flowtracer_plugin.text.visible import visible
from tests.made_traces import hostile_trace, make_trace
from tests.pages import Page, assert_loads_nothing, assert_only_text

WORDS = ("<s>", "What", " is", " 3", " +", " 4", "?", "\n", "It", " is", " 7", ".")


@pytest.fixture(scope="module")
def trace():
    return make_trace(("<s>", *WORDS * 4), prompt=13)


@pytest.fixture(scope="module")
def html(trace):
    return render_page(trace)


@pytest.fixture(scope="module")
def hostile():
    return hostile_trace()


def printed(trace, width=80, **console):
    file = StringIO()
    Console(file=file, width=width, **console).print(render_trace(trace))
    return file.getvalue()


# The page


def test_page_holds_every_token_escaped(trace, html):
    shown = [text.replace("\n", "⏎") for text in trace.tokens]
    assert Page(html).tokens == shown
    assert "<span>&lt;s&gt;</span>" in html
    assert Page(html).data["tokens"] == list(trace.tokens)


def test_hostile_text_becomes_text_and_nothing_else(html, hostile):
    harmless, page = Page(html), Page(render_page(hostile))
    assert_only_text(page, harmless)
    assert len(page.scripts) == 2
    assert page.scripts[1] == harmless.scripts[1]
    assert page.tokens == [visible(text) for text in hostile.tokens]
    assert page.data["tokens"] == list(hostile.tokens)
    assert re.search(r"[<>&\u2028\u2029]|[^\x00-\x7f]", page.scripts[0]) is None


def test_page_with_lone_surrogates_can_be_written(hostile, tmp_path):
    path = tmp_path / "new" / "page.html"
    assert write_page(hostile, path) == path
    assert path.read_text("utf-8") == render_page(hostile)
    assert hostile.to_html(str(path)) == path


def test_page_loads_nothing_and_allows_its_own_script_and_style_only(html):
    paper = "https://arxiv.org/abs/2606.10646"
    assert_loads_nothing(html, paper)
    links = [attrs["href"] for _, attrs in Page(html).tags if "href" in attrs]
    assert {link for link in links if not link.startswith("#")} == {paper}


def test_page_says_what_was_found(trace, html):
    share = f"{100 * trace.reasoning_share:.1f}"
    for said in (
        "found by rule <q>boxed</q> in token 47",
        "tiny",
        "layers 2–4",
        "49 tokens",
        f"{share}\N{NO-BREAK SPACE}%",
        "12 of 12",
        "Attention is not causation",
    ):
        assert said in html


def test_page_is_deterministic(html):
    assert render_page(make_trace(("<s>", *WORDS * 4), prompt=13)) == html


def test_page_survives_the_smallest_traces():
    for tokens in (("a", "b", "7"), ("a", "b", "", "7"), ("a", "b", "7", "")):
        trace = make_trace(tokens, prompt=2, answer=(len(tokens) - 1,))
        page = Page(render_page(trace))
        assert page.data["tokens"] == list(tokens)
        assert "7" in printed(trace)


def test_page_grows_with_the_length_of_the_text():
    length, offsets = 4096, 2 ** np.arange(12)
    attention = np.zeros((length, length), np.float32)
    for offset in offsets:
        later = np.arange(offset, length)
        attention[later, later - offset] = 0.1 + (later * 7919 % 101) / 101
    attention[1:] /= attention[1:].sum(1, keepdims=True)
    trace = make_trace([f" tok{i % 97}" for i in range(length)], prompt=400, attention=attention)
    assert len(render_page(trace).encode()) < 540_000
    assert len(render_notebook(trace).encode()) < 540_000


# What is shown


def test_tokens_without_text_join_the_character_they_spell():
    tokens = ("<s>", "a", "", "", "🎀", "", " is", "", "7", "", "")
    trace = make_trace(tokens, prompt=6, answer=(8,))
    shown = show(trace)
    spans = [(unit.first, unit.last, unit.text) for unit in shown.units]
    joined = [(0, 0, "<s>"), (1, 1, "a"), (2, 5, "🎀"), (6, 6, " is"), (7, 10, "7")]
    assert spans == joined
    edges = trace.flow.edge_flow()
    passing = edges[2:6, :2].sum() + trace.spans.question[2:6].sum() / trace.spans.question.sum()
    assert shown.units[2].throughput == pytest.approx(passing)
    assert shown.unit_of(9) is shown.units[4]
    assert shown.units[4].region == "answer"
    page = Page(render_page(trace))
    assert page.tokens == [text for *_, text in joined]
    assert page.data["starts"] == [0, 1, 2, 6, 7]


@pytest.mark.parametrize(
    ("tokens", "starts"),
    [
        (("👩", "\u200d", "🚀", "!"), [0, 3]),
        (("👨", "\u200d👩", "", "\u200d👧", "x"), [0, 4]),
        (("🇩", "🇪", "🇫", "🇷"), [0, 2]),
        (("e", "\u0301", "e"), [0, 2]),
        (("👍", "🏽", "a"), [0, 2]),
        (("a", "\r", "\n", "b"), [0, 1, 3]),
        (("ש", "ל", "מ", "ה"), [0, 1, 2, 3]),
        (("a", "", "\u0301"), [0]),
    ],
)
def test_tokens_that_split_what_readers_see_as_one_character_are_one_piece(tokens, starts):
    assert piece_starts(tokens).tolist() == starts


def test_a_long_text_folds():
    def long(text):
        return is_long([Piece(first=0, last=0, text=text)])

    assert not long("word " * 200)
    assert long("word " * 300)
    assert long("\n" * 15)


def test_blanks_are_named_by_signs():
    words = [Piece(first=0, last=0, text=text).word for text in (" it", " ", "\n", "\t ")]
    assert words == ["it", "␣", "⏎", "⇥␣"]


def test_part_without_any_text_is_shown_as_empty():
    assert [unit.text for unit in show(make_trace(("", "", "", "7"), answer=(3,))).units] == [
        "∅",
        "7",
    ]


def test_shaded_tokens_are_those_with_more_credit(trace):
    weights = token_credit(trace.throughput, trace.spans.response)
    shaded = [unit.first for unit in show(trace).response if unit.heat]
    assert shaded == np.flatnonzero(weights > 1).tolist()
    assert HEAT_SHARES[0] == max(HEAT_SHARES)


def edges_in(data, side):
    """Distance and share of every edge that the page's script knows, by unit."""
    packed, width = base64.b64decode(data["edges"][side]), data["edges"]["width"]
    values = [
        int.from_bytes(packed[at : at + width], "little") for at in range(0, len(packed), width)
    ]
    pairs = [(value >> 10, value & 1023) for value in values]
    return np.reshape(pairs, (-1, data["edges"]["perUnit"], 2))


def test_known_edges_are_the_strongest(trace, html):
    data, edges = Page(html).data, trace.flow.edge_flow()
    for side, flows, sign in (("sources", edges, -1), ("targets", edges.T, 1)):
        pairs = edges_in(data, side)
        for token, row in enumerate(flows):
            shares = np.rint(1000 * row / (trace.throughput[token] or 1))
            best = sorted((-flow, other) for other, flow in enumerate(row) if shares[other])
            expected = [[sign * (other - token), shares[other]] for _, other in best]
            kept = [pair for pair in pairs[token].tolist() if pair[0]]
            assert kept == expected[:EDGES_PER_UNIT]


def test_long_texts_show_the_strongest_three(trace, html, monkeypatch):
    before = Page(html).data
    monkeypatch.setattr("flowtracer_plugin.report.pages.trace_page_data.LONG", 5)
    data = Page(render_page(trace)).data
    assert [(one["edges"]["perUnit"], one["edges"]["width"]) for one in (before, data)] == [
        (5, 3),
        (3, 4),
    ]
    for side in ("sources", "targets"):
        np.testing.assert_array_equal(edges_in(data, side), edges_in(before, side)[:, :3])


def test_throughput_comes_back_from_the_data(trace, html):
    packed = base64.b64decode(Page(html).data["throughput"])
    np.testing.assert_array_equal(np.frombuffer(packed, "<f4"), trace.throughput.astype("f4"))


def test_short_texts_have_few_marks_and_long_ones_at_most_ten():
    for lines, marks in ((1, 3), (4, 7), (12, 10)):
        page = Page(render_page(make_trace(("<s>", *WORDS * lines), prompt=5)))
        assert sum("data-hub" in attrs for _, attrs in page.tags) == marks + 1  # and the legend's


def test_drops_must_name_tokens_of_the_trace(trace):
    with pytest.raises(ValueError, match=r"wanted drops of tokens 0 to 48, found \[49\]"):
        render_page(trace, {49: 0.5})
    html = render_page(trace, {40: -0.123456})
    assert "nats lost</button>" in html
    assert ">−0.12</td>" in html


def test_no_line_begins_between_the_blank_before_an_answer_and_the_answer():
    def of(*tokens):
        answer = tuple(range(2, 2 + len(tokens)))
        units = show(make_trace(("a", "b", *tokens, "."), prompt=2, answer=answer)).units
        return [set(unit.classes.split()) & {"blank", "word"} for unit in units[2:-1]]

    assert of(" 7") == [{"word"}]
    assert of(" ", "7", " apples") == [{"blank"}, set(), {"word"}]
    assert of("7", "\n", f" {'7' * 40}") == [set(), set(), set()]


def test_only_prompt_text_outside_the_question_is_grey(html):
    assert ".prompt .line { color" in html
    assert ".question .line" not in html


def test_blanks_are_shown_by_signs_in_lists():
    trace = make_trace(("<s>", "a", " ", "7"), prompt=3)
    page = render_page(trace, heads=None)
    assert '">␣</button>' in page


def test_characters_that_cannot_be_seen_are_spelled_out():
    assert visible("a\x00\x1b\x7f\t\n") == "a␀␛␡\t\n"
    assert visible("\ud83dx\u202e") == "⟨U+D83D⟩x⟨U+202E⟩"
    assert visible("\u200d") == "⟨U+200D⟩"
    assert visible("👩\u200d🚀 — é") == "👩\u200d🚀 — é"
    assert visible(" \n\n") == " \n\n"


def test_the_first_letter_gives_the_direction():
    def of(*texts):
        return direction(Piece(first=0, last=0, text=text) for text in texts)

    assert of("<s>", "א") == "ltr"  # the s
    assert of("12 ", "…", "שלום", "a") == "rtl"
    assert of("١٢", "سلام") == "rtl"
    assert (of("漢字", "א"), of("123", "🎀"), of()) == ("ltr", "ltr", "ltr")


def test_percent_and_ranges():
    shares = {
        0.0: "0",
        1.0: "100",
        0.99999: "100",
        0.1234: "12.3",
        0.00012345: "0.012",
        1e-9: "<0.001",
    }
    assert {share: percent(share).replace("\N{NO-BREAK SPACE}", "")[:-1] for share in shares} == (
        shares
    )
    assert ranges([1, 2, 3, 5, 7, 8]) == "1–3, 5, 7–8"
    assert ranges([]) == ""


# Heads


def heads_of(trace, token):
    """Made-up heads that pay what flows into a token."""
    flow = trace.flow.edge_flow()[token, :token]
    parts = np.random.default_rng(0).random((2, 3, token))
    paid = flow * parts / parts.sum((0, 1))
    return TokenHeads(token=token, layers=(4, 6), edges=paid, flow=paid)


def test_the_map_of_heads_says_what_each_pays(trace, hostile):
    found = heads_of(trace, 40)
    html = render_page(trace, heads=found)
    for (row, head), share in np.ndenumerate(found.shares):
        assert f"<title>layer {found.layers[row]}, head {head}: {percent(share)}</title>" in html
    strengths = [
        float(attrs["fill-opacity"]) for _, attrs in Page(html).tags if "fill-opacity" in attrs
    ]
    np.testing.assert_allclose(strengths, found.shares.ravel() / found.shares.max(), atol=6e-4)
    assert_loads_nothing(html, "https://arxiv.org/abs/2606.10646")
    assert '<section id="heads">' not in render_page(trace)
    assert_only_text(Page(render_page(hostile, heads=heads_of(hostile, 20))), Page(html))
    file = StringIO()
    Console(file=file, width=100).print(render_trace(trace, heads=found))
    best = found.strongest(1)[0]
    assert f"{percent(best.share)}  layer {best.layer}, head {best.head}, most from" in (
        file.getvalue()
    )


def test_heads_of_another_trace_are_refused(trace):
    found = heads_of(trace, 40)
    with pytest.raises(ValueError, match="found those of token 60 with 40 earlier ones"):
        render_page(trace, heads=replace(found, token=60))
    nothing = replace(found, flow=0 * found.flow)
    assert "No flow enters this token" in render_page(trace, heads=nothing)


# Blanks and formatting


def test_rows_of_blanks_are_hidden_but_for_findings(trace):
    shown = show(trace)
    plain = {unit.index for unit in shown.units if shown.plain[unit.index]}
    best = max(
        unit.throughput
        for unit in shown.response
        if unit.text.strip() and unit.region == "response"
    )
    blank = [unit for unit in shown.response if unit.text == "\n"]
    assert [unit.index in plain for unit in blank] == [unit.throughput <= best for unit in blank]
    hidden = [
        attrs for tag, attrs in Page(render_page(trace)).tags if tag == "tr" and "hidden" in attrs
    ]
    assert 0 < len(hidden) <= len(plain)


# The notebook cell


def test_notebook_cell_is_a_frame_that_runs_nothing(hostile):
    html = render_notebook(hostile)
    ((tag, attrs),) = Page(html).tags
    assert tag == "iframe"
    assert attrs["sandbox"] == ""
    inner = Page(attrs["srcdoc"])
    assert inner.scripts == []
    assert inner.tokens[: len(hostile.tokens)] == [visible(text) for text in hostile.tokens]
    assert type(html) is str
    assert hostile._repr_html_() == html


# The terminal


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_terminal_view_fits_and_says_everything_in_plain_text(trace, width):
    text = printed(trace, width)
    assert max(map(len, text.splitlines())) <= width
    assert "answer ' 7' found by rule 'boxed' in token 47" in text
    assert "« 7»" in text
    assert "¹" in text
    for said in ("hubs", "checkpoints", "likeliest paths", "⟩ → ⟨", "█", "layers 2-4"):
        assert said in " ".join(text.split())
    assert "\x1b" not in text


def test_terminal_view_without_colour_keeps_its_marks(trace, monkeypatch):
    coloured = printed(trace, force_terminal=True, color_system="truecolor")
    monkeypatch.setenv("NO_COLOR", "1")
    plain = printed(trace, force_terminal=True, color_system="truecolor")
    assert "48;2;" in coloured
    assert "48;2;" not in plain
    assert "« 7»" in plain


def test_terminal_view_shows_hostile_text_as_text(hostile):
    text = printed(hostile, 200)
    assert "[bold red]" in text
    assert "␛[31m" in text
    assert "⟨U+202E⟩desrever" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", text)
    text.encode()


def test_trace_prints_itself(trace):
    file = StringIO()
    Console(file=file, width=80).print(trace)
    assert file.getvalue() == printed(trace)


# A real browser


@pytest.mark.browser
def test_browser_runs_nothing_from_the_data(visits, hostile):
    browser = visits.open(render_page(hostile), fragment="#t10")
    page = Page(browser.content())
    assert browser.title().startswith("What carried the answer")
    assert page.tokens == [visible(text) for text in hostile.tokens]
    classes = browser.evaluate("document.documentElement.className")
    assert set(classes.split()) == {"inspecting", "selecting"}
    assert len(page.scripts) == 2


# Other scores


def test_other_scores_shade_by_the_top_shares_of_their_own(trace, html):
    scores = {"place": np.arange(len(trace.tokens), dtype=float), "flow": trace.throughput}
    by_place, by_flow = Page(render_page(trace, scores=scores)).data["scores"]
    assert list(by_place[13:]) == sorted(by_place[13:])
    assert by_place[13:].count("5") == np.ceil(HEAT_SHARES[-1] * (len(trace.tokens) - 13))
    assert by_flow == "".join(str(unit.heat) for unit in show(trace).units)
    assert '<select id="score">' not in html


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.zeros(3), r"the score 'x' needs one number of at least 0 for each of the \d+ tokens"),
        (np.full(49, -1.0), r"from -1.0 to 0"),
        (np.full(49, np.nan), r"needs one number"),
    ],
)
def test_invalid_scores_are_refused(trace, values, said):
    assert len(trace.tokens) == 49
    with pytest.raises(ValueError, match=said):
        render_page(trace, scores={"x": values})


@pytest.mark.usefixtures("unchecked")
def test_a_masked_score_is_refused(trace):
    with pytest.raises(TypeError, match="the score 'x' must not be a masked array"):
        render_page(trace, scores={"x": np.ma.ones(len(trace.tokens))})
