"""Tracing in threads, with compilers, with unusual model settings and with wrong input."""

import copy
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
    return ft.wrap(tiny_llama(), tokenizer)


def test_threads_generate_and_trace_the_same_as_one_thread(tokenizer):
    model = tiny_llama(attention_dropout=0.5).train()
    tracer = ft.wrap(model, tokenizer, answer=EVERYTHING)
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
    tracer = ft.wrap(model, tokenizer)
    first = tracer.trace(PROMPT, RESPONSE)
    with torch.no_grad():
        plain = model(ids).logits
        compiled = torch.compile(model, backend="eager")(ids).logits
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)
    again = tracer.trace(PROMPT, RESPONSE)
    np.testing.assert_array_equal(again.throughput, first.throughput)


@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"return_dict_in_generate": True}, {"num_return_sequences": 1}]
)
def test_greedy_generation_ignores_the_models_generation_config(tokenizer, settings):
    model = tiny_llama()
    wanted = ft.wrap(model, tokenizer, answer=EVERYTHING).generate(PROMPT, max_new_tokens=4)
    other = copy.deepcopy(model)
    other.generation_config.update(**settings)
    found = ft.wrap(other, tokenizer, answer=EVERYTHING).generate(PROMPT, max_new_tokens=4)
    assert found.tokens == wanted.tokens


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


def test_a_row_without_a_prompt_or_with_a_strange_id_has_no_answer(tokenizer):
    known = len(tokenizer)
    tracer = ft.wrap(tiny_llama(vocab_size=known + 8), tokenizer)
    prompt = torch.tensor([tokenizer(PROMPT)["input_ids"]]).repeat(3, 1)
    said = tokenizer(RESPONSE, add_special_tokens=False)["input_ids"]
    completion = torch.tensor([said, said, [*said[:-1], known + 3]])
    seen = torch.ones_like(prompt)
    seen[1] = 0
    batch = tracer.trace_ids(prompt, completion, seen, torch.ones_like(completion))
    assert batch.found.tolist() == [True, False, False]
    alone = tracer.trace_ids(
        *(part[:1] for part in (prompt, completion, seen)), seen.new_ones(1, len(said))
    )
    torch.testing.assert_close(batch.throughput[:1], alone.throughput)


@pytest.mark.parametrize("block", [0, -1])
def test_a_block_has_at_least_one_row(tokenizer, block):
    with pytest.raises(ValueError, match=f"block must be at least 1 query row, got {block}"):
        ft.wrap(tiny_llama(), tokenizer, block=block)


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
    tracer = ft.wrap(tiny_llama(), tokenizer, layers=np.array([3, 2]))
    trace = tracer.trace(PROMPT, RESPONSE)
    assert ft.load(trace.save(tmp_path / "x.flow")).options.layers == (3, 2)
    assert '"layers": [2, 3]' in trace.to_json()


def test_one_layer_needs_no_list(tokenizer):
    assert ft.wrap(tiny_llama(), tokenizer, layers=2).layers == (2,)


def test_virtual_tokens_are_refused_and_lora_is_not(tokenizer):
    virtual = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    prompted = peft.get_peft_model(tiny_llama(), virtual)
    with pytest.raises(ft.UnsupportedArchitectureError, match=r"PROMPT_TUNING puts virtual tokens"):
        ft.wrap(prompted, tokenizer)
    lora = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    assert ft.wrap(lora, tokenizer).trace(PROMPT, RESPONSE)


def test_the_error_names_damaged_weights(tokenizer):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="computes logits that are not finite"):
        ft.wrap(model, tokenizer).trace(PROMPT, RESPONSE)


@pytest.mark.parametrize("message", [{"content": "hi"}, {"role": "user"}])
def test_a_message_has_a_role_and_content(message):
    tracer = ft.wrap(tiny_llama(), tiny_tokenizer(chat=True))
    with pytest.raises(ValueError, match=r"needs 'role' and 'content', got \{"):
        tracer.trace([message], RESPONSE)


def test_a_reward_renders_the_prompt_with_the_trainers_template_options():
    chat = tiny_tokenizer(chat=True)
    chat.chat_template += "{% if long %}He ate one.{% endif %}"
    tracer = ft.wrap(tiny_llama(), chat)
    ids = chat(RESPONSE, add_special_tokens=False)["input_ids"]
    scores = [
        FlowReward(tracer, chat_template_kwargs=options)([MESSAGES], [RESPONSE], [ids])
        for options in (None, {"long": True})
    ]
    text = chat.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, long=True)
    prompt = chat(text, add_special_tokens=False)["input_ids"]
    assert scores[1] == [pytest.approx(tracer.trace_tokens(prompt, ids).reasoning_share, rel=1e-4)]
    assert scores[0] != scores[1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_batch_copies_ids_and_masks_to_the_host_and_no_map(tokenizer, monkeypatch, device):
    tracer = ft.wrap(tiny_llama().to(device), tokenizer)
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
    assert max(shape.numel() for shape in copied) <= batch.throughput.numel()
