"""The sentences that say what carried an answer."""

import dataclasses
import io
import re

import numpy as np
import pytest
from rich.console import Console

import flowtracer_plugin as ft
from flowtracer_plugin.flow.backbone import FlowPath
from flowtracer_plugin.report import carried
from flowtracer_plugin.report.carried import (
    carriers,
    drop_of,
    leading_steps,
    most_missed,
    nats,
)
from flowtracer_plugin.report.display import model_label, show
from flowtracer_plugin.report.pages.trace_page import render_page
from flowtracer_plugin.report.terminal import render_trace
from tests.tiny import PROMPT, RESPONSE, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def trace():
    tracer = ft.wrap(tiny_llama(), tiny_tokenizer(chat=True))
    return tracer.trace([{"role": "user", "content": PROMPT}], RESPONSE)


def test_carriers_are_the_told_tokens_with_the_most_flow(trace):
    spans, told = trace.spans, []
    for token, (text, region) in enumerate(zip(trace.tokens, spans.regions, strict=True)):
        if region in ("question", "response") and text.strip() and not spans.target[token]:
            told.append(token)
    best = sorted(told, key=lambda token: -trace.throughput[token])[:5]
    found = carriers(show(trace), {best[1]: 0.25})
    assert [one.unit.first for one in found] == best
    assert [one.drop for one in found] == [None, 0.25, None, None, None]


def test_steps_leave_out_the_template_and_the_answers_own(trace):
    steps = leading_steps(show(trace))
    assert steps
    inflow = [one.inflow for one in steps]
    assert inflow == sorted(inflow, reverse=True)
    for row in (one.row for one in steps):
        assert "user" not in row.text
        assert not trace.spans.answer[row.step.start : row.step.stop].any()


def test_steps_of_a_chat_may_be_what_others_than_the_user_said(monkeypatch):
    tracer = ft.wrap(tiny_llama(), tiny_tokenizer(chat=True))
    talk = [
        {"role": "system", "content": "Tom had 3."},
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": "He ate one. How many?"},
        {"role": "user", "content": "apples?"},
    ]
    monkeypatch.setattr(carried, "MOST_STEPS", 99)
    shown = show(tracer.trace(talk, RESPONSE))
    texts = [re.sub(r"<.*?>", "", one.row.text) for one in leading_steps(shown)]
    assert {"Tom had 3.", "He ate one."} < set(texts)
    assert any("<|assistant|>" in step.text for step in shown.steps.steps)
    assert all(texts)


def test_the_page_and_the_terminal_say_it(trace):
    first = carriers(show(trace))[0].unit
    drops = {first.first: 1.234}
    page, file = render_page(trace, drops), io.StringIO()
    Console(file=file, width=500).print(render_trace(trace, drops))
    seen = file.getvalue()
    assert "Most flow passes through" in page
    assert "(1.23 nats lost)" in page
    assert f"most flow passes through ⟨{first.inline.strip()}⟩" in seen
    assert "(1.23 nats lost)" in seen
    assert "nats" not in render_page(trace).partition("<main")[0].partition("<header")[2]


def test_the_token_that_the_answer_hangs_on_comes_first(trace):
    drops = {9: 0.02, 12: 0.38, 14: -0.1}
    unit = show(trace).unit_of(12)
    found = most_missed(show(trace), drops)
    assert (found.unit, found.drop, found.measured, found.matters) == (unit, 0.38, 3, True)
    page, seen = said(trace, drops)
    assert "Of the 3 tokens measured, the answer hangs most on" in page
    assert page.index("hangs most on") < page.index("Most flow passes")
    assert f"answer hangs most on ⟨{unit.word}⟩: 0.38 nats are lost without it" in seen


def test_no_token_matters_alone_below_the_least_drop(trace):
    page, seen = said(trace, {9: 0.02})
    for text in (page, seen):
        assert "one of the 1 token measured matters alone" in text
        assert "less than 0.05 nats are lost" in text


def test_without_measured_drops_nothing_is_said_of_them(trace):
    assert most_missed(show(trace), None) is None
    assert "measured" not in said(trace)[1]


def said(trace, drops=None):
    """What the head of the page and the terminal say."""
    file = io.StringIO()
    Console(file=file, width=500).print(render_trace(trace, drops))
    return " ".join(render_page(trace, drops).split()), file.getvalue()


def starting(trace, *, first, paths=()):
    """The trace, with another share of the unit injected at its first token."""
    source = trace.backbone.source.copy()
    source[0] = first
    backbone = dataclasses.replace(trace.backbone, source=source, paths=paths)
    return dataclasses.replace(trace, attention=None, streamed=backbone)


@pytest.fixture(scope="module")
def plain_trace():
    """A trace whose first token is a word."""
    return ft.wrap(tiny_llama(), tiny_tokenizer()).trace(PROMPT, RESPONSE)


def test_what_begins_at_the_first_token_is_no_reason_for_a_step_to_lead(plain_trace):
    plain = leading_steps(show(starting(plain_trace, first=0.0)))
    much = starting(plain_trace, first=0.9)
    steps = show(much).steps.steps
    assert max(steps, key=lambda step: step.inflow * (step.region != "answer")) is steps[0]
    lead = leading_steps(show(much))
    assert [one.row.number for one in lead] == [one.row.number for one in plain]
    assert [one.inflow for one in lead] == pytest.approx([one.inflow for one in plain])
    noted = [one.row.number for one in lead if one.without_first]
    assert noted == [one.row.number for one in lead if one.row.number == 1] == [1]
    for text in said(much):
        assert text.count("without what begins at the first token") == 1


def test_paths_from_the_first_token_have_a_note(plain_trace):
    last = len(plain_trace.tokens) - 1
    paths = tuple(FlowPath(tokens=(at, last), probability=0.1) for at in (0, 2, 0))
    for text in said(starting(plain_trace, first=0.5, paths=paths)):
        assert text.count("first token, where attention often only rests") == 2


def test_a_trace_without_flow_in_its_words_says_nothing(trace):
    none = dataclasses.replace(trace, throughput=np.zeros_like(trace.throughput))
    assert carriers(show(none)) == ()


@pytest.mark.parametrize(
    ("drop", "said"), [(12.1, "12.10"), (-0.5, "−0.50"), (1e-5, "0.00"), (-1e-5, "0.00")]
)
def test_nats(drop, said):
    assert nats(drop) == said


def test_a_unit_has_the_largest_drop_of_its_tokens(trace):
    unit = dataclasses.replace(show(trace).units[0], first=3, last=4)
    assert drop_of(unit, {3: 0.1, 4: 0.7, 5: 2.0}) == 0.7
    assert drop_of(unit, {5: 2.0}) is None


@pytest.mark.parametrize(
    ("name", "label"), [("/some/where/Qwen3", "Qwen3"), ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B")]
)
def test_a_folder_is_named_by_its_last_part(name, label):
    assert model_label(name) == label
