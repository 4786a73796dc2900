"""The page of an evaluation."""

import base64
import hashlib
import re
from html import unescape

import numpy as np
import pytest

from flowtracer_plugin.bulk.examples import Example
from flowtracer_plugin.evaluation import render_evaluation, write_evaluation
from flowtracer_plugin.evaluation.outcomes import Evaluation, Outcome, document
from flowtracer_plugin.evaluation.summary import Interval
from flowtracer_plugin.evaluation.tables import cell, counts, tables
from tests.pages import HOSTILE, Page

HOP = "attention:decision"
SCORES = ("flow", HOP, "entropy", "random")
SETTINGS = {
    "model": "tiny",
    "data": "questions.jsonl",
    "dtype": "torch.float32",
    "layers": [1, 2],
    "answer": "auto",
    "setting": "given",
    "scores": list(SCORES[:-1]),
    "options": {"rows": "future", "percents": [5, 20], "gaps": [0, 5], "draws": 2, "seed": 0},
}


def effects(rng, shares=2):
    made = []
    for gap in (0, 5):
        for place, score in enumerate(SCORES):
            for side in ("top", "bottom") if score != "random" else ("top",):
                drop = (rng.random(shares) * (4 - place) * (side == "top")).tolist()
                made.append({
                    "gap": gap, "score": score, "side": side, "drop": drop,
                    "flipped": [0.5] * shares, "divergence": [0.1] * shares,
                })  # fmt: skip
    return made


def outcome(row, rng, shares=2, **changes):
    measured = {
        "knock_out": {
            "answer_tokens": 2, "log_prob": -0.25, "predicted": True, "candidates": [40, 35],
            "effects": effects(rng, shares),
        },
        "edges": [{"percent": 5, "backbone": float(rng.random()), "others": 0.1}],
    }  # fmt: skip
    return Outcome(row=row, digest=str(row), measured=measured, correct=row % 2 == 0, **changes)


def evaluation(prompt="How many apples?", detail="none", count=6, shares=2, asked=(), **changes):
    rng = np.random.default_rng(7)
    outcomes = [outcome(row, rng, shares) for row in range(count)]
    outcomes.append(
        Outcome(row=count, digest="x", left_out="no_answer", detail=detail, measured=None)
    )
    prompts = [Example(row=row, prompt=prompt) for row in range(count + 1)]
    settings = {**SETTINGS, **changes}
    return Evaluation(settings=settings, examples=prompts, outcomes=outcomes, asked=asked)


def test_hostile_text_becomes_text_and_nothing_else():
    harmless = Page(render_evaluation(evaluation()))
    known = {(tag, name) for tag, attrs in harmless.tags for name in (*attrs, None)}
    for text in HOSTILE:
        html = render_evaluation(evaluation(prompt=text or " ", detail=text, model=text, data=text))
        page = Page(html)
        assert {(tag, name) for tag, attrs in page.tags for name in (*attrs, None)} <= known
        assert page.scripts == harmless.scripts
        html.encode()


def test_page_loads_nothing_and_allows_its_own_script_and_style_only():
    html = render_evaluation(evaluation())
    page = Page(html)
    assert "http" not in html.replace("http-equiv", "")
    assert not any({"src", "style"} & set(attrs) for _, attrs in page.tags)
    (policy,) = [attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs]
    assert policy.startswith("default-src 'none'")
    for content in (page.styles[0], page.scripts[-1]):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_page_is_deterministic_and_written_whole(tmp_path):
    path = tmp_path / "new" / "page.html"
    assert write_evaluation(evaluation(), str(path)) == path
    assert path.read_text("utf-8") == render_evaluation(evaluation())
    with pytest.raises(IsADirectoryError):
        write_evaluation(evaluation(), tmp_path)


def test_every_number_of_the_tables_is_there():
    made = evaluation()
    html = unescape(render_evaluation(made))
    assert [table.name for table in tables(made)] == ["knock-outs-0", "knock-outs-5", "edges"]
    for table in tables(made):
        block = re.search(rf'<table id="{table.name}">.*?</table>', html, re.DOTALL)[0]
        found = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", re.sub("</?small>", "", block))
        assert found == [cell(value) for row in table.rows for value in row]


def test_bars_are_as_long_as_the_drops_and_the_largest_gap_is_drawn():
    made = evaluation()
    html = render_evaluation(made)
    tops = [one for one in made.summary.knock_out if one.gap == 5 and one.side == "top"]
    tops.sort(key=lambda one: -one.aopc.mean)
    names = re.findall(r'<span class="name">(.*?)</span>', html)
    assert names == [one.score for one in tops]
    widths = [float(w) for w in re.findall(r'class="bar" y="5" width="(.*?)"', html)]
    most = max(one.aopc.high for one in tops)
    assert widths == pytest.approx([1000 * one.aopc.mean / most for one in tops], abs=0.06)
    assert "the 5 tokens right before the answer are spared" in html


def test_the_page_says_how_many_examples_count_and_why_others_do_not():
    made = evaluation()
    assert list(counts(made)) == [
        "6 of 7 examples measured, tiny",
        "1 left out: no answer was found in the response, as in row 6: none",
        "3 of the 6 answers are right",
    ]
    html = render_evaluation(made)
    assert "6 of 7" in html
    assert "1 left out: no answer was found" in html


def test_the_scores_that_were_asked_for_stand_out():
    made = evaluation(asked=("entropy",))
    assert made.added == ("flow", HOP)
    assert "flow and attention:decision are added for comparison" in list(counts(made))
    html = render_evaluation(made)
    kinds = re.findall(r'<li class="(.*?)">\s*<span class="name">(.*?)</span>', html)
    assert dict(map(reversed, kinds)) == {
        "entropy": "asked hue0",
        "flow": "added flow",
        HOP: "added hop",
        "random": "chance",
    }
    assert "Flow and attention:decision are added to those that were asked for" in html
    heads = re.findall(r'<th scope="col"[^>]*><button type="button">(.*?)</button>', html)
    assert heads[-4:] == ["entropy", "flow", "one hop", "random"]
    asked = evaluation(asked=("flow", "entropy"))
    assert asked.added == (HOP,)
    assert "attention:decision is added for comparison" in list(counts(asked))
    assert evaluation().added == ()


def test_labels_at_the_ends_of_lines_are_apart():
    html = render_evaluation(evaluation(asked=("entropy",)))
    places = [float(one) for one in re.findall(r'<text class="[^"]*" x="728" y="(.*?)"', html)]
    assert len(places) == 4
    assert np.diff(sorted(places)).min() >= 14 - 1e-9
    assert max(places) <= 304


def test_a_folder_is_named_by_its_last_part():
    html = render_evaluation(evaluation(model="/some/where/Qwen3", data="/far/away/rows.jsonl"))
    assert "Qwen3: what do its answers depend on?" in html
    assert "/some/where" not in html.partition("<body>")[2].partition('id="reading"')[0]
    assert "/far/away" not in html


def test_an_evaluation_of_nothing_has_a_page_too():
    made = evaluation(count=0)
    html = render_evaluation(made)
    assert "0 of 1" in html
    assert 'id="scores"' not in html
    assert document(made)["measured"] == 0


def test_one_share_has_no_lines_over_shares():
    options = {**SETTINGS["options"], "percents": [5]}
    made = evaluation(shares=1, options=options)
    assert 'id="shares"' not in render_evaluation(made)
    assert 'id="shares"' in render_evaluation(evaluation())


def test_the_heights_of_the_shares_are_round_numbers():
    html = render_evaluation(made := evaluation())
    labels = [float(one) for one in re.findall(r'text-anchor="end">(.*?)</text>', html)]
    tops = [one for one in made.summary.knock_out if (one.gap, one.side) == (5, "top")]
    most = max(interval.mean for one in tops for interval in one.drop)
    assert labels == [0, 1, 2, 3]
    assert labels[-2] < most <= labels[-1]
    (lowest,) = re.findall(r'd="M0 (\S+)H720"/><text [^>]*>0</text>', html)
    assert float(lowest) == 300


def test_zero_has_no_sign():
    made = evaluation()
    for one in made.outcomes[:-1]:
        one.measured["knock_out"]["log_prob"] = -0.0004
        for effect in one.measured["knock_out"]["effects"]:
            effect["drop"] = [-0.0004, -0.0003]
    html = render_evaluation(made)
    assert "0.00" in html
    assert not re.search(r"[-−]0\.0+\b", html.partition("<body>")[2])


def test_columns_of_nothing_are_left_out():
    again = {"score": "flow", "side": "top", "answers": [], "changed": 0.5, "reversed": None}
    made = evaluation(protocols=["regeneration"])
    for one in made.outcomes[:-1]:
        one.measured["regeneration"] = [dict(again), dict(again, score="random")]
    heads = {table.name: table.heads for table in tables(made)}
    assert heads["regeneration"] == ("score", "side", "changed", "− random")
    for one in made.outcomes[:-1]:
        one.measured["regeneration"][0]["reversed"] = 0.25
        one.measured["regeneration"][1]["reversed"] = 0.0
    known = Evaluation(settings=made.settings, examples=made.examples, outcomes=made.outcomes)
    heads = {table.name: table.heads for table in tables(known)}
    assert heads["regeneration"] == ("score", "side", "changed", "reversed", "− random")


def test_cells_say_means_and_intervals():
    assert cell(None) == ""
    assert cell("5 %") == "5 %"
    assert cell(Interval(mean=1.234, low=None, high=None)) == "1.23"
    assert cell(Interval(mean=-0.001, low=-1.0, high=2.0)) == "0.00 (-1.00…2.00)"


WIDER = """[...document.querySelectorAll(".scroller, .chart span")]
    .filter((one) => one.scrollWidth > one.clientWidth && one.clientWidth)
    .map((one) => one.textContent)"""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280, 2560])
def test_the_page_in_a_browser(visits, scheme, width):
    from tests.browsing import violations

    options = {**SETTINGS["options"], "percents": [1, 2, 5, 10, 20]}
    html = render_evaluation(evaluation(shares=5, options=options))
    page = visits.open(html, width=width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width >= 1280:  # no part of it is cut off either
        assert page.evaluate(WIDER) == []
    assert violations(page) == []
    assert visits.said == []
    assert visits.requested == []


@pytest.mark.browser
def test_tables_are_sorted_by_their_headings(visits):
    page = visits.open(render_evaluation(evaluation()))
    page.click("#examples-table th:nth-child(5) button")
    shown = [
        float(one) for one in page.locator("#examples-table td:nth-child(5)").all_inner_texts()
    ]
    assert shown == sorted(shown, reverse=True)
    page.click("#knock-outs-5 th:first-child button")
    names = page.locator("#knock-outs-5 tbody th").all_inner_texts()
    assert names == sorted(names, reverse=True)
