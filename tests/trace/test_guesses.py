"""What new users pass by a natural mistake works, or one sentence says what to do instead."""

import inspect
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

import flowtracer_plugin as ft
from tests.tiny import MESSAGES, PROMPT, RESPONSE, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("unchecked")

CHAT = [*MESSAGES, {"role": "assistant", "content": RESPONSE}]
ROWS = Dataset.from_list([{"prompt": PROMPT, "response": RESPONSE}])


@pytest.fixture(scope="module")
def tracer():
    return ft.wrap(tiny_llama(), tiny_tokenizer(chat=True), preset="paper")


@pytest.fixture(scope="module")
def ids(tracer):
    return tracer.tokenizer(PROMPT)["input_ids"], tracer.tokenizer(RESPONSE)["input_ids"]


def output(*responses, prompt=()):
    """What vLLM returns for a prompt."""
    said = [SimpleNamespace(text="", token_ids=tuple(one)) for one in responses]
    return SimpleNamespace(prompt_token_ids=[*prompt], outputs=said)


def test_ids_in_any_form_are_traced(tracer, ids):
    wanted = tracer.trace_tokens(*ids).throughput
    asked, said = ids
    padded = tracer.tokenizer(PROMPT, padding="max_length", max_length=60, return_tensors="pt")
    assert padded["attention_mask"].sum() < 60
    for given in (
        [np.array(asked), np.array(said)],
        [torch.tensor([asked]), torch.tensor([said])],
        [padded, tracer.tokenizer(RESPONSE)],
        [output(said, prompt=asked)],
        [output(said, prompt=asked).prompt_token_ids, tuple(said)],
    ):
        np.testing.assert_array_equal(tracer.trace_tokens(*given).throughput, wanted)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([PROMPT, PROMPT], "got a list of 2 texts; flowtracer_plugin.trace_many"),
        ([MESSAGES, MESSAGES], "got a list of 2 lists; flowtracer_plugin.trace_many"),
        (MESSAGES[0], r"got one chat message; put it in a list: \[message\]"),
        (
            ROWS[0],
            r"got a row of data; pass its texts, such as row\['prompt'\], or flowtracer_plug",
        ),
        (ROWS, "got a table of rows; flowtracer_plugin.trace_many"),
        (
            tiny_tokenizer()(PROMPT),
            r"got what a tokenizer returns; tracer.trace_tokens\(prompt_ids",
        ),
        (
            torch.ones(2, 3, dtype=torch.long),
            r"got an array of shape \(2, 3\); tracer.trace_tokens",
        ),
        (np.ones(3, int), r"got an array of shape \(3,\); tracer.trace_tokens"),
        ([1, 2, 3], "got a list of whole numbers; tracer.trace_tokens"),
        ([[1, 2, 3]], "got a list of 1 lists; tracer.trace_tokens"),
        (output([1]), r"got an output of vLLM; tracer.trace_tokens\(output\) takes it"),
        (5, "got a int; pass a text or a list of chat messages"),
    ],
)
def test_a_prompt_of_another_kind_is_answered(tracer, prompt, message):
    for call in (lambda: tracer.trace(prompt, RESPONSE), lambda: tracer.generate(prompt)):
        with pytest.raises(
            TypeError, match=f"must be a text or a list of chat messages, {message}"
        ):
            call()


@pytest.mark.parametrize(
    ("prompt", "response", "message"),
    [
        (PROMPT, None, r"there is no response to trace; tracer.generate\(prompt\) lets the model"),
        (CHAT, None, r"tracer.trace\(messages\[:-1\], messages\[-1\]\['content'\]\)"),
        (PROMPT, CHAT[-1], r"got a chat message; pass its text, message\['content'\]"),
        (PROMPT, [RESPONSE, RESPONSE], "got a list of 2 texts; flowtracer_plugin.trace_many"),
        (PROMPT, [1, 2], "got a list of whole numbers; tracer.trace_tokens"),
        (PROMPT, 5, "got a int; pass the text that the model wrote"),
    ],
)
def test_a_response_of_another_kind_is_answered(tracer, prompt, response, message):
    with pytest.raises(TypeError, match=message):
        tracer.trace(prompt, response)


BEGUN = [*MESSAGES, {"role": "assistant", "content": "Tom has 3"}]


def test_a_response_after_the_assistants_own_message_is_refused(tracer):
    for call in (lambda: tracer.trace(BEGUN, RESPONSE), lambda: tracer.generate(BEGUN)):
        with pytest.raises(ValueError, match="end with one of the assistant, so a response would"):
            call()
    silent = [*MESSAGES, {"role": "assistant", "content": ""}]
    for messages, response in ((BEGUN, RESPONSE), (silent, None)):
        (row,) = ft.trace_many(tracer, [{"messages": messages, "response": response}])
        assert row.error.startswith("the messages end with one of the assistant")


@pytest.mark.parametrize("more", [{}, {"add_generation_prompt": False}])
def test_a_response_may_go_on_with_the_assistants_own_message(tracer, more):
    kept = {"continue_final_message": True, **more}
    trace = tracer.trace(BEGUN, RESPONSE, template_kwargs=kept)
    assert "".join(trace.tokens).endswith(f"<|assistant|>\nTom has 3{RESPONSE}")
    made = tracer.generate(
        BEGUN, max_new_tokens=3, answer=lambda text: (0, len(text)), template_kwargs=kept
    )
    assert made.tokens[: made.spans.prompt_length] == trace.tokens[: trace.spans.prompt_length]


def test_many_texts_are_traced_as_the_sentence_says(tracer):
    rows = [{"prompt": PROMPT, "response": RESPONSE}] * 2
    assert [one.error for one in ft.trace_many(tracer, rows)] == [None, None]
    assert [one.error for one in ft.trace_many(tracer, ROWS)] == [None]
    assert [one.error for one in ft.trace_many(tracer, ROWS.to_pandas())] == [None]
    with pytest.raises(TypeError, match=r"wanted rows, .* got a dict; put a single row in a list"):
        ft.trace_many(tracer, ROWS[0])
    with pytest.raises(ValueError, match=r"is not an object: 'Tom.*; wanted such as {'prompt': te"):
        ft.trace_many(tracer, [PROMPT])
    with pytest.raises(TypeError, match="got a BatchEncoding; pass its parts, with"):
        tracer.attention(tracer.tokenizer(PROMPT, return_tensors="pt"))


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ([output([1], [2])], ValueError, r"holds 2 responses; .*output.outputs\[0\].token_ids"),
        ([[output([1]), output([2])]], TypeError, r"got 2 outputs of vLLM; pass each of them: \["),
        ([[1, 2]], TypeError, "response_ids are missing; pass tracer.trace_tokens"),
    ],
)
def test_ids_that_are_not_one_text_are_answered(tracer, given, kind, message):
    with pytest.raises(kind, match=message):
        tracer.trace_tokens(*given)


def test_a_tracer_is_not_called(tracer):
    with pytest.raises(TypeError, match=r"a tracer is not called: tracer.generate\(prompt\) lets"):
        tracer(PROMPT, max_new_tokens=3)


@pytest.mark.parametrize(
    ("prompt", "given", "kind", "message"),
    [
        (PROMPT, {"tools": []}, ValueError, "are for the chat template, and a text is traced with"),
        (MESSAGES, "tools=[]", TypeError, r"must be a mapping such as \{.*, got 'tools=\[\]'"),
        (MESSAGES, {"tool": []}, ValueError, r"reads no argument 'tool'; did you mean 'tools'\?"),
    ],
)
def test_arguments_that_no_template_reads_are_answered(tracer, prompt, given, kind, message):
    for call in (
        lambda **kw: tracer.trace(prompt, RESPONSE, **kw),
        partial(tracer.generate, prompt),
    ):
        with pytest.raises(kind, match=message):
            call(template_kwargs=given)


def test_a_misspelt_input_of_the_model_is_named(tracer, ids):
    tokens = torch.tensor([ids[0]])
    places = torch.arange(tokens.shape[1])[None]
    assert torch.is_tensor(tracer.attention(tokens, model_inputs={"position_ids": places}))
    with pytest.raises(ValueError, match="no input 'position_id'; did you mean 'position_ids'"):
        tracer.attention(tokens, model_inputs={"position_id": places})


@pytest.mark.parametrize("option", [{"top_p": 0.9}, {"temperature": 0.7}])
def test_settings_of_sampling_take_sampling(tracer, option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} is for sampling, .* pass do_sample=True too"):
        tracer.generate(PROMPT, **option)


def test_what_is_no_model_and_no_tokenizer_is_answered(tracer):
    pipeline = type("TextGeneration", (), {"__module__": "transformers.pipelines.text_generation"})
    for given, message in [
        ([tracer], "a tracer already: use it as it is, or make one with other options by wrap"),
        ([tracer.tokenizer, tracer.model], r"the model comes first: wrap\(model, tokenizer\)"),
        ([tracer.model, "gpt2"], "wanted a tokenizer, found the text 'gpt2'; load it first, with"),
        ([pipeline()], r"wrap what the pipeline holds: wrap\(pipe.model, pipe.tokenizer\)"),
    ]:
        with pytest.raises(TypeError, match=message):
            inspect.unwrap(ft.wrap)(*given)
