"""The page of a group of completions, and the list of a run's pages."""

import json
import os
import re

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, strategies as st

from flowtracer_plugin.credit.weights import token_credit
from flowtracer_plugin.report import (
    CompletionView,
    GroupCredit,
    group_page,
    write_group_page,
    write_index,
)
from flowtracer_plugin.report.display import number, percent, signed
from flowtracer_plugin.report.pages.completion import LEVELS, credit_levels, draw_credit
from flowtracer_plugin.report.pages.group_index import LONG_QUESTION, MOST_ASKED
from flowtracer_plugin.text.visible import visible
from tests.pages import HOSTILE, Page, assert_loads_nothing, assert_only_text

WORDS = ("So", ",", " 3", " +", " 4", " is", "\n", " boxed", " 7", ".")


def make_view(tokens=WORDS, *, reward=1.0, advantage=1.0, **changes):
    """A completion with smooth made-up flow, whose last token but one is the answer."""
    length = len(tokens)
    throughput = np.random.default_rng(length).random(length) ** 3
    answer = np.zeros(length, bool)
    answer[-2:-1] = True
    made = {
        "tokens": tokens,
        "weights": token_credit(throughput, np.ones(length, bool)),
        "throughput": throughput,
        "advantage": advantage,
        "rewards": {"accuracy": reward},
        "answer": answer,
        "competing": np.ones(length, bool),
        "hubs": (3, 0),
    }
    return CompletionView(**{**made, **changes})


def show(*views, prompt="What is 3 + 4?", **options):
    return group_page(prompt, views, **{"title": "a run", "step": 12, **options})


@pytest.fixture
def group():
    return [
        make_view(reward=0.0, advantage=-1.2),
        make_view(reward=1.0, advantage=0.8),
        make_view(WORDS * 3, reward=0.5, advantage=0.4, hubs=(2, 14, 7)),
    ]


@pytest.fixture
def hostile():
    tokens = (*HOSTILE, "c", "7", ".")
    return make_view(
        tokens, rewards={HOSTILE[0]: 1.0, HOSTILE[4]: None, HOSTILE[16]: 0.0}, note=HOSTILE[1]
    )


def columns(html):
    """The HTML of each completion."""
    return re.findall(r'<article class="completion".*?</article>', html, re.DOTALL)


def spans(column):
    """The classes, the hub number and the HTML of each token of a column."""
    found = re.findall(
        r'<span(?: class="([^"]*)")?(?: data-hub="(\d+)")?>(.*?)</span>',
        "".join(re.findall(r'<div class="text" dir="...">.*?</div>', column, re.DOTALL)),
        re.DOTALL,
    )
    return [(frozenset(classes.split()), int(hub or 0), text) for classes, hub, text in found]


def test_the_head_says_how_credit_was_given(group):
    assert "<dt>Scorer</dt>" not in show(*group)
    flow = show(*group, credit=GroupCredit(scorer="flow:sharp", gamma=1.25, share=0.4))
    assert '<b class="value">flow:sharp</b>' in flow
    assert "gamma 1.25; 40.0\N{NO-BREAK SPACE}% of a completion’s tokens are chosen" in flow
    assert "not what gives credit" not in flow
    other = show(*group, credit=GroupCredit(scorer="<entropy>", gamma=1.5, share=0.2))
    assert "not what gives credit here: the scorer is &lt;entropy&gt;." in other


@pytest.mark.parametrize(
    ("scorer", "by_flow"),
    [("flow", True), ("flow:sharp", True), ("flow*entropy", False), ("flowers", False)],
)
def test_a_scorer_is_the_flow_alone_or_not(scorer, by_flow):
    assert GroupCredit(scorer=scorer, gamma=1.5, share=0.4).by_flow == by_flow


def test_a_page_without_flow_says_so():
    silent = make_view(throughput=np.zeros(len(WORDS)), hubs=())
    html = show(silent, credit=GroupCredit(scorer="entropy", gamma=1.5, share=0.4))
    assert "No flow was traced, since the scorer is entropy: all heights are equal." in html
    assert "No flow was traced: all heights are equal." in show(silent)


def test_a_line_beneath_the_ribbon_marks_weights_above_one():
    weights = np.array([1, 1.5, 1, 1.5, 1, 1, 1, 1, 1, 1])
    ribbon = draw_credit(make_view(weights=weights), 1.5, len(WORDS))
    assert re.findall(r"M(\d+) 101", ribbon.weighted) == ["1", "3"]
    assert f'<path class="weighted" d="{ribbon.weighted}"/>' in show(make_view(weights=weights))
    assert 'class="weighted"' not in show(make_view(weights=np.ones(len(WORDS))))


def test_numbers_are_not_called_hubs(group):
    html = show(*group).partition("<main")[2].partition('id="data"')[0]
    assert "the tokens with the most flow, 1 the most" in html
    assert not re.search(r"\bhubs?\b(?!=)", re.sub(r"<[^>]*>", " ", html))


# Safety


def test_page_holds_every_token_of_the_group_best_first(group):
    shown = [text.replace("\n", "⏎") for text in (*WORDS, *WORDS * 3, *WORDS)]
    assert Page(show(*group)).tokens == shown


def test_hostile_text_becomes_text_and_nothing_else(group, hostile):
    harmless = Page(show(*group, make_view(note="a note", rewards={"b": None})))
    html = show(hostile, prompt=HOSTILE[1] + HOSTILE[16], title=HOSTILE[2])
    page = Page(html)
    assert_only_text(page, harmless)
    assert len(page.scripts) == 3
    assert page.scripts[-1] == harmless.scripts[-1]
    assert page.tokens == [visible(text) for text in hostile.tokens]
    assert page.data[0]["texts"] == list(hostile.tokens)
    for data in page.scripts[:2]:
        assert re.search(r"[<>&\u2028\u2029]|[^\x00-\x7f]", data) is None
    html.encode()


def test_page_and_list_load_nothing_and_allow_their_own_script_and_style_only(group, tmp_path):
    write_group_page(tmp_path / "a.html", "?", group, title="a", step=1)
    write_group_page(tmp_path / "b.html", "?", group, title="a", step=2)
    for path in (tmp_path / "a.html", write_index(tmp_path)):
        assert_loads_nothing(path.read_text("utf-8"))


def test_page_is_deterministic(group):
    assert show(*group) == show(*group)


# What is shown


def test_completions_are_ordered_by_reward_then_by_advantage():
    group = [
        make_view(rewards={"a": None, "b": None}, note="none"),
        make_view(rewards={"a": 0.5, "b": 0.5}, advantage=0.1, note="second"),
        make_view(rewards={"a": 1.0, "b": None}, advantage=0.2, note="first"),
        make_view(rewards={"a": float("nan"), "b": -3.0}, note="third"),
    ]
    html = show(*group)
    assert re.findall(r'<p class="note">(.*?)</p>', html) == ["first", "second", "third", "none"]
    assert [view.reward for view in group] == [None, 1.0, 1.0, -3.0]
    third = columns(html)[2]
    assert "<dt>a</dt><dd>–</dd>" in third
    assert "<dt>b</dt><dd>−3</dd>" in third


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20))
def test_steps_of_colour_are_thirds_of_the_largest(credit):
    largest = max(map(abs, credit)) or 1.0
    slow = [
        next(step for step in range(4) if 3 * abs(value) / largest <= step + 5e-7)
        * (1 if value > 0 else -1)
        for value in credit
    ]
    assert credit_levels(np.array(credit), largest).tolist() == slow
    assert LEVELS == 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_plain_credit_is_a_step_below_the_chosen_tokens(dtype):
    advantage = float(np.float32(0.9354))
    weights = np.array([1, 1.5, 1, 1.5], dtype)
    group = [
        make_view(
            ("a", "b", "c", "d"),
            weights=weights,
            throughput=weights,
            advantage=sign * advantage,
            hubs=(),
        )
        for sign in (1, -1)
    ]
    up, down = map(spans, columns(show(*group)))
    assert [classes & {"more", "p2", "p3"} for classes, _, _ in up] == [
        {"p2"},
        {"p3", "more"},
        {"p2"},
        {"p3", "more"},
    ]
    assert [classes & {"n2", "n3"} for classes, _, _ in down] == [{"n2"}, {"n3"}, {"n2"}, {"n3"}]


def test_colours_are_relative_to_the_largest_of_the_page_and_the_legend_names_them(group):
    html = show(*group)
    ranges = ["−1.8 to −1.2", "−1.2 to −0.6", "−0.6 to 0", "0", "0 to +0.6", "+0.6 to +1.2"]
    section = html.split('id="completions"')[1]
    assert re.findall(r'swatch \w+">([^<]*)<', section) == [*ranges, "+1.2 to +1.8"]
    # 0.8 and 1.2, 0.4 and 0.6, −1.2 and −1.8
    for column, levels in zip(columns(html), [{"p2"}, {"p1"}, {"n2", "n3"}], strict=True):
        found = {name for classes, _, _ in spans(column) for name in classes}
        assert {name for name in found if re.fullmatch(r"[pn]\d", name)} == levels


def test_marks_survive_without_colour():
    tokens = ("a", "b", "c", "d", "e", "f")
    answer, competing = np.zeros(6, bool), np.ones(6, bool)
    answer[3:5], competing[1:3] = True, False
    weights = np.array([1.5, 1.5, 1.0, 1.5, 1.0, 0.5])
    view = make_view(tokens, weights=weights, answer=answer, competing=competing, hubs=(5, 0))
    (column,) = columns(show(view))
    shown = spans(column)
    names = ("more", "answer", "tool")
    marks = {name: [at for at, (c, _, _) in enumerate(shown) if name in c] for name in names}
    assert marks == {"more": [0, 3], "answer": [3, 4], "tool": [1, 2]}
    assert [hub for _, hub, _ in shown] == [2, 0, 0, 0, 0, 1]
    assert all(classes == {"tool"} for classes, _, _ in shown[1:3])
    assert '<dd><q class="value">de</q></dd>' in column
    assert "<dt>weight above 1</dt><dd>2</dd>" in column
    assert "no credit</li>" in show(view)
    assert "no credit</li>" not in show(make_view())


def test_a_tools_tokens_do_not_set_the_scale():
    weights, competing = np.array([1.0, 9.0, 1.0]), np.array([True, False, True])
    view = make_view(
        ("a", "b", "c"), weights=weights, throughput=weights, competing=competing, hubs=()
    )
    assert "+0.667 to +1<" in show(view)


def test_tokens_that_spell_one_character_are_one_piece():
    view = make_view(
        ("a", "", "", "€", "b", ""),
        weights=np.array([1, 1, 1.5, 1, 1, 1]),
        throughput=np.array([0.1, 0.2, 0.3, 0.1, 0.9, 0.0]),
        answer=np.array([0, 0, 0, 1, 0, 0], bool),
        hubs=(2, 4),
    )
    html = show(view)
    (column,) = columns(html)
    assert [(hub, text) for _, hub, text in spans(column)] == [(0, "a"), (1, "€"), (2, "b")]
    assert {"more", "answer"} <= spans(column)[1][0]
    (data,) = Page(html).data
    assert data == {
        "advantage": 1.0,
        "first": [0, 1, 4],
        "last": [0, 3, 5],
        "texts": ["a", "€", "b"],
        "weights": [1, 1.5, 1],
        "throughput": [0.1, 0.3, 0.9],
    }


def test_line_breaks_are_seen():
    view = make_view(("a\n\nb", "\n", "c"), hubs=())
    (column,) = columns(show(view))
    assert [text for *_, text in spans(column)] == ["a<i>⏎</i>\n<i>⏎</i>\nb", "<i>⏎</i>", "c"]


def test_page_says_what_was_found(group):
    html = show(*group, make_view(answer=np.zeros(10, bool), note="no answer found: plain credit"))
    for said in (
        "FlowTracer · step 12",
        "<title>a run · step 12 · FlowTracer</title>",
        "0 to 1</b>",
        "mean 0.625",
        "−1.2 to +1</b>",
        "3 of 4",
        "10–30 tokens",
        "What is 3 + 4?",
        "▲&nbsp;+0.8",
        "▼&nbsp;−1.2",
        "not found",
        '<p class="note">no answer found: plain credit</p>',
        '<span class="said"><q class="value">7</q></span>',
    ):
        assert said in html


def test_the_question_stands_above_the_prompt_as_the_model_reads_it():
    asked = "What is 3 + 4?"
    html = show(make_view(), prompt=f"<|user|>{asked}<|end|>", question=asked)
    assert f'<p class="question value" dir="auto">{asked}</p>' in html
    assert '<details class="prompt">' in html
    assert 'class="question' not in show(make_view(), prompt=f"{asked}\n", question=asked)


def test_a_group_without_advantage_says_that_it_teaches_nothing():
    html = show(make_view(advantage=0.0), make_view(advantage=-0.0))
    assert "nothing is learned from this group" in html
    assert "swatch" not in html.split("</style>")[1]
    assert not re.search(r'class="[^"]*\b[pn]\d', html)


def test_page_survives_the_smallest_groups():
    nothing = np.zeros(0)
    empty = make_view(
        (),
        weights=nothing,
        throughput=nothing,
        rewards={},
        answer=nothing.astype(bool),
        competing=nothing.astype(bool),
        hubs=(),
    )
    assert "no tokens" in show(empty)
    html = show(empty, make_view(("", ""), hubs=()), make_view(("x",), hubs=(0,)), prompt="")
    assert Page(html).tokens == ["∅", "x"]
    assert "no function gave one" in show(empty)


# Size


@pytest.mark.parametrize(
    ("most", "shown", "gap"),
    [(30, None, None), (11, [*range(6), *range(25, 30)], (6, 24)), (1, [0], (1, 29))],
)
def test_long_completions_are_cut_in_the_middle(most, shown, gap):
    tokens = tuple(f" {index}" for index in range(30))
    html = show(make_view(tokens), max_tokens=most)
    kept = range(30) if shown is None else shown
    assert Page(html).tokens == [tokens[index] for index in kept]
    said = re.findall(r"showing (\d+) of (\d+) tokens; (\d+) to (\d+) are left out", html)
    assert said == ([] if gap is None else [(str(len(kept)), "30", *map(str, gap))])
    (data,) = Page(html).data
    assert data["texts"] == [tokens[index] for index in kept]
    if shown and len(shown) > 1:
        assert data["first"] == data["last"] == shown


def test_a_long_prompt_is_cut():
    html = show(make_view(), prompt="a" * 15_000 + "b" * 15_000)
    assert "showing 20,000 of 30,000 characters" in html
    assert '<details class="prompt">' in html
    assert '<details class="prompt" open>' in show(make_view())


def test_eight_completions_of_a_thousand_tokens_are_below_a_megabyte():
    tokens = tuple(f" tok{index % 97}" for index in range(1000))
    group = [make_view(tokens, advantage=place - 3.3) for place in range(8)]
    assert len(show(*group).encode()) < 700_000
    long = [make_view(tokens * 20, advantage=place - 3.3) for place in range(2)]
    assert len(show(*long).encode()) < 545_000


# The ribbon


@given(st.integers(1, 1300), st.integers(0, 200), st.integers(0, 5))
def test_each_bar_is_the_token_of_its_bin_with_the_most_flow(length, more, seed):
    rng = np.random.default_rng(seed)
    throughput = rng.random(length) * (rng.random(length) < 0.7)
    view = make_view(("a",) * length, throughput=throughput, hubs=(length - 1,))
    ribbon = draw_credit(view, 1.5, length + more)
    assert ribbon.width == min(length + more, 480)
    found = {
        int(bar): (int(height), style)
        for style, path in ribbon.bars.items()
        for bar, height in re.findall(r"M(\d+) 100v-(\d+)h1V100z", path)
    }
    bars = min(-(-length * ribbon.width // (length + more)), length)
    assert sorted(found) == list(range(bars))
    bins = [[] for _ in range(bars)]
    edges = [bar * length // bars for bar in range(bars)] + [length]
    highest = max(throughput[~view.answer], default=0.0) or 1.0
    for bar in range(bars):
        bins[bar] = range(edges[bar], edges[bar + 1])
        best = max(bins[bar], key=lambda token: throughput[token])
        height = round(100 * min(throughput[best] / highest, 1) ** 0.5)
        assert found[bar] == (max(height, 12), "p3" if view.weights[best] > 1 else "p2")
    answers = {int(bar) for bar in re.findall(r"M(\d+) 106", ribbon.answer)}
    assert answers == {bar for bar in range(bars) if any(view.answer[token] for token in bins[bar])}
    assert ribbon.hubs == (round((length - 0.5) * bars / length, 2),)


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": np.ones(9)}, r"wanted weights of 10 tokens, found the shape \(9,\)"),
        ({"answer": np.zeros((2, 5), bool)}, r"answer of 10 tokens, found the shape \(2, 5\)"),
        ({"weights": np.full(10, np.nan)}, "weights must be finite and not negative"),
        ({"throughput": np.full(10, -1.0)}, "throughput must be finite and not negative"),
        ({"advantage": float("nan")}, "the advantage must be finite, got nan"),
        ({"hubs": (1, 10)}, r"different tokens from 0 to 9, got \[1, 10\]"),
        ({"hubs": (1, 1)}, r"different tokens from 0 to 9, got \[1, 1\]"),
    ],
)
def test_invalid_completions_are_refused(changes, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it refuses shapes first
    with pytest.raises(ValueError, match=message):
        make_view(**changes)


def test_empty_groups_and_limits_below_one_are_refused():
    with pytest.raises(ValueError, match="at least one completion, found none"):
        show()
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        show(make_view(), max_tokens=0)


def test_numbers_have_three_digits_and_fit():
    shown = {1.2345: "1.23", -0.0001234: "−1.23e-4", 12345.0: "12300", 0.0: "0", 0.001: "0.001"}
    assert {value: number(value) for value in shown} == shown
    assert [signed(value) for value in (0.5, -0.5, 0.0, -0.0)] == ["+0.5", "−0.5", "0", "0"]


# Files


def test_pages_are_written_whole(group, tmp_path):
    path = tmp_path / "new" / "step-12.html"
    assert write_group_page(str(path), "What is 3 + 4?", group, title="a run", step=12) == path
    assert path.read_text("utf-8") == show(*group)
    write_group_page(path, "other", group, title="a run", step=13)
    assert "step 13" in path.read_text("utf-8")
    with pytest.raises(ValueError, match="found none"):
        write_group_page(path, "other", [], title="a run", step=14)
    assert "step 13" in path.read_text("utf-8")
    with pytest.raises(IsADirectoryError):
        write_group_page(tmp_path, "other", group, title="a run", step=14)
    assert [file.name for file in path.parent.iterdir()] == ["step-12.html"]


def rows(html):
    """The link, the excerpt and the numbers of each row of the list."""
    return [
        (
            *re.search(r'<a href="([^"]*)"[^>]*>([^<]*)</a>', row).groups(),
            re.search(r'<(?:span class="asked value"|summary class="value")>([^<]*)<', row)[1],
            re.findall(r"<td(?: class=\"silent\")?>([^<]*)</td>", row),
        )
        for row in re.findall(r"<tr>\s*<th scope=\"row\">.*?</tr>", html, re.DOTALL)
    ]


def test_list_shows_the_pages_of_a_run_newest_first(group, hostile, tmp_path):
    silent = [make_view(reward=1.0, advantage=0.0, answer=np.zeros(10, bool))] * 2
    write_group_page(tmp_path / "step-2.html", "What is\n3 + 4?", group, title="a", step=2)
    write_group_page(tmp_path / "step 10 & more.html", "b", silent, title="a", step=10)
    write_group_page(tmp_path / "z.html", HOSTILE[2] * 9, [hostile], title=HOSTILE[4], step=1)
    lone = make_view(rewards={"a": None}, advantage=0.5)
    write_group_page(tmp_path / "none.html", "c", [lone], title="a", step=1)
    path = write_index(str(tmp_path), title=HOSTILE[0])
    assert path == tmp_path / "index.html"
    first = path.read_text("utf-8")
    shown = rows(first)
    assert [row[:2] for row in shown] == [
        ("step%2010%20%26%20more.html", "step 10"),
        ("step-2.html", "step 2"),
        ("none.html", "step 1"),
        ("z.html", "step 1"),
    ]
    assert shown[1][2:] == ("What is 3 + 4?", ["0", "0.5", "1", "0.8", "3/3"])
    assert shown[0][3] == ["1", "1", "1", "0", "0/2"]
    assert shown[2][3] == ["–", "–", "–", "0.5", "1/1"]
    assert "1 of 4 teach nothing" in first
    assert {tag for tag, _ in Page(first).tags}.isdisjoint({"img", "script"})
    # the list does not list itself
    assert write_index(tmp_path, title=HOSTILE[0]).read_text("utf-8") == first


def test_the_list_shows_questions_in_full_and_folds_long_ones(tmp_path):
    asked = " ".join(f"word-{place}" for place in range(900))
    for step, question in enumerate((asked[:LONG_QUESTION], asked)):
        write_group_page(
            tmp_path / f"{step}.html", "<|user|>" + question + "<|end|>", [make_view()],
            title="a", step=step, question=question,
        )  # fmt: skip
    page = write_index(tmp_path).read_text("utf-8")
    assert f'<span class="asked value">{asked[:LONG_QUESTION]}</span>' in page
    cut = asked[: MOST_ASKED - 1] + "…"
    assert f'<p class="value">{cut}</p></details>' in page
    assert page.count("<details") == 1
    assert "&lt;|user|&gt;" not in page


def test_the_list_leaves_out_other_files(group, tmp_path):
    assert "No group has been written here yet" in write_index(tmp_path / "new").read_text("utf-8")
    write_group_page(tmp_path / "a.html", "?", group, title="a", step=1)
    (tmp_path / "foreign.html").write_text("<p>hello</p>")
    (tmp_path / "folder.html").mkdir()
    start = '<script type="application/json" id="summary">'
    (tmp_path / "damaged.html").write_text(start + "{</script>")
    (tmp_path / "other.html").write_text(start + '{"step": 3}</script>')
    assert [row[0] for row in rows(write_index(tmp_path).read_text("utf-8"))] == ["a.html"]


def test_damaged_pages_are_left_out_and_named_in_the_log(group, tmp_path, caplog):
    good = write_group_page(tmp_path / "a.html", "?", group, title="a", step=1).read_text("utf-8")
    (summary,) = re.findall(r'id="summary">(.*?)</script>', good)
    held = json.loads(summary)
    changes = [
        *({"step": step} for step in ("1", None, 1.5, [1], True, 10**400)),
        *({"best": reward} for reward in ("1", [1], float("nan"), float("inf"))),
        *({"spread": spread} for spread in (None, "0.5", {})),
        *({name: 1e308} for name in ("best", "mean", "spread") * 2),  # their sums are infinite
        {"worst": -1e308},
        *({name: 3} for name in ("title", "prompt")),
        *({name: "3"} for name in ("completions", "answers")),
        {"unheard_of": 1},
    ]
    texts = [json.dumps(held | change) for change in changes]
    texts += [summary.replace('"best":', '"best":1e999,"b":'), "[" * 9000, "null", "[]", "", "{"]
    for place, text in enumerate(texts):
        page = tmp_path / f"damaged-{place}.html"
        page.write_text(good.replace(summary, text), "utf-8")
    (tmp_path / "bytes.html").write_bytes(good.encode().replace(summary.encode(), b'{"a": "\xff"}'))
    assert [row[0] for row in rows(write_index(tmp_path).read_text("utf-8"))] == ["a.html"]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(texts) + 1
    for name in ("damaged-0.html", f"damaged-{len(texts) - 1}.html", "bytes.html"):
        assert any(f"{name}': " in one for one in said), name


def test_a_page_may_have_a_name_that_is_no_text(group, tmp_path):
    for name in (b"a\xff.html", "ü.html".encode(), b"a:b?.html"):
        path = tmp_path / os.fsdecode(name)
        write_group_page(path, os.fsdecode(name), group, title=os.fsdecode(name), step=1)
    found = [row[0] for row in rows(write_index(tmp_path).read_text("utf-8"))]
    assert sorted(found) == ["%C3%BC.html", "a%3Ab%3F.html", "a%FF.html"]


def test_the_summary_is_in_the_part_that_the_list_reads(tmp_path):
    view, text = make_view(), "\ud83d" * 30_000
    write_group_page(tmp_path / "a.html", text, [view], title=text, step=1)
    assert len(rows(write_index(tmp_path).read_text("utf-8"))) == 1


# A real browser


@pytest.mark.browser
def test_browser_runs_nothing_from_the_data(visits, hostile, tmp_path):
    page = visits.open(show(hostile, prompt=HOSTILE[1], title=HOSTILE[2]))
    assert page.title().endswith("· step 12 · FlowTracer")
    assert Page(page.content()).tokens == [visible(text) for text in hostile.tokens]
    for step in (1, 2):
        path = tmp_path / "run" / f"{step}.html"
        write_group_page(path, HOSTILE[1], [hostile], title=HOSTILE[2], step=step)
    index = visits.visit(write_index(tmp_path / "run", title=HOSTILE[0]))
    assert len(rows(index.content())) == 2


@pytest.mark.browser
@pytest.mark.parametrize(("width", "fitting"), [(600, 1), (1280, 4)])
def test_browser_page_answers_pointer_and_keyboard(visits, width, fitting):
    competing = np.ones(10, bool)
    competing[1] = False
    group = [make_view(advantage=-0.5, hubs=(5,)), make_view(competing=competing, reward=0.0)]
    wide = make_view(("x" * 400, "\n", "y"), reward=-2.0, hubs=())
    page = visits.open(show(*group, make_view(reward=-1.0), wide), width=width)
    units, tip = page.locator(".completion .text > span"), page.locator("#tip")

    def said():
        assert tip.is_visible()
        return page.locator("#token").text_content(), page.locator("#where").text_content()

    def numbers():
        return page.locator("#numbers dd").all_text_contents()

    assert tip.is_hidden()
    units.nth(8).dispatch_event("pointermove", {"bubbles": True})
    assert said() == ('" 7"', "completion 1 · token 8 · answer")
    weight, flow = group[0].weights[8], group[0].throughput[8]
    assert numbers() == [f"× {weight:g}", percent(flow), signed(-0.5 * weight)]
    page.locator("body").dispatch_event("pointermove")
    assert tip.is_hidden()
    units.nth(1).click()
    assert said() == ('","', "completion 1 · token 1")
    page.keyboard.press("ArrowRight")
    assert said() == ('" 3"', "completion 1 · token 2")
    page.keyboard.press("j")
    assert said()[1] == "completion 1 · token 5 · number 1 by flow"
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    units.nth(11).click()
    assert said()[1] == "completion 2 · token 1 · a tool wrote it: no credit"
    assert numbers()[::2] == ["–", "0"]
    units.last.click()
    said()
    box = tip.bounding_box()
    assert box["x"] >= 0
    assert box["y"] >= 0
    assert box["x"] + box["width"] <= width
    assert box["y"] + box["height"] <= 900
    columns = "getComputedStyle(document.querySelector('.columns')).gridTemplateColumns"
    assert len(page.evaluate(columns).split()) == fitting
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
