"""The rewards: their scores, and their use in unmodified trainers."""

import asyncio
import doctest
import json
import math
import multiprocessing
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

import flowtracer_plugin as ft
from flowtracer_plugin.rewards import named as rewards, right_answers
from flowtracer_plugin.rewards.flow_reward import SCORES, FlowReward, concentration
from tests.flow import reference
from tests.grpo.worker import PROMPTS, build, build_rloo, reward, save_policy, word_tokenizer
from tests.tiny import eager_attention, tiny_llama, tiny_tokenizer

TEXTS = ["then 4 plus 3 is 7 apples so", "so 1 then #### 9", "is 2 <eos>", "so 8 then then 5 is"]
ANSWERS = [5, 4, 1, 4]
"""Where in each of `TEXTS` the answer stands."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _silent(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def tracer(policy):
    return ft.wrap(AutoModelForCausalLM.from_pretrained(policy), word_tokenizer(), preset="paper")


def words(text):
    return word_tokenizer()(text)["input_ids"]


def call(flow_reward, texts=TEXTS, prompts=None, **columns):
    return flow_reward(
        prompts=prompts or [PROMPTS[row // 2] for row in range(len(texts))],
        completions=list(texts),
        completion_ids=[words(text) for text in texts],
        **columns,
    )


# scores


def test_the_reward_is_the_reasoning_share(tracer):
    scores = call(FlowReward(tracer))
    for row, text in enumerate(TEXTS):
        trace = tracer.trace_tokens(words(PROMPTS[row // 2]), words(text))
        assert scores[row] == pytest.approx(trace.reasoning_share, rel=1e-5)
    assert all(0 < share <= 1 for share in scores)
    assert len(set(scores)) == 4


def failing(text):
    if "8 then" in text:
        raise KeyError("no such answer")
    return (0, 2) if text else None


def test_a_completion_that_fails_costs_no_other(policy, caplog):
    model = AutoModelForCausalLM.from_pretrained(policy)
    model.config.max_position_embeddings = 40
    tracer = ft.wrap(model, word_tokenizer(), answer=failing, preset="paper")
    flow_reward = FlowReward(tracer, batch_size=2)
    texts = [TEXTS[0], "so 8 then 5", "so " * 50, "", TEXTS[1], TEXTS[1]]
    prompts = [PROMPTS[0]] * 4 + ["", "3"]  # an empty prompt, and one of one token
    for _ in range(3):
        found = call(flow_reward, texts, prompts)
    assert [score is None for score in found] == [False, True, True, True, True, False]
    assert found[0] == call(flow_reward, TEXTS[:1], PROMPTS[:1])[0]
    assert found[5] == call(flow_reward, TEXTS[1:2], ["3"])[0]
    told = [str(record.exc_info[1]) for record in caplog.records]
    assert len(told) == 2  # each kind once
    assert "raised KeyError: 'no such answer'" in "".join(told)
    assert "more than the model's context of 40" in "".join(told)


def test_ids_that_the_tokenizer_does_not_know_are_read():
    tokenizer = tiny_tokenizer()
    known = len(tokenizer)
    tracer = ft.wrap(tiny_llama(vocab_size=known + 4), tokenizer, preset="paper")
    ids = [known, *tokenizer.encode("He had 3."), known + 1]
    (found,) = FlowReward(tracer)(["How many?"], [tokenizer.decode(ids)], [ids])
    assert found is not None
    said = [[known + 4, *ids], ids]  # the model does not embed the first of these ids
    (lost, kept) = FlowReward(tracer)(["How many?"] * 2, [tokenizer.decode(ids)] * 2, said)
    assert lost is None
    assert kept == pytest.approx(found)


def test_no_completions_have_no_scores(tracer):
    said = []
    assert FlowReward(tracer)([], [], [], log_metric=lambda *metric: said.append(metric)) == []


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
@pytest.mark.parametrize("ids", [True, False])
def test_messages_that_only_call_tools_are_read(content, ids):
    tokenizer = tiny_tokenizer(chat=True)
    tracer = ft.wrap(tiny_llama(), tokenizer, preset="paper")
    calls = {"role": "assistant", "tool_calls": [CALL], **content}
    prompt = [
        {"role": "user", "content": "3 + 1?"}, calls, {"role": "tool", "content": "4"}
    ]  # fmt: skip
    completions = [[{"role": "assistant", "content": "It is 4."}], [calls]]
    said = [tokenizer.encode("It is 4."), tokenizer.encode("add")]
    given = said if ids else None
    found = FlowReward(tracer)([prompt] * 2, completions, given)
    assert found[0] is not None
    assert found[1] is None
    assert rewards.math_answer(completions, ["4", "4"]) == [1.0, 0.0]


def test_what_is_no_message_is_no_answer(tracer):
    strange = [["a"], [None], {"role": "assistant", "content": "7"}, None, [{"content": [None]}]]
    assert rewards.math_answer(strange, ["7"] * 5) == [0.0] * 5
    with pytest.raises(ValueError, match="a completion must be text or one message of text"):
        FlowReward(tracer)(["How many?"], [["a"]])


def slow_concentration(flow):
    """1 - perplexity / length of the flow over the tokens before the answer."""
    total = sum(flow)
    if not total:
        return 0.0
    entropy = -sum(part / total * math.log(part / total) for part in flow if part)
    return 1 - math.exp(entropy) / len(flow)


def test_concentration_is_that_of_the_slow_definition(policy, tracer):
    scores = call(FlowReward(tracer, score="concentration"))
    model = AutoModelForCausalLM.from_pretrained(policy)
    for row, (text, place) in enumerate(zip(TEXTS, ANSWERS, strict=True)):
        asked, said = words(PROMPTS[row // 2]), words(text)
        attention = eager_attention(model, asked + said, (2, 3)).numpy()
        tokens = np.arange(len(asked) + len(said))
        question, answer = (tokens > 0) & (tokens < len(asked)), tokens == len(asked) + place
        flow = reference.flow(attention, question, answer)["throughput"]
        wanted = slow_concentration(flow[len(asked) : len(asked) + place].tolist())
        assert scores[row] == pytest.approx(wanted, abs=1e-5)
    assert scores[2] == 0  # one token is not uneven
    assert len(set(scores)) == 4


def measured(flow):
    flow = torch.tensor([flow], dtype=torch.float64)
    return concentration(flow, torch.ones_like(flow, dtype=torch.bool)).item()


flows = st.lists(st.floats(0, 1).map(lambda x: 0.0 if x < 1e-6 else x), min_size=1, max_size=12)


@given(flows)
def test_concentration_is_at_least_0_and_below_1(flow):
    assert measured(flow) == pytest.approx(slow_concentration(flow), abs=1e-9)
    assert 0 <= measured(flow) <= 1 - 1 / len(flow)


@given(flows, st.integers(2, 5), st.floats(0.1, 10), st.randoms())
def test_concentration_has_one_scale_for_every_length(flow, parts, scale, shuffle):
    split = [scale * part / parts for part in flow for _ in range(parts)]
    shuffle.shuffle(split)
    assert measured(split) == pytest.approx(measured(flow), abs=1e-9)


def test_concentration_by_hand():
    assert measured([0.25] * 4) == 0
    assert measured([0, 0, 3, 0]) == pytest.approx(0.75)
    assert measured([1, 1, 0, 0]) == pytest.approx(0.5)
    assert measured([0, 0]) == measured([5]) == 0


def test_only_tokens_before_the_answer_count(tracer):
    flow_reward = FlowReward(tracer, score="concentration")
    texts = ["so 3 is then 7", "so 3 is then 7 so then is so then", "#### 7"]
    before, after, bare = call(flow_reward, texts, [PROMPTS[0]] * 3)
    assert after == before > 0  # the phrase after the answer carries no flow
    assert bare == 0


def test_an_answer_at_the_start_leaves_nothing_to_concentrate(tracer):
    assert call(FlowReward(tracer, score="concentration"), ["7"]) == [0.0]
    assert call(FlowReward(tracer), ["7"]) == [0.0]


@pytest.mark.parametrize("target", ["answer", "decision"])
def test_reasoning_is_the_text_between_prompt_and_answer(policy, target):
    model = AutoModelForCausalLM.from_pretrained(policy)
    tracer = ft.wrap(model, word_tokenizer(), target=target, answer="last_number", preset="paper")
    asked, said = torch.tensor([words("3 plus 4 is")] * 2), words("so 1 then 9 so")
    mask = torch.ones_like(asked)
    batch = tracer.trace_ids(
        asked, torch.tensor([said, words("so so so so so")]), mask, torch.ones(2, 5).long()
    )
    wanted = [4, 5, 6] if target == "answer" else [4, 5]
    assert batch.reasoning[0].nonzero().squeeze(-1).tolist() == wanted
    assert not batch.reasoning[1].any()


@pytest.mark.parametrize("score", SCORES)
def test_no_answer_is_no_opinion(tracer, score):
    flow_reward = FlowReward(tracer, score=score, batch_size=2)
    scores = call(flow_reward, ["so then", "", "so", "is 3", ""])
    assert [score is None for score in scores] == [True, True, True, False, True]
    assert call(flow_reward, ["", ""]) == [None, None]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_reward_does_not_depend_on_the_batch(tracer, batch_size, score):
    wanted = call(FlowReward(tracer, score=score))
    found = call(FlowReward(tracer, score=score, batch_size=batch_size))
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def given_outcome(prompts, completions, completion_ids, outcome, **columns):
    return outcome


@pytest.mark.parametrize("score", SCORES)
def test_an_outcome_is_scaled_and_a_negative_one_stays(tracer, score):
    texts = [*TEXTS[:2], "so then", "so then", *TEXTS[2:]]
    outcome = [1.0, -1.0, 1.0, -1.0, 0.0, None]
    alone = call(FlowReward(tracer, score=score), texts)
    scores = call(FlowReward(tracer, score=score, outcome=given_outcome), texts, outcome=outcome)
    assert scores == [pytest.approx(alone[0]), -1.0, 0.0, -1.0, 0.0, None]


def test_names_describe_the_score(tracer):
    assert FlowReward(tracer).__name__ == "reasoning_share"
    assert FlowReward(tracer, score="concentration").__name__ == "concentration"
    both = FlowReward(tracer, outcome=given_outcome)
    assert both.__name__ == "given_outcome_x_reasoning_share"
    assert FlowReward(tracer, name="mine").__name__ == "mine"


# the arguments that trainers pass


def test_messages_go_through_the_chat_template_as_trl_does_it(tracer, monkeypatch):
    seen, trace = [], tracer.trace_ids
    monkeypatch.setattr(tracer, "trace_ids", lambda *a, **k: seen.append(a) or trace(*a, **k))
    messages = [{"role": "user", "content": PROMPTS[0]}]
    scores = FlowReward(tracer)(
        prompts=[messages],
        completions=[[{"role": "assistant", "content": TEXTS[0]}]],
        completion_ids=[words(TEXTS[0])],
    )
    wanted = word_tokenizer().apply_chat_template(messages, add_generation_prompt=True)
    assert seen[0][0][0].tolist() == wanted["input_ids"]
    question = [False] + [True] * (len(words(PROMPTS[0])) - 1) + [False] * 2  # the template's words
    same = tracer.trace_tokens(words(f"{PROMPTS[0]} so then"), words(TEXTS[0]), question=question)
    assert scores == pytest.approx([same.reasoning_share], rel=1e-5)


def test_a_reward_may_mix_texts_and_messages(tracer):
    messages = [{"role": "user", "content": PROMPTS[1]}]
    both = call(FlowReward(tracer), TEXTS[:2], [PROMPTS[0], messages])
    assert both == pytest.approx(
        [
            *call(FlowReward(tracer), TEXTS[:1], [PROMPTS[0]]),
            *call(FlowReward(tracer), TEXTS[1:2], [messages]),
        ],
        rel=1e-5,
    )


def parts(text):
    """The text as the parts of a message's content."""
    first, second, *rest = text.split(" ", 2)
    pieces = [f"{first} ", f"{second} ", *rest]
    return [{"type": "text", "text": piece} for piece in pieces]


@pytest.mark.parametrize("ids", [True, False])
def test_content_may_be_a_list_of_parts(tracer, ids):
    def scored(content):
        return FlowReward(tracer)(
            prompts=[[{"role": "user", "content": content(PROMPTS[0])}]],
            completions=[[{"role": "assistant", "content": content(TEXTS[0])}]],
            completion_ids=[words(TEXTS[0])] if ids else None,
        )

    assert scored(parts) == scored(str)


def test_images_are_refused(tracer):
    content = [{"type": "image"}, {"type": "text", "text": PROMPTS[0]}]
    with pytest.raises(NotImplementedError, match="FlowReward reads text only"):
        call(FlowReward(tracer), TEXTS[:1], [[{"role": "user", "content": content}]])


def test_trainers_that_give_no_ids_get_a_score_for_the_text(tracer):
    flow_reward = FlowReward(tracer)
    wanted = call(flow_reward)
    prompts = [PROMPTS[row // 2] for row in range(4)]
    assert flow_reward(prompts=prompts, completions=TEXTS) == wanted
    messages = [[{"role": "assistant", "content": text}] for text in TEXTS]
    assert flow_reward(prompts=prompts, completions=messages) == wanted


def test_several_messages_need_ids(tracer):
    said = [
        {"role": "assistant", "content": "so 3"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "is 7"},
    ]
    with pytest.raises(ValueError, match="without completion_ids a completion must be text or one"):
        FlowReward(tracer)(prompts=PROMPTS[:1], completions=[said])
    scores = FlowReward(tracer)(
        prompts=PROMPTS[:1], completions=[said], completion_ids=[words("so 3 4 is 7")]
    )
    assert scores == call(FlowReward(tracer), ["so 3 4 is 7"])


def test_padding_behind_the_ids_does_not_matter(tracer, monkeypatch):
    """`OnlineDPOTrainer` passes the ids of its batch with their padding."""
    wanted = call(FlowReward(tracer))
    seen, trace = [], tracer.trace_ids
    monkeypatch.setattr(tracer, "trace_ids", lambda *a, **k: seen.append(a) or trace(*a, **k))
    scores = FlowReward(tracer)(
        prompts=[PROMPTS[row // 2] for row in range(4)],
        completions=TEXTS,
        completion_ids=[words(text) + [0] * (20 - len(words(text))) for text in TEXTS],
    )
    assert scores == wanted
    assert seen[0][1].shape[1] == 8


def test_ids_of_another_tokenizer_are_noticed_and_the_text_can_be_read_instead():
    flow_reward = FlowReward(ft.wrap(tiny_llama(), tiny_tokenizer(), preset="paper"))
    with pytest.raises(ValueError, match="not that of the trained model") as error:
        call(flow_reward)
    assert "FlowReward(tracer, retokenize=True)" in str(error.value)
    again = FlowReward(flow_reward.tracer, retokenize=True)
    assert call(again) == again(prompts=[PROMPTS[row // 2] for row in range(4)], completions=TEXTS)


def test_the_outcome_gets_the_trainers_arguments(tracer):
    def spy(**given):
        seen.update(given)
        return [1.0]

    seen, ids = {}, [[*words("is 2"), 0, 0]]
    FlowReward(tracer, outcome=spy)(
        prompts=PROMPTS[:1], completions=["is 2"], completion_ids=ids, column=[5], log_metric=print
    )
    assert seen.pop("completion_ids") is ids
    assert seen == {
        "prompts": PROMPTS[:1],
        "completions": ["is 2"],
        "column": [5],
        "log_metric": print,
    }


def random_states(model):
    modes = [module.training for module in model.modules()]
    return (
        modes,
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002 - the global one
    )


@pytest.mark.usefixtures("unchecked")  # the checker draws random numbers itself
@pytest.mark.parametrize("score", SCORES)
def test_the_reward_leaves_mode_and_random_numbers_alone(tracer, score):
    tracer.model.train()
    tracer.model.model.layers[0].eval()
    before = random_states(tracer.model)
    call(FlowReward(tracer, score=score))
    assert random_states(tracer.model) == before


# trainers


@pytest.mark.parametrize("shared", [True, False], ids=["the policy", "another model"])
def test_the_reward_trains_in_unmodified_grpo(policy, tmp_path, tracer, shared):
    model = tracer.model if shared else policy
    flow_reward = FlowReward(tracer, name="reasoning")
    trainer = build(GRPOTrainer, model, tmp_path, [reward, flow_reward], max_steps=3)
    trainer.train()
    means = [step.get("rewards/reasoning/mean") for step in trainer.state.log_history]
    assert any(mean is not None and 0 < mean <= 1 for mean in means)
    found = [step["reasoning/answer_found"] for step in trainer.state.log_history[:3]]
    assert all(0 <= share <= 1 for share in found)
    assert max(found) > 0


def test_a_weight_of_zero_trains_as_without_the_reward(policy, tmp_path, tracer):
    """So the reward itself changes neither the policy nor the next samples."""
    states = []
    for funcs, weights in (([reward], [1.0]), ([reward, FlowReward(tracer)], [1.0, 0.0])):
        trainer = build(GRPOTrainer, policy, tmp_path, funcs, reward_weights=weights, max_steps=3)
        trainer.train()
        states.append(trainer.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def right_digit(prompts, completions, completion_ids, digit, **columns):
    """A reward that needs a column of the data set."""
    return [float(str(wanted) in text) for wanted, text in zip(digit, completions, strict=True)]


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_columns_reach_the_outcome(policy, tmp_path, tracer, kind):
    rows = {"prompt": PROMPTS * 4, "digit": [7] * 16}
    funcs = [FlowReward(tracer, score=score, outcome=right_digit) for score in SCORES]
    if kind == "grpo":
        trainer = build(GRPOTrainer, policy, tmp_path, funcs, rows=rows)
    else:
        trainer = build_rloo(policy, tmp_path, funcs, rows)
    trainer.train()
    log = trainer.state.log_history[0]
    assert all(f"rewards/right_digit_x_{score}/mean" in log for score in SCORES)


@pytest.mark.parametrize("chat", [False, True], ids=["texts", "messages"])
def test_the_reward_trains_in_unmodified_online_dpo(policy, tmp_path, tracer, chat):
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    prompts = [[{"role": "user", "content": text}] for text in PROMPTS] if chat else PROMPTS
    flow_reward = FlowReward(tracer, outcome=right_digit)
    seen, score = [], flow_reward.__call__

    def spied(**given):
        seen.append(score(**given))
        return seen[-1]

    args = OnlineDPOConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        max_steps=2,
        max_new_tokens=8,
        max_length=32,
    )
    trainer = OnlineDPOTrainer(
        AutoModelForCausalLM.from_pretrained(policy),
        reward_funcs=[flow_reward, spied],
        args=args,
        processing_class=word_tokenizer(),
        train_dataset=Dataset.from_dict({"prompt": prompts * 4, "digit": [7] * 16}),
    )
    before = {name: part.clone() for name, part in trainer.model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(part, before[n]) for n, part in trainer.model.named_parameters())
    assert len(seen) == 2
    assert all(len(scores) == 8 and None not in scores for scores in seen)


# a reward in other processes


@pytest.mark.parametrize("score", SCORES)
def test_the_reward_can_be_pickled(tracer, score):
    flow_reward = FlowReward(
        tracer, score=score, outcome=given_outcome, name="mine", batch_size=3, retokenize=True
    )
    again = pickle.loads(pickle.dumps(flow_reward))
    outcome = [1.0, 0.5, 0.25, 2.0]
    assert call(again, outcome=outcome) == call(flow_reward, outcome=outcome)
    assert (again.__name__, again.batch_size, again.retokenize) == ("mine", 3, True)
    assert again.tracer.layers == tracer.layers


def test_the_reward_works_in_a_spawned_child(policy, tracer, monkeypatch):
    """Asynchronous GRPO scores in a process of its own."""
    monkeypatch.setenv("FLOWTRACER_MODEL", policy)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    flow_reward = FlowReward(tracer)
    arguments = {
        "prompts": [PROMPTS[row // 2] for row in range(4)],
        "completions": TEXTS,
        "completion_ids": [words(text) for text in TEXTS],
    }
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for sent in (flow_reward, rewards.reasoning_share):
            found = pool.apply(sent, kwds=arguments)
            assert found == pytest.approx(call(flow_reward), rel=1e-5)


def test_a_tracer_can_be_made_when_it_is_needed(tracer):
    made = []
    flow_reward = FlowReward(lambda: made.append(tracer) or tracer)
    assert not made
    assert call(flow_reward) == call(FlowReward(tracer))
    call(flow_reward)
    assert len(made) == 1
    with pytest.raises(TypeError, match="FlowReward needs a tracer, got NoneType"):
        call(FlowReward(lambda: None))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", ["nothing", "none", "model"])
def test_a_reward_without_a_tracer_says_how_to_make_one(policy, wrong):
    model = AutoModelForCausalLM.from_pretrained(policy)
    arguments = {"nothing": (), "none": (None,), "model": (model,)}[wrong]
    with pytest.raises(TypeError, match=r"FlowReward\(flowtracer_plugin.wrap\(model, tokenizer\)"):
        FlowReward(*arguments)
    assert call(FlowReward(ft.wrap(model, word_tokenizer(), preset="paper")))


def test_a_reward_needs_a_tokenizer_a_score_and_a_size(tracer):
    with pytest.raises(ValueError, match=r"no tokenizer; make it with wrap\(model, tokenizer\)"):
        FlowReward(ft.wrap(tracer.model, preset="paper"))
    with pytest.raises(
        ValueError, match="score must be one of reasoning_share, concentration, got"
    ):
        FlowReward(tracer, score="share")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        FlowReward(tracer, batch_size=0)


async def async_outcome(**columns):
    return []


class AsyncOutcome:
    async def __call__(self, **columns):
        return []


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "outcome", ["accuracy", async_outcome, AsyncOutcome(), torch.nn.Linear(1, 1)]
)
def test_an_outcome_must_be_a_plain_function(tracer, outcome):
    with pytest.raises(TypeError, match="outcome must be a reward function that is not async"):
        FlowReward(tracer, outcome=outcome)


# rewards by name


@pytest.fixture
def fresh():
    """As in a process that has not loaded the model of the environment yet."""
    for cached in (rewards._reward, rewards._tracer):
        cached.cache_clear()
    yield
    for cached in (rewards._reward, rewards._tracer):
        cached.cache_clear()


@pytest.mark.usefixtures("fresh", "unchecked")
@pytest.mark.parametrize("name", SCORES)
def test_a_named_reward_traces_the_model_of_the_environment(policy, tracer, monkeypatch, name):
    monkeypatch.setenv("FLOWTRACER_MODEL", policy)
    before = random_states(tracer.model)
    found = call(getattr(rewards, name))
    assert random_states(tracer.model) == before
    assert found == pytest.approx(call(FlowReward(tracer, score=name)), rel=1e-5)
    assert getattr(rewards, name).__name__ == rewards._reward(name).__name__ == name
    monkeypatch.delenv("FLOWTRACER_MODEL")
    assert call(getattr(rewards, name)) == found  # loaded once


@pytest.mark.usefixtures("fresh")
def test_loading_draws_no_random_number_even_where_files_lack_weights(
    policy, tmp_path, monkeypatch
):
    folder = tmp_path / "without_head"
    shutil.copytree(policy, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setenv("FLOWTRACER_MODEL", str(folder))
    before = torch.get_rng_state()
    call(rewards.reasoning_share)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("fresh")
def test_right_answers_are_paid_their_reasoning_share(policy, tracer, monkeypatch):
    monkeypatch.setenv("FLOWTRACER_MODEL", policy)
    shares = call(FlowReward(tracer))
    found = call(rewards.math_flow, answer=["7", "8", "2", "5"])
    assert found == pytest.approx([shares[0], 0.0, shares[2], shares[3]], rel=1e-5)


@pytest.mark.usefixtures("fresh")
def test_without_the_variable_the_message_names_it_and_it_helps(policy, monkeypatch):
    monkeypatch.delenv("FLOWTRACER_MODEL", raising=False)
    with pytest.raises(ValueError, match="the environment variable FLOWTRACER_MODEL names"):
        call(rewards.reasoning_share)
    monkeypatch.setenv("FLOWTRACER_MODEL", policy)
    monkeypatch.setenv("FLOWTRACER_DEVICE", "cpu")
    assert call(rewards.reasoning_share)


@pytest.mark.usefixtures("fresh")
def test_trls_own_script_takes_them_by_their_path(policy, tmp_path, monkeypatch):
    from trl.scripts import grpo

    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("FLOWTRACER_MODEL", policy)
    write_rows(tmp_path / "data" / "train.jsonl", answer="7")
    arguments = command_line(tmp_path, policy, "math_answer", "reasoning_share", "concentration")
    grpo.main(*grpo.make_parser().parse_args_and_config(arguments))
    logged = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())
    for name in ("math_answer", "reasoning_share", "concentration"):
        assert f"rewards/{name}/mean" in logged["log_history"][0]


@pytest.mark.slow
def test_the_command_trl_takes_them_by_their_path(policy, tmp_path):
    """The environment variables come from the file that `--config` names."""
    write_rows(tmp_path / "data" / "train.jsonl", answer="7")
    (tmp_path / "run.yaml").write_text(f"env:\n  FLOWTRACER_MODEL: {policy}\n")
    arguments = [
        "--config",
        str(tmp_path / "run.yaml"),
        *command_line(tmp_path, policy, "math_flow"),
    ]
    script = Path(sys.executable).parent / "trl"
    ran = subprocess.run(
        [script, "grpo", *arguments], capture_output=True, text=True, check=False, timeout=240
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "rewards/math_flow/mean" in ran.stdout


def write_rows(path, **columns):
    path.parent.mkdir()
    rows = [{"prompt": prompt, **columns} for prompt in PROMPTS * 2]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command_line(folder, policy, *names):
    return [
        *("--model_name_or_path", policy, "--dataset_name", str(folder / "data")),
        *("--output_dir", str(folder / "out"), "--use_cpu", "true", "--bf16", "false"),
        *("--max_steps", "2", "--num_generations", "2", "--max_completion_length", "8"),
        *("--per_device_train_batch_size", "4", "--logging_steps", "1", "--disable_tqdm", "true"),
        *("--reward_funcs", *(f"flowtracer_plugin.rewards.{name}" for name in names)),
    ]


# right answers


@pytest.mark.parametrize(
    ("said", "wanted", "verdict"),
    [
        ("so 3 + 4 = 7", "7", 1.0),
        ("so 3 + 4 = 7", 7, 1.0),
        ("#### 72", "Natalia sold 48+24 = <<48+24=72>>72 clips.\n#### 72", 1.0),
        ("#### 73", "Natalia sold 48+24 = <<48+24=72>>72 clips.\n#### 72", 0.0),
        ("#### 72 clips", "72", 1.0),
        (r"\boxed{\frac{1}{2}}", "1/2", 1.0),
        (r"\boxed{0.5}", r"So it is \boxed{\frac12}.", 1.0),
        (r"\boxed{-0.5}", "1/2", 0.0),
        ("The answer is $1,234.00.", "1234", 1.0),
        (r"\boxed{x = 5}", "5", 1.0),
        ("The answer is Paris.", "Paris", 1.0),
        ("The answer is London.", "Paris", 0.0),
        ("#### 7 and then 8 or so #### 9", "8", 0.0),
        ("I do not know", "7", 0.0),
        ("", "7", 0.0),
        ("7", "", None),
    ],
)
def test_an_answer_is_right_or_not(said, wanted, verdict):
    assert rewards.math_answer(completions=[said], answer=[wanted], prompts=["?"]) == [verdict]
    for content in (said, [{"type": "text", "text": said}]):
        messages = [{"role": "tool", "content": "99"}, {"role": "assistant", "content": content}]
        assert rewards.math_answer(completions=[messages], answer=[wanted]) == [verdict]
    assert rewards.math_answer(completions=[[{"role": "assistant"}]], answer=["7"]) == [0.0]


def test_answers_are_checked_off_the_main_thread_too(caplog):
    found = []
    thread = Thread(target=lambda: found.extend(rewards.math_answer(["#### 7"], ["7"])))
    thread.start()
    thread.join()
    assert found == [1.0]
    assert not caplog.records

    async def inside():
        return rewards.math_answer(["#### 7"], ["8"])

    assert asyncio.run(inside()) == [0.0]


def test_the_right_answers_must_be_in_the_data():
    with pytest.raises(ValueError, match="right answers in a column `answer` of the data"):
        rewards.math_answer(completions=["7"], prompts=["?"])


def test_without_the_parser_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "latex2sympy2_extended", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'flowtracer-plugin\[math\]'"):
        rewards.math_answer(["7"], ["7"])


def test_examples():
    assert doctest.testmod(right_answers) == (0, 1)  # failed, attempted
