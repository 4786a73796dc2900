"""What the app does with texts; neither Gradio nor a browser is needed here."""

from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest

import flowtracer_plugin as ft
from flowtracer_plugin.app import actions
from flowtracer_plugin.options import preset_of
from flowtracer_plugin.report import render_page
from flowtracer_plugin.text.spans import AnswerNotFoundError
from tests.documents.snippets import load_reasoner
from tests.evaluation import reference_knockout as slow
from tests.made_traces import hostile_trace, make_trace
from tests.pages import HOSTILE
from tests.tiny import PROMPT, RESPONSE, tiny_llama, tiny_tokenizer

QUESTION = "Ann has 4 apples. Ann buys 1. How many apples?\n"
SOLUTION = "4 + 1 = 5\nThe answer is \\boxed{5}"


@pytest.fixture(scope="module")
def tracer():
    return ft.wrap(*load_reasoner())


@pytest.fixture(scope="module")
def chat_tracer():
    return ft.wrap(tiny_llama(), tiny_tokenizer(chat=True))


@pytest.fixture(scope="module")
def trace(tracer):
    return actions.trace(tracer, QUESTION, SOLUTION, preset="derivation")


class Frames(HTMLParser):
    """The tags of a text, each with its attributes as a browser reads them."""

    def __init__(self, html):
        super().__init__()
        self.tags = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


# the answer


def test_the_answer_is_what_generate_traces(tracer):
    made = tracer.generate(QUESTION, max_new_tokens=40)
    answer = actions.answer(tracer, QUESTION, max_new_tokens=40)
    assert made.text == "<bos>" + QUESTION + answer.text + "<eos>"
    # The text alone would not do: the model spells it in other tokens than the tokenizer.
    found = actions.trace(tracer, QUESTION, answer, preset="derivation")
    assert found.token_ids.tolist() == made.token_ids.tolist()
    assert len(actions.answer(tracer, QUESTION, max_new_tokens=3).ids) == 3


def test_the_prompt_goes_into_the_chat_template_if_there_is_one(chat_tracer, tracer):
    def first(traced):
        return traced.tokens[:2]

    chat, plain = (
        actions.trace(chat_tracer, PROMPT, RESPONSE, preset="paper", chat=chat)
        for chat in (True, False)
    )
    assert first(chat) == ("<s>", "<|user|>")
    assert plain.text.startswith(PROMPT)
    assert actions.as_prompt(tracer, PROMPT, chat=True) == PROMPT


# the trace


@pytest.mark.parametrize("preset", ["paper", "sharp"])
def test_the_trace_is_that_of_the_preset(tracer, preset):
    found = actions.trace(tracer, QUESTION, SOLUTION, preset=preset)
    wanted = ft.wrap(tracer.model, tracer.tokenizer, preset=preset).trace(QUESTION, SOLUTION)
    assert preset_of(found.options) == preset
    np.testing.assert_array_equal(found.throughput, wanted.throughput)


def test_the_answer_is_found_by_a_finder_or_is_given(tracer):
    def found(**how):
        spans = actions.trace(tracer, QUESTION, SOLUTION, preset="paper", **how).spans
        return spans.answer_text, spans.rule

    assert found() == ("5", "boxed")
    assert found(finder="last_word") == (r"\boxed{5}", "last_word")
    assert found(words=" + 1 ") == ("+ 1", "regex")
    assert found(words="  ") == ("5", "boxed")


# the page


def test_the_page_lies_in_a_frame_without_rights():
    trace = hostile_trace()
    html = actions.trace_html(trace)
    ((tag, attributes),) = Frames(html).tags
    assert tag == "iframe"
    assert attributes["sandbox"] == "allow-scripts"
    assert attributes["srcdoc"] == render_page(trace)
    inside = html.partition("srcdoc=")[2].partition(" style=")[0]
    assert not set(inside) & set("<>{}$`\\")


# lines


def test_the_lines_are_the_steps_before_the_answer(trace):
    found = {line.text: line for line in actions.lines(trace)}
    assert list(found) == [
        "Ann has 4 apples.",
        "Ann buys 1.",
        "How many apples?",
        "4 + 1 = 5",
        r"The answer is \boxed{",
    ]
    steps = trace.steps().steps
    for line in found.values():
        step = steps[line.number - 1]
        places = line.tokens.nonzero()[0]
        assert step.start <= places.min() <= places.max() < step.stop
        assert " ".join("".join(np.array(trace.tokens)[line.tokens]).split()) == line.text
    assert places.max() == trace.spans.answer.argmax() - 1


def test_the_chat_template_is_no_line(chat_tracer):
    found = actions.trace(chat_tracer, PROMPT, RESPONSE, preset="paper")
    listed = [line.text for line in actions.lines(found)]
    assert listed[0] == "Tom had 3 apples."
    assert not any("<|" in text.split()[0] for text in listed)


def test_hidden_lines_move_the_answer_as_in_the_slow_model(tracer, trace):
    wanted = [one for one in actions.lines(trace) if one.text in ("Ann buys 1.", "4 + 1 = 5")]
    numbers, hidden = [one.number for one in wanted], sum(one.tokens for one in wanted)
    answer, ids = trace.spans.answer, trace.token_ids.tolist()
    places = answer.nonzero()[0]

    def probability(removed):
        log_probs = slow.log_probs(slow.llama_logits(tracer.model, ids, removed))
        return np.prod([np.exp(log_probs[p - 1][ids[p]]) for p in places])

    found = actions.knock_out(tracer.model, trace, numbers)
    assert found.before == pytest.approx(probability([[False] * len(ids)] * len(ids)), rel=1e-3)
    cut = slow.removed_edges(hidden, answer, "future")
    assert found.after == pytest.approx(probability(cut), rel=1e-3)
    assert found.after < found.before / 2
    assert found.flipped
    nothing = actions.knock_out(tracer.model, trace)
    assert nothing.after == pytest.approx(nothing.before)
    assert not nothing.flipped


def test_a_line_that_does_not_exist_is_refused(tracer, trace):
    with pytest.raises(ValueError, match=r"wanted lines among \[1, 2, 3, 4, 5\], found \[99\]"):
        actions.knock_out(tracer.model, trace, [99])


# sentences


def test_what_happened_is_said_in_a_sentence(trace):
    plain = actions.KnockedOut(before=0.98, after=0.98, drop=0.0, flipped=False)
    assert actions.said(trace, plain) == (
        "The answer is <b>5</b>, found by the rule “boxed”. The model gives it a probability of "
        "<b>98.0\N{NO-BREAK SPACE}%</b>."
    )
    named = actions.said(make_trace("abc7.", spans={"rule": "regex"}), plain)
    assert named.startswith("The answer is <b>7</b>, as you named it. ")
    moved = actions.KnockedOut(before=0.98, after=0.02, drop=3.89, flipped=True)
    assert actions.said(trace, moved, [5, 2]) == (
        "Without lines 2, 5, the probability of <b>5</b> is <b>2.00\N{NO-BREAK SPACE}%</b> instead "
        "of 98.0\N{NO-BREAK SPACE}% (3.89 nats lost a token). The model would now choose other "
        "tokens."
    )
    stays = actions.KnockedOut(before=0.98, after=0.9, drop=0.09, flipped=False)
    assert "Without line 2, " in actions.said(trace, stays, [2])
    assert actions.said(trace, stays, [2]).endswith("The model would still choose the same tokens.")


@pytest.mark.parametrize("text", HOSTILE)
def test_sentences_hold_only_text(text):
    plain = actions.KnockedOut(before=0.5, after=0.5, drop=0.0, flipped=False)
    trace = make_trace(("<s>", "a", "b", "c", "7", "."), spans={"rule": text, "answer_text": text})
    for html in (actions.said(trace, plain), actions.said(trace, plain, [1])):
        assert {tag for tag, _ in Frames(html).tags} == {"b"}
        assert not set(html) & set("{}$`\\")
    told = actions.trouble(ValueError(text))
    assert [tag for tag, _ in Frames(told).tags] == ["span"]
    assert not set(told) & set("{}$`\\")


def test_a_missing_answer_is_explained_in_terms_of_the_app(tracer):
    with pytest.raises(AnswerNotFoundError) as error:
        actions.trace(tracer, QUESTION, "Ann has.", preset="paper", finder="boxed")
    assert unescape(actions.trouble(error.value)) == (
        "<span role=\"alert\">No answer found by 'boxed' in the response 'Ann has.'; the options "
        "take another finder, or the answer itself.</span>"
    )
