import inspect
import re

import numpy as np
import pytest
import torch
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

import flowtracer_plugin as ft
from flowtracer_plugin.attention import AttentionAdapter
from flowtracer_plugin.model.causal_lm import check_input
from flowtracer_plugin.options import FlowOptions
from flowtracer_plugin.trace.rollouts import RolloutMasks, solve_rollouts
from tests.flow import reference, reference_backbone
from tests.tiny import (
    CONTEXT,
    MESSAGES,
    PROMPT,
    RESPONSE,
    eager_attention,
    tiny_llama,
    tiny_tokenizer,
)

EVERYTHING = re.compile(r"(?s)(.+)")
MIDDLE = (2, 3)
ASKED, ANSWERED = 12, 26  # tokens of PROMPT; place of the 2 in "The answer is 2."


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def chat():
    return tiny_tokenizer(chat=True)


@pytest.fixture(scope="module")
def tracer(model, tokenizer):
    return ft.wrap(model, tokenizer, preset="paper")


def marked(length, *places):
    mask = np.zeros(length, bool)
    mask[list(places)] = True
    return mask


def assert_traced(trace, attention, question, target, weights="uniform", boundary="literal"):
    """Assert that the trace equals the slow definition on independently read attention."""
    wanted = reference.flow(attention, question, target, weights, boundary)
    np.testing.assert_allclose(trace.attention, attention, atol=1e-5)
    np.testing.assert_allclose(trace.throughput, wanted["throughput"], atol=1e-5)
    np.testing.assert_allclose(trace.reach, wanted["reach"], rtol=1e-4, atol=1e-5)
    assert trace.flow.edge_flow() == pytest.approx(wanted["edge_flow"], abs=1e-5)
    paths = reference_backbone.reasoning_share_by_walk(wanted, trace.spans.prompt_length, target)
    assert trace.reasoning_share == pytest.approx(paths, abs=1e-5)


def named_span(text):
    """A finder that is a function."""
    return 4, 7


def test_the_question_is_shown_without_template_and_with_its_first_word(tracer, model, chat):
    plain = tracer.trace(PROMPT, RESPONSE)
    assert not plain.spans.question[0]
    assert plain.question_text == PROMPT.strip()
    told = [*MESSAGES, {"role": "assistant", "content": "Hm."}, {"role": "user", "content": "So?"}]
    asked = [one["content"] for one in told if one["role"] == "user"]
    trace = ft.wrap(model, chat, preset="paper").trace(told, RESPONSE)
    assert trace.question_text.split("\n") == asked


@pytest.mark.parametrize(
    ("options", "layers", "asked", "ends"),
    [
        ({}, MIDDLE, range(1, ASKED), [ANSWERED]),
        ({"layers": "all"}, range(6), range(1, ASKED), [ANSWERED]),
        ({"layers": "early"}, (0, 1), range(1, ASKED), [ANSWERED]),
        ({"layers": "late:1"}, (4,), range(1, ASKED), [ANSWERED]),
        ({"layers": [5, 0]}, (0, 5), range(1, ASKED), [ANSWERED]),
        ({"question": "all"}, MIDDLE, range(ASKED), [ANSWERED]),
        ({"question": "user"}, MIDDLE, range(ASKED), [ANSWERED]),
        ({"target": "decision"}, MIDDLE, range(1, ASKED), [ANSWERED - 1]),
        ({"question_weights": "reach"}, MIDDLE, range(1, ASKED), [ANSWERED]),
        ({"boundary": "absorbing"}, MIDDLE, range(1, ASKED), [ANSWERED]),
        ({"first_token": "drop"}, MIDDLE, range(1, ASKED), [ANSWERED]),
        ({"answer": EVERYTHING, "boundary": "absorbing"}, MIDDLE, range(1, 12), range(12, 28)),
        ({"answer": EVERYTHING, "target": "decision"}, MIDDLE, range(1, 12), range(11, 27)),
        ({"answer": named_span}, MIDDLE, range(1, ASKED), [13]),
        ({"block": 5}, MIDDLE, range(1, ASKED), [ANSWERED]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_options_do_what_their_slow_definitions_say(model, tokenizer, options, layers, asked, ends):
    trace = ft.wrap(model, tokenizer, **options, preset="paper").trace(PROMPT, RESPONSE)
    length = len(trace.tokens)
    attention = eager_attention(model, trace.token_ids.tolist(), layers).numpy()
    if options.get("first_token") == "drop":
        attention = reference_backbone.drop_first(attention)
        assert attention[:, 0].max() == 0
    assert trace.layers == tuple(layers)
    assert trace.text == PROMPT + RESPONSE
    assert_traced(
        trace,
        attention,
        marked(length, *asked),
        marked(length, *ends),
        options.get("question_weights", "uniform"),
        options.get("boundary", "literal"),
    )


def test_a_mask_is_the_question(model, tracer):
    mask = [False] * ASKED
    mask[3] = mask[5] = True
    trace = tracer.trace(PROMPT, RESPONSE, question=mask)
    attention = eager_attention(model, trace.token_ids.tolist(), MIDDLE).numpy()
    assert_traced(trace, attention, marked(28, 3, 5), marked(28, ANSWERED))
    assert trace.options.question == "mask"
    assert tracer.options.question == "auto"


def test_another_rule_may_name_the_question_for_one_trace(tracer, tokenizer):
    trace = tracer.trace(PROMPT, RESPONSE, question="all")
    assert trace.options.question == "all"
    assert trace.spans.question.sum() == trace.spans.prompt_length
    with pytest.raises(ValueError, match="token ids do not tell"):
        tracer.trace_tokens(tokenizer(PROMPT)["input_ids"], [3], question="user")
    with pytest.raises(ValueError, match="question='turns' needs chat messages"):
        tracer.trace(PROMPT, RESPONSE, question="turns")
    assert tracer.trace(PROMPT, RESPONSE, question="prompt").options.question == "prompt"


def test_one_trace_may_use_another_answer_finder(tracer):
    trace = tracer.trace(PROMPT, RESPONSE, answer=re.compile(r"(had) 3"))
    assert (trace.spans.answer_text, trace.spans.rule) == ("had", "regex")
    assert tracer.trace(PROMPT, RESPONSE).spans.rule == "phrase"


def test_messages_are_traced_through_the_chat_template(model, chat):
    trace = ft.wrap(model, chat, question="prompt", preset="paper").trace(MESSAGES, RESPONSE)
    assert trace.text == f"<s><|user|>\n{PROMPT}</s>\n<|assistant|>\n{RESPONSE}"
    asked = [
        text
        for text, region in zip(trace.tokens, trace.spans.regions, strict=True)
        if region == "question"
    ]
    assert "".join(asked) == f"\n{PROMPT}\n\n"  # all but special tokens
    attention = eager_attention(model, trace.token_ids.tolist(), MIDDLE).numpy()
    assert_traced(trace, attention, trace.spans.question, trace.spans.target)


def asked_in(trace):
    """The words of the question."""
    return "".join(trace.tokens[token] for token in np.flatnonzero(trace.spans.question))


def test_the_users_words_are_the_question_of_a_chat(model, chat):
    tracer = ft.wrap(model, chat, preset="paper")
    system = {"role": "system", "content": PROMPT}  # as if a template had added it
    trace = tracer.trace([system, *MESSAGES], RESPONSE)
    assert asked_in(trace) == PROMPT
    assert trace.options.question == "turns"
    place = np.flatnonzero(trace.spans.question)[0]
    assert trace.tokens[place - 2 : place] == ("<|user|>", "\n")
    attention = eager_attention(model, trace.token_ids.tolist(), MIDDLE).numpy()
    assert_traced(trace, attention, trace.spans.question, trace.spans.target)


def test_all_turns_of_the_user_are_the_question_unless_one_asks_for_the_last(model, chat):
    turns = ["Tom had 3 apples.", "How many?"]
    talk = [
        {"role": "user", "content": turns[0]},
        {"role": "assistant", "content": "apples"},
        {"role": "user", "content": turns[1]},
    ]
    tracer = ft.wrap(model, chat, preset="paper")
    assert asked_in(tracer.trace(talk, RESPONSE)) == "".join(turns)
    last = tracer.trace(talk, RESPONSE, question="user")
    assert (asked_in(last), last.options.question) == (turns[1], "user")
    unsaid = tracer.trace([{"role": "system", "content": "apples"}], RESPONSE)
    assert unsaid.options.question == "prompt"
    generated = tracer.generate(talk, max_new_tokens=1, answer=lambda text: (0, len(text)))
    assert asked_in(generated) == "".join(turns)


def test_a_batch_may_say_what_its_questions_are(tracer, tokenizer):
    batch = padded(tokenizer, ROLLOUTS)
    visible, whole = batch[2].bool(), tracer.trace_ids(*batch)
    rule = torch.stack([row & (row.cumsum(0) > 1) for row in visible])  # without the first token
    same = tracer.trace_ids(*batch, question=rule)
    torch.testing.assert_close(same.throughput, whole.throughput)
    last = visible & (torch.arange(visible.shape[1]) == visible.shape[1] - 1)
    one = tracer.trace_ids(*batch, question=last, batch_size=1).throughput[:, : visible.shape[1]]
    found = one.sum(1) > 0
    torch.testing.assert_close(one[found], last[found].float())
    with pytest.raises(ValueError, match="question must mark the tokens of prompt_ids"):
        # The tests' type checker would refuse it first.
        inspect.unwrap(ft.FlowTracer.trace_ids)(tracer, *batch, question=last[:, 1:])


def test_tokens_are_traced_unchanged(tracer, tokenizer):
    ids = tokenizer(PROMPT)["input_ids"], tokenizer(RESPONSE)["input_ids"]
    by_tokens, by_text = tracer.trace_tokens(*ids), tracer.trace(PROMPT, RESPONSE)
    np.testing.assert_array_equal(by_tokens.throughput, by_text.throughput)
    # "2" in two tokens, which the text does not show
    odd = [*ids[1][:-2], *tokenizer.convert_tokens_to_ids(["Ġ", "2", "."])]
    trace = tracer.trace_tokens(ids[0], odd)
    assert trace.text == by_text.text
    assert np.flatnonzero(trace.spans.answer).tolist() == [ANSWERED + 1]


def test_padded_input_reads_like_each_row_alone(tracer, tokenizer):
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    found, alone = tracer.attention(padded, mask), tracer.attention(ids)
    torch.testing.assert_close(found[:, 3:, 3:], alone, atol=1e-5, rtol=0)
    assert found[:, :3].abs().max() == found[:, :, :3].abs().max() == 0


# generate


def test_greedy_answers_are_the_models_own_and_repeat(model, tokenizer, tracer):
    state = torch.get_rng_state()
    first = tracer.generate(PROMPT, max_new_tokens=6, answer=EVERYTHING)
    second = tracer.generate(PROMPT, max_new_tokens=6, answer=EVERYTHING)
    assert torch.equal(torch.get_rng_state(), state)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    wanted = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert first.token_ids.tolist() == second.token_ids.tolist() == wanted[0].tolist()
    assert first.spans.prompt_length == ASKED
    again = tracer.trace_tokens(
        wanted[0, :ASKED].tolist(), wanted[0, ASKED:].tolist(), answer=EVERYTHING
    )
    np.testing.assert_array_equal(first.throughput, again.throughput)


def test_sampled_answers_follow_the_seed(model, tokenizer, tracer):
    def sampled(seed, **options):
        torch.manual_seed(seed)
        return tracer.generate(
            PROMPT, max_new_tokens=8, do_sample=True, answer=EVERYTHING, **options
        ).token_ids.tolist()

    assert sampled(0) == sampled(0)
    assert len({tuple(sampled(seed)) for seed in range(3)}) > 1
    greedy = tracer.generate(PROMPT, max_new_tokens=8, answer=EVERYTHING).token_ids.tolist()
    assert sampled(0, temperature=1e-4) == greedy


def test_answers_end_where_the_context_does(model, chat):
    trace = ft.wrap(model, chat, preset="paper").generate(
        [{"role": "user", "content": " many" * (CONTEXT - 20)}],
        max_new_tokens=500,
        answer=EVERYTHING,
    )
    assert trace.spans.prompt_length < len(trace.tokens) <= CONTEXT


def test_progress_counts_the_tokens(tracer, capsys):
    trace = tracer.generate(PROMPT, max_new_tokens=5, answer=EVERYTHING, progress=True)
    output = capsys.readouterr()
    assert output.out == ""
    assert re.search(rf"generating: .*{len(trace.tokens) - ASKED}/5", output.err)
    tracer.generate(PROMPT, max_new_tokens=5, answer=EVERYTHING)
    assert capsys.readouterr().err == ""


def test_answers_of_a_model_in_training_have_no_dropout(tokenizer):
    model = tiny_llama(attention_dropout=0.5)
    tracer = ft.wrap(model, tokenizer, answer=EVERYTHING, preset="paper")
    wanted = tracer.generate(PROMPT, max_new_tokens=8).token_ids.tolist()
    model.train()
    for seed in range(3):
        torch.manual_seed(seed)
        assert tracer.generate(PROMPT, max_new_tokens=8).token_ids.tolist() == wanted
    assert all(module.training for module in model.modules())


# rollouts

ROLLOUTS = [
    (PROMPT, RESPONSE),
    ("How many apples?", " 3 - 1 = 2."),
    (PROMPT, " He ate."),  # no answer
    ("He ate one apples.", " The answer is 3. He had many apples."),
]


def padded(tokenizer, rollouts, pad=0):
    """Prompts padded on the left, completions on the right, as a trainer does."""
    ids = [[tokenizer(text)["input_ids"] for text in pair] for pair in rollouts]
    widths = [max(len(row[side]) for row in ids) + 2 for side in (0, 1)]
    prompt_ids = [[pad] * (widths[0] - len(p)) + p for p, _ in ids]
    prompt_mask = [[0] * (widths[0] - len(p)) + [1] * len(p) for p, _ in ids]
    completion_ids = [c + [pad] * (widths[1] - len(c)) for _, c in ids]
    completion_mask = [[1] * len(c) + [0] * (widths[1] - len(c)) for _, c in ids]
    return tuple(map(torch.tensor, (prompt_ids, completion_ids, prompt_mask, completion_mask)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target": "decision", "question_weights": "reach"},
        {"boundary": "absorbing", "first_token": "drop", "question": "all"},
    ],
    ids=str,
)
def test_rows_of_a_batch_equal_their_own_traces(model, tokenizer, options):
    tracer = ft.wrap(model, tokenizer, **options, preset="paper")
    batch = padded(tokenizer, ROLLOUTS)
    prompt_ids, _, prompt_mask, completion_mask = batch
    flow = tracer.trace_ids(*batch)
    assert flow.prompt_length == prompt_ids.shape[1]
    assert flow.found.tolist() == [True, True, False, True]
    visible = torch.cat([prompt_mask, completion_mask], dim=1).bool()
    assert flow.throughput[~visible].abs().max() == flow.reach[~visible].abs().max() == 0
    for row, (prompt, response) in enumerate(ROLLOUTS):
        if not flow.found[row]:
            continue
        alone = tracer.trace(prompt, response)
        throughput, reach = flow.throughput[row][visible[row]], flow.reach[row][visible[row]]
        np.testing.assert_allclose(throughput, alone.throughput, atol=1e-5)
        np.testing.assert_allclose(reach, alone.reach, rtol=1e-4, atol=1e-5)
        assert flow.reasoning_share[row].item() == pytest.approx(alone.reasoning_share, abs=1e-5)
        assert flow.answers[row].rule == alone.spans.rule
        completion = flow.completion_throughput[row][completion_mask[row].bool()]
        np.testing.assert_array_equal(completion, throughput[alone.spans.prompt_length :])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
def test_the_size_of_forward_passes_does_not_matter(tracer, tokenizer, size):
    batch = padded(tokenizer, ROLLOUTS)
    whole, chunked = tracer.trace_ids(*batch), tracer.trace_ids(*batch, batch_size=size)
    for name in ("throughput", "reach", "reasoning_share"):
        torch.testing.assert_close(getattr(chunked, name), getattr(whole, name), atol=1e-5, rtol=0)
    assert chunked.answers == whole.answers
    assert chunked.prompt_length == whole.prompt_length


def test_every_row_runs_through_the_model(tracer, tokenizer, model):
    calls = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        tracer.trace_ids(*padded(tokenizer, [ROLLOUTS[2]] * 3), batch_size=1)
    finally:
        handle.remove()
    assert len(calls) == 3


def test_rows_without_an_answer_are_0(tracer, tokenizer):
    prompt_ids, completion_ids, prompt_mask, completion_mask = padded(tokenizer, ROLLOUTS)
    completion_mask[1] = 0  # as TRL hides truncated completions
    flow = tracer.trace_ids(prompt_ids, completion_ids, prompt_mask, completion_mask)
    assert flow.found.tolist() == [True, False, False, True]
    assert [answer is None for answer in flow.answers] == [False, True, True, False]
    for row in (1, 2):
        assert flow.throughput[row].abs().max() == flow.reach[row].abs().max() == 0
        assert flow.reasoning_share[row] == 0
    nothing = tracer.trace_ids(prompt_ids, completion_ids, prompt_mask, completion_mask * 0)
    assert not nothing.found.any()
    assert nothing.throughput.abs().max() == 0


def test_hidden_tokens_within_a_completion_do_not_count(tracer, tokenizer):
    prompt_ids, completion_ids, prompt_mask, completion_mask = padded(tokenizer, ROLLOUTS[:1])
    hole = torch.full((1, 2), 5), torch.zeros(1, 2, dtype=torch.long)
    holed = [
        torch.cat([part[:, :4], gap, part[:, 4:]], dim=1)
        for part, gap in zip((completion_ids, completion_mask), hole, strict=True)
    ]
    flow = tracer.trace_ids(prompt_ids, holed[0], prompt_mask, holed[1])
    visible = torch.cat([prompt_mask, holed[1]], dim=1).bool()
    alone = tracer.trace(PROMPT, RESPONSE)
    np.testing.assert_allclose(flow.throughput[visible], alone.throughput, atol=1e-5)


@pytest.mark.parametrize("mode", ["dense", "streamed"])
def test_no_forward_pass_is_wider_than_its_longest_text(model, tokenizer, mode):
    tracer = ft.wrap(model, tokenizer, mode=mode, preset="paper")
    tracer.trace(PROMPT, RESPONSE)  # checks the model first
    rollouts = padded(tokenizer, ROLLOUTS)
    lengths = torch.cat(rollouts[2:], dim=1).sum(1).tolist()
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    tracer.trace_ids(*rollouts, batch_size=1)
    hook.remove()
    assert seen == lengths
    assert max(lengths) < rollouts[0].shape[1] + rollouts[1].shape[1]


def test_masks_may_be_boolean(tracer, tokenizer):
    prompt_ids, completion_ids, *masks = padded(tokenizer, ROLLOUTS)
    whole = tracer.trace_ids(prompt_ids, completion_ids, *masks)
    same = tracer.trace_ids(prompt_ids, completion_ids, *(mask.bool() for mask in masks))
    assert torch.equal(same.throughput, whole.throughput)


@pytest.mark.parametrize("weights", ["uniform", "reach"])
@pytest.mark.parametrize("boundary", ["literal", "absorbing"])
def test_a_row_whose_question_is_cut_off_is_0_and_the_others_are_not(weights, boundary):
    rng = np.random.default_rng(0)
    attention = np.tril(rng.random((3, 6, 6)))
    attention /= attention.sum(-1, keepdims=True)
    attention[1, 3:, :3] = 0  # as behind a window, or in another chunk
    question = np.stack([marked(6, 0, 1)] * 3)
    target = np.stack([marked(6, 5)] * 3)
    masks = RolloutMasks(
        question=torch.tensor(question),
        target=torch.tensor(target),
        answer=torch.tensor(target),
        answers=(None,) * 3,
    )
    options = FlowOptions(question_weights=weights, boundary=boundary)
    flow = solve_rollouts(torch.tensor(attention, dtype=torch.float32), masks, 3, options)
    assert flow.found.tolist() == [True, False, True]
    for row in (0, 2):
        wanted = reference.flow(attention[row], question[row], target[row], weights, boundary)
        np.testing.assert_allclose(flow.throughput[row], wanted["throughput"], atol=1e-5)
        np.testing.assert_allclose(flow.reach[row], wanted["reach"], atol=1e-5)
    for array in (flow.throughput, flow.reach, flow.reasoning_share):
        assert array[1].abs().max() == 0


def test_padding_does_not_count_for_the_context(tracer, tokenizer):
    prompt_ids, completion_ids, prompt_mask, completion_mask = padded(tokenizer, ROLLOUTS)
    extra = torch.zeros(len(prompt_ids), CONTEXT, dtype=torch.long)
    wide = torch.cat([extra, prompt_ids], 1), completion_ids, torch.cat([extra, prompt_mask], 1)
    flow = tracer.trace_ids(*wide, completion_mask)
    whole = tracer.trace_ids(prompt_ids, completion_ids, prompt_mask, completion_mask)
    torch.testing.assert_close(flow.throughput[:, CONTEXT:], whole.throughput, atol=1e-5, rtol=0)


# the model


def test_nothing_changes_the_model(tokenizer):
    model = tiny_llama()
    model.model.layers[1].train()
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])

    def state():
        with torch.no_grad():
            logits = model(ids).logits
        flags = [module.training for module in model.modules()]
        return logits, flags, model.config.to_dict(), model.generation_config.to_dict()

    before = state()
    tracer = ft.wrap(model, tokenizer, preset="paper")
    tracer.trace(PROMPT, RESPONSE)
    tracer.generate(PROMPT, max_new_tokens=3, answer=EVERYTHING)
    tracer.trace_ids(*padded(tokenizer, ROLLOUTS))
    after = state()
    assert torch.equal(after[0], before[0])
    assert after[1:] == before[1:]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_repr_says_what_is_traced(tracer):
    assert repr(tracer) == "FlowTracer(LlamaForCausalLM, layers [2, 3], adapter 'interface')"


# errors, each with its remedy carried out


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(tracer, prompt):
    for call in (lambda: tracer.trace(prompt, RESPONSE), lambda: tracer.generate(prompt)):
        with pytest.raises(ValueError, match="the prompt is empty"):
            call()


def test_an_empty_response_is_refused(tracer, tokenizer):
    with pytest.raises(ValueError, match="the response is empty"):
        tracer.trace(PROMPT, "")
    with pytest.raises(ValueError, match="the response is empty"):
        tracer.trace_tokens(tokenizer(PROMPT)["input_ids"], [])
    with pytest.raises(ValueError, match="at least one prompt token"):
        tracer.trace_tokens([], tokenizer(RESPONSE)["input_ids"])


def test_a_response_without_an_answer_is_quoted(tracer):
    response = " He ate" + " many" * 60 + " apples."
    with pytest.raises(ft.AnswerNotFoundError, match=r"found by 'auto'.*….* apples\..*answer="):
        tracer.trace(PROMPT, response)
    for remedy in (re.compile(r"(apples)"), lambda text: (1, 3), "last_word"):
        assert tracer.trace(PROMPT, response, answer=remedy).throughput.max() > 0
    with pytest.raises(ft.AnswerNotFoundError, match=r"found by '\(seven\)' in"):
        tracer.trace(PROMPT, response, answer=re.compile("(seven)"))


def test_what_the_model_said_without_an_answer_is_quoted(tracer):
    with pytest.raises(ft.AnswerNotFoundError, match=r"found by 'boxed' in the response '.+'; say"):
        tracer.generate(PROMPT, max_new_tokens=4, answer="boxed")


def test_more_tokens_than_the_context_are_refused(tracer):
    with pytest.raises(ValueError, match=rf"have {CONTEXT + 1} tokens, .* context of {CONTEXT}"):
        tracer.trace(" many" * (CONTEXT - 1), " 2" * 2)
    assert len(tracer.trace(" many" * (CONTEXT - 2), " 2" * 2).tokens) == CONTEXT
    with pytest.raises(ValueError, match=f"have {CONTEXT + 1} tokens"):
        tracer.generate(" many" * CONTEXT)


def test_tokens_outside_the_vocabulary_are_refused(tracer, model):
    size = model.config.vocab_size
    for wrong in (size, -1):
        with pytest.raises(ValueError, match=f"between 0 and {size - 1}.* got .*{wrong}"):
            tracer.attention(torch.tensor([[3, wrong]]))
    assert tracer.attention(torch.tensor([[3, size - 1]])).shape == (1, 2, 2)
    for wrong in (size, -1):
        with pytest.raises(ValueError, match=f"between 0 and {size - 1}.* got .*{wrong}"):
            tracer.trace_tokens([3, 4], [wrong])


def test_input_and_mask_must_fit_together(tracer):
    # behind the border, because these tests check shapes at the border itself
    for ids, mask in ((torch.ones(1, 3), torch.ones(1, 2)), (torch.ones(3), torch.ones(3))):
        with pytest.raises(ValueError, match=r"must both be \[batch, token\], got \("):
            check_input(tracer.model, ids.long(), mask.long())


def test_a_model_without_attention_is_refused():
    size = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4}
    mamba = MambaForCausalLM(MambaConfig(**size))
    with pytest.raises(ft.NoAttentionError, match=r"MambaForCausalLM .* no flow to trace"):
        ft.wrap(mamba, preset="paper")


def test_only_transformers_models_are_accepted():
    with pytest.raises(TypeError, match="wanted a transformers model, found Linear"):
        ft.wrap(nn.Linear(2, 2), preset="paper")


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    known = len(tokenizer)
    for embedded in (known - 1 - len(tokenizer.added_tokens_decoder), known * 10 // 8):
        model = tiny_llama(vocab_size=embedded)
        with pytest.raises(ValueError, match=f"knows {known} tokens and .* embeds {embedded}"):
            ft.wrap(model, tokenizer, preset="paper")
    assert ft.wrap(model, tokenizer, verify=False, preset="paper").trace(PROMPT, RESPONSE)
    for embedded in (known, known * 10 // 9):
        assert ft.wrap(tiny_llama(vocab_size=embedded), tokenizer, preset="paper").trace(
            PROMPT, RESPONSE
        )


def test_a_tokenizer_may_know_tokens_that_a_text_model_never_sees(model):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    assert len(tokenizer) > model.config.vocab_size
    tracer = ft.wrap(model, tokenizer, preset="paper")
    assert tracer.trace(PROMPT, RESPONSE)
    with pytest.raises(ValueError, match="token ids must be between"):
        tracer.trace(PROMPT + "<image>", RESPONSE)


def test_text_needs_a_tokenizer(model, tokenizer):
    bare = ft.wrap(model, preset="paper")
    for call in (
        lambda: bare.trace(PROMPT, RESPONSE),
        lambda: bare.generate(PROMPT),
        lambda: bare.trace_tokens([3], [4]),
        lambda: bare.trace_ids(*padded(tokenizer, ROLLOUTS)),
    ):
        with pytest.raises(
            ValueError, match=r"no tokenizer; make it with wrap\(model, tokenizer\)"
        ):
            call()
    assert bare.attention(torch.tensor([[3, 4]])).shape == (1, 2, 2)


def test_messages_need_a_chat_template(tracer, model, chat):
    with pytest.raises(ValueError, match="need a tokenizer with a chat template"):
        tracer.trace(MESSAGES, RESPONSE)
    assert tracer.trace(MESSAGES[0]["content"], RESPONSE)
    assert ft.wrap(model, chat, preset="paper").trace(MESSAGES, RESPONSE)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"layers": "center"}, "layers must be one of all, early"),
        ({"layers": [6]}, r"layers \[6\] have no attention to read.*\[0, 1, 2, 3, 4, 5\]"),
        ({"question": "everything"}, "question must be one of .*'prompt'.*got 'everything'"),
        ({"question": "mask"}, r"pass it to trace\(\.\.\., question=\)"),
        ({"answer": "last"}, "name of an answer finder.*found 'last'"),
        ({"answer": re.compile("2")}, "regex with exactly one group"),
        ({"target": "end"}, "target must be one of .*'decision'.*got 'end'"),
        ({"question_weights": "h"}, "question_weights must be one of .*'reach'.*got 'h'"),
        ({"boundary": "soft"}, "boundary must be one of .*'absorbing'.*got 'soft'"),
        ({"first_token": "lose"}, "first_token must be one of .*'drop'.*got 'lose'"),
        ({"damping": 1.5}, r"damping must be above 0 and up to 1, got 1\.5"),
    ],
)
def test_unknown_options_are_refused_when_the_model_is_wrapped(model, tokenizer, option, message):
    with pytest.raises(ValueError, match=message):
        ft.wrap(model, tokenizer, **option, preset="paper")


def test_an_unknown_finder_is_refused_before_generation(tracer, model, monkeypatch):
    monkeypatch.setattr(model, "generate", None)
    with pytest.raises(ValueError, match="name of an answer finder"):
        tracer.generate(PROMPT, answer="last")


def test_token_ids_cannot_show_what_the_user_said(model, tokenizer):
    tracer = ft.wrap(model, tokenizer, question="user", preset="paper")
    ids = tokenizer(PROMPT)["input_ids"], tokenizer(RESPONSE)["input_ids"]
    with pytest.raises(ValueError, match=r"token ids do not tell; pass .*question=mask"):
        tracer.trace_tokens(*ids)
    assert tracer.trace_tokens(*ids, question=marked(ASKED, 3)).throughput[3] == 1
    with pytest.raises(ValueError, match=r"token ids do not tell; wrap .*question='prompt'"):
        tracer.trace_ids(*padded(tokenizer, ROLLOUTS))


def test_a_batch_needs_rows(tracer, tokenizer):
    batch = padded(tokenizer, ROLLOUTS)
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
            tracer.trace_ids(*batch, batch_size=size)
    with pytest.raises(ValueError, match="at least one rollout"):
        tracer.trace_ids(*(part[:0] for part in batch))


def test_a_question_mask_must_fit_the_prompt(tracer):
    for mask in ([True] * 3, [False] * ASKED):
        with pytest.raises(ValueError, match="question"):
            tracer.trace(PROMPT, RESPONSE, question=mask)


class Refusing(AttentionAdapter):
    name = "refusing"

    def matches(self, model):
        return False

    def sites(self, model):
        raise AssertionError("an adapter that does not match is not asked")

    def read(self, module, args, kwargs):
        raise AssertionError("nor is it read with")


def test_an_adapter_may_refuse_the_model(model):
    with pytest.raises(ft.UnsupportedArchitectureError, match=r"tried: refusing.*docs adapters"):
        ft.wrap(model, adapter=Refusing(), preset="paper")


@pytest.mark.parametrize("mode", ["dense", "streamed"])
@pytest.mark.parametrize(
    ("backend", "preset"),
    [("nnsight", "paper"), ("interface", "paper"), ("nnsight", "derivation")],
)
def test_progress_counts_the_layers_that_are_read(mode, backend, preset, monkeypatch):
    from flowtracer_plugin.reading import runner as running

    bars = []

    def bar(**options):
        bars.append((tqdm(**options), options["disable"]))
        return bars[-1][0]

    tqdm = running.tqdm
    monkeypatch.setattr(running, "tqdm", bar)
    tracer = ft.wrap(tiny_llama(), tiny_tokenizer(), mode=mode, backend=backend, preset=preset)
    tracer.trace(PROMPT, RESPONSE, progress=True)
    assert all(disabled for _, disabled in bars[:-1])
    last, disabled = bars[-1]
    assert not disabled
    assert last.n == last.total == len(tracer.layers)
