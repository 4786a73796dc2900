"""The sentences that say what carried an answer."""

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

import flowtracer_plugin as ft
from flowtracer_plugin.report.carried import carriers, drop_of, leading_steps, nats
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
    inflow = [row.step.inflow for row in steps]
    assert inflow == sorted(inflow, reverse=True)
    for row in steps:
        assert "user" not in row.text
        assert not trace.spans.answer[row.step.start : row.step.stop].any()


def test_the_page_and_the_terminal_say_it(trace):
    first = carriers(show(trace))[0].unit
    drops = {first.first: 1.234}
    page, file = render_page(trace, drops), io.StringIO()
    Console(file=file, width=500).print(render_trace(trace, drops))
    seen = file.getvalue()
    assert "Most flow passes through" in page
    assert "(−1.23 nats)" in page
    assert f"most flow passes through ⟨{first.inline.strip()}⟩" in seen
    assert "(−1.23 nats)" in seen
    assert "nats" not in render_page(trace).partition("<main")[0].partition("<header")[2]


def test_a_trace_without_flow_in_its_words_says_nothing(trace):
    none = dataclasses.replace(trace, throughput=np.zeros_like(trace.throughput))
    assert carriers(show(none)) == ()


@pytest.mark.parametrize(
    ("drop", "said"), [(12.1, "−12.10"), (-0.5, "+0.50"), (1e-5, "0.00"), (-1e-5, "0.00")]
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
