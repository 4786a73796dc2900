"""Tracing in threads, with compilers, with unusual model settings and with wrong input."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import peft
import pytest
import torch

import flowtracer_plugin as ft
from flowtracer_plugin.grpo import FlowReward
from flowtracer_plugin.trace.rollouts import check_rollouts
from tests.tiny import MESSAGES, PROMPT, RESPONSE, tiny_llama, tiny_tokenizer

EVERYTHING = re.compile(r"(?s)(.+)")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def tracer(tokenizer):
    return ft.wrap(tiny_llama(), tokenizer, preset="paper")


def test_threads_generate_and_trace_the_same_as_one_thread(tokenizer):
    model = tiny_llama(attention_dropout=0.5).train()
    tracer = ft.wrap(model, tokenizer, answer=EVERYTHING, preset="paper")
    jobs = [
        lambda: tracer.trace(PROMPT, RESPONSE).throughput,
        lambda: tracer.generate(PROMPT, max_new_tokens=6).throughput,
    ]
    wanted = [job() for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = [(kind % 2, pool.submit(jobs[kind % 2])) for kind in range(24)]
        for kind, result in found:
            np.testing.assert_array_equal(result.result(), wanted[kind])
    assert model.training


def test_a_traced_model_can_be_compiled(tokenizer):
    torch._dynamo.reset()  # after too many compilations it would not compile at all
    model = tiny_llama().eval()
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    tracer = ft.wrap(model, tokenizer, preset="paper")
    first = tracer.trace(PROMPT, RESPONSE)
    with torch.no_grad():
        plain = model(ids).logits
        compiled = torch.compile(model, backend="eager")(ids).logits
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)
    again = tracer.trace(PROMPT, RESPONSE)
    np.testing.assert_array_equal(again.throughput, first.throughput)


def generated(tokenizer, **settings):
    """The tokens of a greedy answer of a model with these settings in its generation config."""
    model = tiny_llama()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    before = model.generation_config.to_dict()
    trace = ft.wrap(model, tokenizer, answer=EVERYTHING, preset="paper").generate(
        PROMPT, max_new_tokens=4
    )
    assert model.generation_config.to_dict() == before
    return trace.tokens


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 2, "num_beam_groups": 3},
        {"return_dict_in_generate": True, "output_scores": True},
        {"token_healing": True},
        {"max_length": 2},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"constraints": [1]},
        {"force_words_ids": [[5]]},
        {"prompt_lookup_num_tokens": 3},
        {"is_assistant": True},
        {"do_sample": True, "temperature": 9.0, "top_p": 0.9},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_greedy_generation_ignores_other_ways_of_decoding(tokenizer, settings):
    assert generated(tokenizer, **settings) == generated(tokenizer)


def test_stop_strings_of_a_generation_config_end_an_answer(tokenizer):
    whole = generated(tokenizer)
    stopped = generated(tokenizer, stop_strings=["".join(whole[-3:-1])])
    assert stopped == whole[:-1]


@pytest.mark.parametrize(
    ("prompt_ids", "completion_ids", "prompt_mask", "completion_mask", "message"),
    [
        ((1, 2), (1, 3), (1, 3), (1, 2), r"prompt_ids and prompt_mask .* \(1, 2\) and \(1, 3\)"),
        ((2, 2), (1, 3), (2, 2), (1, 3), r"completion_ids and .* beside prompt_ids \(2, 2\)"),
        ((2,), (3,), (2,), (3,), r"must both be \[batch, prompt\]"),
        ((0, 2), (0, 3), (0, 2), (0, 3), "at least one rollout"),
    ],
)
def test_ids_and_masks_of_rollouts_must_fit(
    prompt_ids, completion_ids, prompt_mask, completion_mask, message
):
    shapes = prompt_ids, completion_ids, prompt_mask, completion_mask
    with pytest.raises(ValueError, match=message):
        check_rollouts(*(torch.ones(shape) for shape in shapes))


def test_prompts_padded_on_the_right_are_refused_and_the_remedy_works(tracer, tokenizer):
    encoded = {
        side: tokenizer(
            [PROMPT, "Tom had 3."], padding=True, padding_side=side, return_tensors="pt"
        )
        for side in ("left", "right")
    }
    said = tokenizer([RESPONSE] * 2, add_special_tokens=False, return_tensors="pt")
    completion = said["input_ids"], said["attention_mask"]

    def trace(side):
        prompt = encoded[side]
        ids, mask = prompt["input_ids"], prompt["attention_mask"]
        return tracer.trace_ids(ids, completion[0], mask, completion[1])

    with pytest.raises(ValueError, match="padding_side='left'"):
        trace("right")
    assert trace("left").found.all()


def test_rows_with_little_or_strange_text_cost_no_other_row(tokenizer):
    known = len(tokenizer)
    tracer = ft.wrap(tiny_llama(vocab_size=known + 8), tokenizer, preset="paper")
    asked, said = (tokenizer(text)["input_ids"] for text in (PROMPT, RESPONSE))
    rows = [
        (asked, said),
        ([], said),  # no prompt, so no question
        (asked, []),
        (asked[:1], said),  # its only token is the question
        ([1, 3], said),  # only special tokens
        (asked, [known + 3, *said[1:-1], known + 3]),  # the tokenizer does not know these ids
        ([*asked[:-1], known + 1], said),
    ]
    texts = [
        tokenizer.pad(
            {"input_ids": side}, padding_side=where, return_tensors="pt", return_attention_mask=True
        )
        for side, where in zip(zip(*rows, strict=True), ("left", "right"), strict=True)
    ]
    ids, masks = zip(*(text.values() for text in texts), strict=True)
    batch = tracer.trace_ids(*map(torch.Tensor.long, (*ids, *masks)))
    assert batch.errors == {}
    assert batch.found.tolist() == [True, False, False, True, True, True, True]
    width = ids[0].shape[1]
    for row, (prompt, completion) in enumerate(rows):
        if batch.found[row]:
            trace = tracer.trace_tokens(prompt, completion)
            flow = batch.throughput[row, width - len(prompt) : width + len(completion)]
            np.testing.assert_allclose(flow, trace.throughput, atol=1e-6)


def failing(text):
    if "many" in text:
        raise KeyError("no such answer")
    return (1, 3)


def test_a_finder_that_fails_costs_its_row_alone(tracer, tokenizer):
    said = tokenizer([" many apples", " He ate apples"], padding=True, return_tensors="pt")
    asked = tokenizer([PROMPT] * 2, return_tensors="pt")
    parts = asked["input_ids"], said["input_ids"], asked["attention_mask"], said["attention_mask"]
    batch = tracer.trace_ids(*parts, answer=failing)
    assert batch.found.tolist() == [False, True]
    assert list(batch.errors) == [0]
    assert "the answer finder 'failing' raised KeyError: 'no such answer'" in str(batch.errors[0])
    apart = tracer.trace_ids(*parts, answer=failing, batch_size=1)
    assert list(apart.errors) == [0]
    torch.testing.assert_close(apart.throughput, batch.throughput)
    with pytest.raises(ValueError, match="the answer finder 'failing' raised KeyError"):
        tracer.trace(PROMPT, " many apples", answer=failing)
    with pytest.raises(ValueError, match="wanted the name of an answer finder"):
        tracer.trace_ids(*parts, answer="bocksed")


@pytest.mark.parametrize("mode", ["dense", "streamed"])
def test_attention_that_is_not_finite_costs_its_row_alone(tokenizer, mode):
    model = tiny_llama()
    tracer = ft.wrap(model, tokenizer, mode=mode, preset="paper")
    tracer.trace(PROMPT, RESPONSE)  # the model is checked before it breaks
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.nan
    asked = torch.tensor([tokenizer(PROMPT)["input_ids"]] * 3)
    said = torch.tensor([tokenizer(RESPONSE)["input_ids"]] * 3)
    said[1, 2] = 7
    masks = torch.ones_like(asked), torch.ones_like(said)
    batch = tracer.trace_ids(asked, said, *masks)
    assert batch.found.tolist() == [True, False, True]
    assert list(batch.errors) == [1]
    assert isinstance(batch.errors[1], ValueError | FloatingPointError)
    alone = tracer.trace_ids(asked[:1], said[:1], *(mask[:1] for mask in masks))
    torch.testing.assert_close(batch.throughput[[0]], alone.throughput)
    torch.testing.assert_close(batch.throughput[[2]], alone.throughput)
    assert batch.throughput[1].tolist() == [0.0] * batch.throughput.shape[1]


@pytest.mark.usefixtures("unchecked")
def test_tokens_may_come_as_a_batch_of_one_and_several_texts_are_refused(tracer, tokenizer):
    asked, said = (tokenizer(text)["input_ids"] for text in (PROMPT, RESPONSE))
    wanted = tracer.trace_tokens(asked, said)
    for kind in (
        torch.tensor, np.array, tuple, lambda ids: [ids], lambda ids: torch.tensor([ids]),
        lambda ids: np.array([ids]), lambda ids: torch.tensor(ids, dtype=torch.int32),
    ):  # fmt: skip
        found = tracer.trace_tokens(kind(asked), kind(said))
        np.testing.assert_array_equal(found.throughput, wanted.throughput)
        assert found.token_ids.tolist() == wanted.token_ids.tolist()
        assert found.spans.answer.tolist() == wanted.spans.answer.tolist()
    for wrong, error, message in (
        (torch.tensor([said, said]), ValueError, r"the shape \(2, .*; trace_ids traces"),
        ([said, said[1:]], ValueError, "rows of different lengths; trace_ids"),
        (torch.tensor(3), ValueError, r"got the shape \(\)"),
        (RESPONSE, TypeError, r"got a str; pass tokenizer\(text\)"),
        ([3, None], TypeError, "must be whole numbers, got"),
        ([3.0, 4.5], TypeError, r"must be whole numbers, got .*3\.0"),
        (np.ma.array(said), TypeError, "must not be a masked array"),
        (torch.tensor(said, device="meta"), TypeError, "on the meta device"),
        (torch.tensor(said).to_sparse(), TypeError, "must not be a sparse tensor"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            tracer.trace_tokens(asked, wrong)
    with pytest.raises(ValueError, match="the response is empty"):
        tracer.trace_tokens(asked, torch.zeros(1, 0, dtype=torch.long))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ([[1, 1]], TypeError, "completion_mask must be a torch tensor, got a list"),
        (np.ma.ones((1, 2)), TypeError, "completion_mask must not|must be a torch tensor"),
        (torch.ones(1, 2, device="meta"), TypeError, "completion_mask must not be .* meta device"),
        (torch.ones(1, 2).to_sparse(), TypeError, "completion_mask must not be a sparse tensor"),
        (torch.tensor([[1, 2]]), ValueError, "completion_mask must be 1 on tokens and 0"),
        (torch.tensor([[1, torch.nan]]), ValueError, "completion_mask must be 1 on tokens"),
    ],
)  # fmt: skip
def test_masks_of_rollouts_that_cannot_be_read_are_refused(tracer, wrong, error, message):
    ids = torch.tensor([[5, 6]])
    with pytest.raises(error, match=message):
        tracer.trace_ids(ids, ids, torch.ones_like(ids), wrong)


@pytest.mark.usefixtures("unchecked")
def test_input_and_masks_that_cannot_be_read_are_refused(tracer):
    ids = torch.tensor([[5, 6, 7]])
    for mask, message in (
        (np.ma.ones((1, 3)), "attention_mask must be a torch tensor, got a MaskedArray"),
        (torch.ones(1, 3, device="meta"), "attention_mask must not be a tensor on the meta device"),
        (torch.ones(1, 3).to_sparse(), "attention_mask must not be a sparse tensor"),
    ):
        with pytest.raises(TypeError, match=message):
            tracer.attention(ids, mask)
    for wrong in (ids.bool(), ids.to("meta"), ids.float()):
        with pytest.raises(TypeError, match="input_ids must"):
            tracer.attention(wrong)


@pytest.mark.parametrize("block", [0, -1])
def test_a_block_has_at_least_one_row(tokenizer, block):
    with pytest.raises(ValueError, match=f"block must be at least 1 query row, got {block}"):
        ft.wrap(tiny_llama(), tokenizer, block=block, preset="paper")


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_reward_reads_at_least_one_completion_at_a_time(tracer, batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
        FlowReward(tracer, batch_size=batch_size)


def test_a_models_name_is_refused():
    # in a process without the type checks of the tests, which would refuse it first
    program = "import flowtracer_plugin as ft; ft.wrap('gpt2')"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    message = (
        "TypeError: wanted a loaded model, found 'gpt2'; load it first, with AutoModelForCausalLM"
    )
    assert message in ran.stderr


def test_layer_numbers_may_come_from_numpy_and_are_saved(tokenizer, tmp_path):
    tracer = ft.wrap(tiny_llama(), tokenizer, layers=np.array([3, 2]), preset="paper")
    trace = tracer.trace(PROMPT, RESPONSE)
    assert ft.load(trace.save(tmp_path / "x.flow")).options.layers == (3, 2)
    assert '"layers": [2, 3]' in trace.to_json()


def test_one_layer_needs_no_list(tokenizer):
    assert ft.wrap(tiny_llama(), tokenizer, layers=2, preset="paper").layers == (2,)


def test_virtual_tokens_are_refused_and_lora_is_not(tokenizer):
    virtual = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    prompted = peft.get_peft_model(tiny_llama(), virtual)
    with pytest.raises(ft.UnsupportedArchitectureError, match=r"PROMPT_TUNING puts virtual tokens"):
        ft.wrap(prompted, tokenizer, preset="paper")
    lora = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    assert ft.wrap(lora, tokenizer, preset="paper").trace(PROMPT, RESPONSE)


def test_the_error_names_damaged_weights(tokenizer):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="computes logits that are not finite"):
        ft.wrap(model, tokenizer, preset="paper").trace(PROMPT, RESPONSE)


@pytest.mark.parametrize("message", [{"content": "hi"}, {"role": "user"}])
def test_a_message_has_a_role_and_content(message):
    tracer = ft.wrap(tiny_llama(), tiny_tokenizer(chat=True), preset="paper")
    with pytest.raises(ValueError, match=r"needs 'role' and 'content', got \{"):
        tracer.trace([message], RESPONSE)


def test_a_reward_renders_the_prompt_with_the_trainers_template_options():
    chat = tiny_tokenizer(chat=True)
    chat.chat_template += "{% if long %}He ate one.{% endif %}"
    tracer = ft.wrap(tiny_llama(), chat, preset="paper", question="prompt")
    ids = chat(RESPONSE, add_special_tokens=False)["input_ids"]
    scores = [
        FlowReward(tracer, chat_template_kwargs=options)([MESSAGES], [RESPONSE], [ids])
        for options in (None, {"long": True})
    ]
    text = chat.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, long=True)
    prompt = chat(text, add_special_tokens=False)["input_ids"]
    assert scores[1] == [pytest.approx(tracer.trace_tokens(prompt, ids).reasoning_share, rel=1e-4)]
    assert scores[0] != scores[1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_batch_copies_ids_and_masks_to_the_host_and_no_map(tokenizer, monkeypatch, device):
    tracer = ft.wrap(tiny_llama().to(device), tokenizer, preset="paper")
    prompt = tokenizer([PROMPT] * 2, return_tensors="pt").to(device)
    said = tokenizer([RESPONSE] * 2, add_special_tokens=False, return_tensors="pt").to(device)
    copied = []
    for name in ("cpu", "numpy", "tolist", "__array__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *args, _real=real, **kwargs: (
                copied.append(self.shape),
                _real(self, *args, **kwargs),
            )[1],
        )
    batch = tracer.trace_ids(
        prompt["input_ids"], said["input_ids"], prompt["attention_mask"], said["attention_mask"]
    )
    assert batch.throughput.device.type == device
    assert copied
    assert max(len(shape) for shape in copied) <= 2
    flags = 3  # whether the masks are sound, which come in the same copy
    assert max(shape.numel() for shape in copied) <= 2 * batch.throughput.numel() + flags
