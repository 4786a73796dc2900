import copy
import json
import re
import statistics
from dataclasses import asdict

import pytest
import torch

from flowtracer_plugin.audit.results_file import AuditFile
from flowtracer_plugin.audit.run import BatchAudit, Tilt
from flowtracer_plugin.audit.sampling import Group, padded, rewarded, sample
from tests.tiny import MESSAGES, PROMPT, tiny_llama, tiny_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def drawn(model, seed=(0, 0), completions=6, **others):
    tokenizer = tiny_tokenizer()
    options = {"max_new_tokens": 8, "temperature": 1.0, **others}
    ids = tokenizer.encode(PROMPT)
    return sample(model, tokenizer, ids, completions=completions, seed=seed, **options)


def test_the_seed_decides_the_completions_and_no_random_state_changes(model):
    state = torch.random.get_rng_state()
    first = drawn(model)
    torch.manual_seed(17)
    assert drawn(model) == first
    assert drawn(model, seed=(0, 1)) != first
    assert drawn(model, seed=(1, 0)) != first
    torch.random.set_rng_state(state)
    drawn(model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert len(set(first)) == 6


@pytest.mark.parametrize(
    "setting",
    [
        {"top_k": 1},
        {"top_p": 0.01},
        {"min_p": 0.9},
        {"typical_p": 0.01},
        {"epsilon_cutoff": 0.9},
        {"repetition_penalty": 9.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3},
        {"num_return_sequences": 2},
        {"return_dict_in_generate": True},
        {"token_healing": True},
        {"stop_strings": ["a", "e"]},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_the_sampling_settings_of_a_model_are_ignored(model, setting):
    other = copy.deepcopy(model)
    for name, value in setting.items():
        setattr(other.generation_config, name, value)
    assert drawn(other) == drawn(model)


def test_first_tokens_are_as_frequent_as_the_policy_says(model):
    sharp = copy.deepcopy(model)
    with torch.no_grad():
        sharp.lm_head.weight *= 40
        ids = torch.tensor([tiny_tokenizer().encode(PROMPT)])
        chances = (sharp(ids).logits[0, -1].double() / 2).softmax(-1)
    found = drawn(sharp, completions=2000, max_new_tokens=1, temperature=2.0)
    counts = torch.bincount(torch.tensor([one[0] for one in found]), minlength=len(chances))
    for token in chances.topk(5).indices:
        chance = float(chances[token])
        error = (chance * (1 - chance) / 2000) ** 0.5
        assert float(counts[token]) / 2000 == pytest.approx(chance, abs=4 * error)


def test_dropout_is_off(model):
    training = copy.deepcopy(model).train()
    for module in training.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.9
    assert drawn(training) == drawn(model)
    assert training.training


def test_a_completion_ends_with_the_end_token(model):
    ends = copy.deepcopy(model)
    free = drawn(model)
    ends.generation_config.eos_token_id = [free[0][2], free[1][4]]
    for said in drawn(ends):
        assert not set(said[:-1]) & {free[0][2], free[1][4]}
    assert drawn(ends)[0] == free[0][:3]


def test_a_completion_stops_where_the_context_does(model):
    tokenizer = tiny_tokenizer()
    room = model.config.max_position_embeddings
    ids = (tokenizer.encode(PROMPT) * room)[: room - 3]
    options = {"completions": 2, "temperature": 1.0, "seed": (0,), "max_new_tokens": 50}
    assert {len(said) for said in sample(model, tokenizer, ids, **options)} == {3}
    with pytest.raises(ValueError, match="context"):
        sample(model, tokenizer, ids + ids[:3], **options)


def group(rewards=(1.0, 0.0, 0.0), completions=((5, 6), (7,), (8, 9, 10))):
    return Group(row=3, prompt_ids=(1, 2), completions=completions, rewards=rewards)


def test_advantages_are_those_of_trl():
    rewards = (0.2, 1.0, 0.7)
    mean, spread = statistics.fmean(rewards), statistics.stdev(rewards)
    wanted = [(one - mean) / (spread + 1e-4) for one in rewards]
    assert group(rewards).advantages.tolist() == pytest.approx(wanted)
    assert group(rewards).has_signal
    same = group((0.5, 0.5, 0.5))
    assert same.advantages.tolist() == [0, 0, 0]
    assert not same.has_signal
    with pytest.warns(DeprecationWarning, match="Group.tells has moved to Group.has_signal"):
        assert not same.tells


def test_padding_follows_the_text():
    ids, visible = padded(group(), CPU)
    assert ids.tolist() == [[1, 2, 5, 6, 0], [1, 2, 7, 0, 0], [1, 2, 8, 9, 10]]
    assert visible.sum(-1).tolist() == [4, 3, 5]


# --- rewards ---


def completions():
    return [tiny_tokenizer().encode(text) for text in (" 2", " 3", " 2 apples")]


def test_a_reward_is_called_as_trl_calls_it():
    called = {}

    def reward(**given):
        called.update(given)
        return [1, None, 0.5]

    found = rewarded(reward, tiny_tokenizer(), PROMPT, completions(), {"answer": "2"})
    assert found == (1.0, 0.0, 0.5)
    assert called["prompts"] == [PROMPT] * 3
    assert called["completions"] == [" 2", " 3", " 2 apples"]
    assert called["completion_ids"] == completions()
    assert called["answer"] == ["2"] * 3


def test_the_completions_of_a_chat_are_messages():
    def reward(completions, **_):
        return [float(one[0]["content"] == " 2") for one in completions]

    assert rewarded(reward, tiny_tokenizer(), MESSAGES, completions(), {}) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("found", [[1.0], [1.0, 0.0, float("nan")], []])
def test_a_reward_must_return_one_number_per_completion(found):
    with pytest.raises(ValueError, match="one finite number for each of 3 completions, got"):
        rewarded(lambda **_: found, tiny_tokenizer(), PROMPT, completions(), {})


# --- on disk ---


def batch(number):
    tilt = Tilt(
        with_reference=0.1,
        with_uniform=0.2,
        squared=0.3,
        chosen=2.0,
        entropy=1.5,
        answer=1.0,
        classes=(1.0, 0.0, 0.0, 0.0, 1.0),
    )
    return BatchAudit(
        number=number,
        with_reference=0.5,
        squared=0.7,
        tokens=9,
        classes=(4, 1, 1, 1, 2),
        entropy=3.25,
        tilts={"flow*entropy": tilt},
    )


def test_an_audit_file_is_read_as_it_was_written(tmp_path):
    path, settings = tmp_path / "audit.jsonl", {"seed": 1}
    file = AuditFile(path, settings)
    for found in (group(), batch(2), batch(0)):
        file.add(found)
    path.write_bytes(path.read_bytes() + b'{"batch": {"numb')  # a crash
    again = AuditFile(path, settings)
    assert again.groups == file.groups == {3: group()}
    assert again.batches == file.batches == {2: batch(2), 0: batch(0)}
    assert len(path.read_text().splitlines()) == 4
    with pytest.raises(ValueError, match="holds results with other settings: seed is 1 there"):
        AuditFile(path, {"seed": 2})


def test_without_a_file_everything_is_kept_in_memory():
    file = AuditFile(None, {})
    file.add(group())
    assert file.groups == {3: group()}


@pytest.mark.parametrize("line", ['{"group": {"row": 1}}', '{"love": 1}', "[1]", '{"batch": 3}'])
def test_a_damaged_file_is_refused(tmp_path, line):
    path = tmp_path / "audit.jsonl"
    AuditFile(path, {})
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=re.escape(f"cannot go on with {str(path)!r}")):
        AuditFile(path, {})


def kept(found):
    return {"batch" if isinstance(found, BatchAudit) else "group": asdict(found)}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"group": {"row": "3"}}, "row must be a whole number, found '3'"),
        ({"group": {"prompt_ids": [1.5]}}, r"prompt_ids\[0\] must be a whole number"),
        ({"group": {"completions": [1]}}, r"completions\[0\] must be a list"),
        ({"group": {"rewards": [1.0]}}, "wanted a reward for each completion, found"),
        ({"group": {"completions": [], "rewards": []}}, "wanted a reward for each completion"),
        ({"group": {"rewards": "10"}}, "rewards must be a list"),
        ({"batch": {"squared": None}}, "squared must be a number"),
        ({"batch": {"classes": [1]}}, r"wanted 5 classes, found \[1, 5\]"),
        ({"batch": {"tilts": {}}}, r"wanted the scorers \['flow\*entropy'\], found \[\]"),
        ({"batch": {"tilts": {"flow*entropy": {}}}}, "lacks 'answer'"),
        ({"batch": {}, "group": {}}, "wanted a group or a batch of an audit"),
    ],
)
def test_a_damaged_record_is_named_and_the_file_left_alone(tmp_path, change, problem):
    path, settings = tmp_path / "audit.jsonl", {"scorers": ["flow*entropy"]}
    file = AuditFile(path, settings)
    file.add(group())
    file.add(batch(0))
    AuditFile(path, settings)
    whole = kept(group()) | kept(batch(2))
    record = {name: whole[name] | values for name, values in change.items()}
    path.write_text(path.read_text() + json.dumps(record) + '\n{"gro')
    before = path.read_text()
    with pytest.raises(ValueError, match=rf"audit\.jsonl': line 4 is damaged: .*{problem}"):
        AuditFile(path, settings)
    assert path.read_text() == before
