import re

import numpy as np
import pytest

import flowtracer_plugin as ft
from flowtracer_plugin import trace_many
from flowtracer_plugin.attention.adapter import NoAttentionError
from flowtracer_plugin.bulk import tracing
from flowtracer_plugin.bulk.examples import Columns
from flowtracer_plugin.credit.token_scores import score_text
from tests.bulk.stories import stories
from tests.tiny import MESSAGES, PROMPT, RESPONSE, tiny_tokenizer


def test_results_are_those_of_tracing_one_by_one_in_the_order_of_the_rows(tiny):
    rows = stories(11)
    found = list(trace_many(tiny, rows, batch_size=4))
    assert [one.row for one in found] == list(range(11))
    for one, row in zip(found, rows, strict=True):
        alone = tiny.trace(row["prompt"], row["response"])
        assert one.error is None
        np.testing.assert_allclose(one.trace.throughput, alone.throughput, rtol=2e-5, atol=1e-7)
        assert one.trace.tokens == alone.tokens
        assert (one.prompt, one.response) == (row["prompt"], row["response"])
        assert (one.id, one.columns) == (row["id"], {"id": row["id"], "level": row["level"]})
        assert one.correct is (row["answer"] == "2")
        assert (one.right_answer, one.generated) == (row["answer"][-1], False)


def test_a_bad_row_has_an_error_and_costs_no_other(tiny):
    good = {"prompt": PROMPT, "response": RESPONSE}
    rows = [
        good,
        {"response": RESPONSE},
        {"prompt": PROMPT, "response": "\n"},
        {"prompt": PROMPT * 40, "response": RESPONSE},
        "no row",
        {"prompt": 3, "response": RESPONSE},
        {"prompt": "\ud800", "response": RESPONSE},
        {"prompt": [{"role": "user", "content": "x"}], "response": RESPONSE},
        good,
    ]
    found = list(trace_many(tiny, rows))
    said = [
        None,
        "row 1 of the data has no 'prompt'",
        "no answer found",
        "more than the model's context",
        "row 4 of the data is not an object",
        "found 3 in a row",
        "half a character",
        "chat template",
        None,
    ]
    for one, wanted in zip(found, said, strict=True):
        assert (one.trace is None) == (wanted is not None)
        assert (one.error is None) if wanted is None else (wanted in one.error), one.error


def test_a_generated_response_without_an_answer_is_kept(tiny):
    tracer = ft.wrap(tiny.model, tiny.tokenizer, answer=re.compile("(never said)"), preset="paper")
    (one,) = trace_many(tracer, [{"prompt": PROMPT}], max_new_tokens=5)
    assert "no answer found" in one.error
    (found,) = trace_many(
        ft.wrap(tiny.model, tiny.tokenizer, answer=re.compile("(?s)(.+)"), preset="paper"),
        [{"prompt": PROMPT}],
        max_new_tokens=5,
    )
    assert one.response == found.response
    assert one.prompt == found.prompt
    assert one.truncated is found.truncated is True
    (given,) = trace_many(tracer, [{"prompt": PROMPT, "response": RESPONSE}])
    assert given.truncated is None


def test_in_chat_messages_the_question_is_what_the_user_said(tiny):
    tracer = ft.wrap(tiny.model, tiny_tokenizer(chat=True), preset="paper")
    talk = [{"role": "system", "content": "Be kind."}, *MESSAGES]
    rows = [{"prompt": talk, "response": RESPONSE}, {"prompt": PROMPT, "response": RESPONSE}]
    for one, question in zip(trace_many(tracer, rows), ("turns", "prompt"), strict=True):
        alone = tracer.trace(rows[one.row]["prompt"], RESPONSE)
        assert one.trace.options.question == alone.options.question == question
        np.testing.assert_array_equal(one.trace.spans.question, alone.spans.question)
    asked = tracer.tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    given = {**rows[0], "prompt_ids": asked, "completion_ids": tiny.tokenizer(RESPONSE).input_ids}
    (one,) = trace_many(tracer, [given])
    assert one.trace.options.question == "prompt"  # the ids need not be those of the messages


def test_sampled_ids_are_traced_as_they_are(tiny):
    tokenizer = tiny.tokenizer
    asked, said = tokenizer(PROMPT).input_ids, tokenizer(RESPONSE).input_ids
    rows = [
        {"prompt_ids": asked, "completion_ids": said},
        {"prompt_ids": asked, "completion_ids": [10**9]},
        {"prompt_ids": asked, "completion_ids": None},
    ]
    one, outside, missing = trace_many(tiny, rows)
    wanted = tiny.trace_tokens(asked, said)
    np.testing.assert_array_equal(one.trace.token_ids, wanted.token_ids)
    assert one.prompt == PROMPT
    assert outside.error
    assert "no 'completion_ids'" in missing.error


def test_the_model_answers_rows_without_a_response(tiny, monkeypatch):
    said = tiny.tokenizer(RESPONSE).input_ids

    def generate_many(model, prompts, *, tokenizer, max_new_tokens):
        return [said[:max_new_tokens] for _ in prompts]

    monkeypatch.setattr(tracing, "generate_many", generate_many)
    one, two = trace_many(tiny, [{"prompt": PROMPT}, {"prompt": PROMPT, "response": RESPONSE}])
    assert (one.generated, two.generated) == (True, False)
    assert one.response == RESPONSE


def test_a_failing_batch_of_questions_is_asked_one_by_one(tiny, monkeypatch):
    said = tiny.tokenizer(RESPONSE).input_ids

    def generate_many(model, prompts, **_):
        if len(prompts) > 1 or len(prompts[0]) > 3:
            raise MemoryError("too long")
        return [said]

    monkeypatch.setattr(tracing, "generate_many", generate_many)
    short, long, other = trace_many(tiny, [{"prompt": "a b"}, {"prompt": PROMPT}, {"prompt": "c"}])
    assert (short.response, other.response) == (RESPONSE, RESPONSE)
    assert long.error == "MemoryError: too long"


def test_scores_are_those_of_score_text_and_their_failure_keeps_the_trace(tiny, monkeypatch):
    (found,) = trace_many(tiny, stories(1), scores=["entropy", "recency"])
    wanted = score_text(tiny, found.trace, ["entropy", "recency"])
    assert set(found.scores) == set(wanted)
    np.testing.assert_array_equal(found.scores["entropy"], wanted["entropy"])
    streamed = ft.wrap(tiny.model, tiny.tokenizer, mode="streamed", preset="paper")
    (found,) = trace_many(streamed, stories(1), scores=["entropy"])
    assert found.trace is not None
    assert found.error.startswith("no scores: scores need all attention")


def test_a_failing_batch_is_tried_one_by_one(tiny, monkeypatch):
    real = type(tiny).trace_found

    def trace_found(self, texts, **options):
        if any("one" in "".join(text.tokens[text.spans.prompt_length :]) for text in texts):
            raise MemoryError("too long")
        return real(self, texts, **options)

    monkeypatch.setattr(type(tiny), "trace_found", trace_found)
    found = list(trace_many(tiny, stories(6)))
    failed = [one.row for one in found if one.error]
    assert failed
    assert len(failed) < 6
    assert {found[row].error for row in failed} == {"MemoryError: too long"}


def test_what_would_fail_in_every_row_ends_the_run(tiny, monkeypatch):
    def trace_found(self, texts, **options):
        raise NoAttentionError("none")

    monkeypatch.setattr(type(tiny), "trace_found", trace_found)
    with pytest.raises(NoAttentionError):
        list(trace_many(tiny, stories(2)))


def test_mistakes_are_refused_at_the_call(tiny):
    with pytest.raises(ValueError, match="no rows to trace"):
        trace_many(tiny, [])
    with pytest.raises(ValueError, match="no column 'prompt'"):
        trace_many(tiny, [{"a": 1}])
    with pytest.raises(ValueError, match="nonsense"):
        trace_many(tiny, stories(1), scores=["nonsense"])
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        trace_many(tiny, stories(1), batch_size=0)
    with pytest.raises(ValueError, match="no column 'x'"):
        trace_many(tiny, stories(1), columns=Columns(prompt="x"))


def test_a_stream_is_traced_window_by_window(tiny, monkeypatch):
    monkeypatch.setattr(tracing, "WINDOW", 2)
    taken = []

    def stream():
        for row in stories(5):
            taken.append(row["id"])
            yield row

    found = trace_many(tiny, stream())
    assert next(found).id == "story-0"
    assert taken == ["story-0", "story-1"]
    assert [one.row for one in found] == [1, 2, 3, 4]


def test_concentration_and_top_tokens_by_definition(tiny):
    (found,) = trace_many(tiny, stories(1))
    trace, spans = found.trace, found.trace.spans
    last = max(np.flatnonzero(spans.target))
    counted = [
        token
        for token in range(len(trace.tokens))
        if token >= spans.prompt_length and token < last and not spans.target[token]
    ]
    flow = trace.throughput[counted] / trace.throughput[counted].sum()
    spread = np.exp(-(flow[flow > 0] * np.log(flow[flow > 0])).sum())
    # The difference from 1 has the rounding of float32 numbers near 1.
    assert found.concentration == pytest.approx(1 - spread / len(counted), abs=1e-6)
    top = sorted(
        (t for t in counted if not spans.answer[t] and trace.throughput[t] > 0),
        key=lambda t: -trace.throughput[t],
    )
    beyond = [t for t in found.top_tokens(10**6) if t < last]
    assert beyond == top
