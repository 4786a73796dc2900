"""Answers that share a forward pass are those that the model gives one by one."""

import pytest

from flowtracer_plugin.model import generation
from flowtracer_plugin.model.generation import breaks_off, generate_ids, generate_many
from tests.tiny import tiny_llama, tiny_tokenizer

PROMPTS = [[1, 7, 9, 4, 8], [5, 11], [3], [6, 3, 12, 10, 14, 9, 5]]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def one_by_one(model, tokenizer, prompts, length):
    return [
        generate_ids(
            model, prompt, tokenizer=tokenizer, max_new_tokens=length, do_sample=False,
            temperature=None, progress=False,
        )
        for prompt in prompts
    ]  # fmt: skip


def calls_of(model, monkeypatch):
    sizes = []
    real = model.generate

    def generate(ids, **settings):
        sizes.append(len(ids))
        return real(ids, **settings)

    monkeypatch.setattr(model, "generate", generate)
    return sizes


@pytest.mark.parametrize("several", [False, True])
def test_a_batch_gives_the_answers_of_one_by_one(tokenizer, several, monkeypatch):
    model = tiny_llama().eval()
    model.generation_config.eos_token_id = None
    free = one_by_one(model, tokenizer, PROMPTS, 12)
    assert {len(one) for one in free} == {12}
    # End tokens that stop the answers at different places, one of which is the padding.
    ends = [free[0][3], free[1][7]] if several else free[0][3]
    model.generation_config.eos_token_id = ends
    tokenizer.pad_token_id = free[0][3]
    wanted = one_by_one(model, tokenizer, PROMPTS, 12)
    assert len({len(one) for one in wanted}) > 1
    sizes = calls_of(model, monkeypatch)
    settings = {"tokenizer": tokenizer, "max_new_tokens": 12}
    assert generate_many(model, PROMPTS, **settings) == wanted
    assert sizes == [4]
    assert generate_many(model, PROMPTS[1:2], **settings) == wanted[1:2]
    assert [breaks_off(model, one) for one in wanted] == [len(one) == 12 for one in wanted]


def test_what_cannot_share_a_pass_is_asked_one_by_one(tokenizer, monkeypatch):
    model = tiny_llama(max_position_embeddings=16).eval()
    model.generation_config.eos_token_id = None
    sizes = calls_of(model, monkeypatch)
    settings = {"tokenizer": tokenizer, "max_new_tokens": 12}
    found = generate_many(model, PROMPTS, **settings)  # seven tokens and twelve are too many
    assert [len(one) for one in found] == [11, 12, 12, 9]
    assert sizes == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="16"):
        generate_many(model, [[1] * 16, [2]], **settings)
    sizes.clear()
    model.generation_config.stop_strings = ["apples"]
    assert not any(breaks_off(model, one) for one in generate_many(model, PROMPTS[:2], **settings))
    model.generation_config.stop_strings = None
    monkeypatch.setattr(generation, "accepted_inputs", lambda model: {"input_ids"})
    generate_many(model, PROMPTS[:2], **settings)
    assert sizes == [1, 1, 1, 1]
