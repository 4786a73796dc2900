import pytest
from transformers import PreTrainedTokenizerFast

from flowtracer_plugin.text.encoding import encode_prompt
from tests.tiny import MESSAGES, tiny_tokenizer

READS = (
    "{% generation %}{{ messages[0].thinking }}{% endgeneration %}"
    "{% if enable_thinking is defined and not enable_thinking %}no{% endif %}"
    "{% if not today is defined %}{% set today = strftime_now('%Y') %}{% endif %}"
    "{% set mood = 'good' %}{% for one in messages %}{% if mood %}{% continue %}{% endif %}"
    "{% endfor %}{% macro end(word) %}{{ reasoning_effort }}{% endmacro %}{{ end('effort') }}"
)


@pytest.fixture
def chat():
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = READS
    return tokenizer


@pytest.mark.parametrize(
    "given",
    [
        {"enable_thinking": False, "today": "2026", "reasoning_effort": "low", "bos_token": "<s>"},
        {"tools": [], "documents": [], "add_generation_prompt": False},
        {"chat_template": "{{ other }}", "other": 1},
    ],
)
def test_arguments_that_the_template_or_transformers_reads_are_taken(chat, given):
    chat.chat_template = READS + "{{ bos_token }}"
    assert encode_prompt(chat, MESSAGES, given)


@pytest.mark.parametrize(
    ("name", "wish"),
    [
        ("enable_thinkin", r"did you mean 'enable_thinking'\?"),
        ("thinking", r"did you mean 'enable_thinking'\?"),
        ("add_generation_promt", r"did you mean 'add_generation_prompt'\?"),
        ("mood", "leave it out"),
        ("tokenize", "leave it out"),
        ("return_dict", "leave it out"),
    ],
)
def test_an_argument_that_nobody_reads_is_named(chat, name, wish):
    message = f"this model's chat template reads no argument '{name}'; {wish}"
    with pytest.raises(ValueError, match=message):
        encode_prompt(chat, MESSAGES, {"reasoning_effort": "low", name: True})


def test_each_template_of_several_may_read_an_argument(chat):
    chat.chat_template = {"default": "{{ messages }}", "tool_use": READS}
    assert encode_prompt(chat, MESSAGES, {"enable_thinking": True})
    with pytest.raises(ValueError, match="no argument 'thorough'; leave it out"):
        encode_prompt(chat, MESSAGES, {"thorough": True})


def test_a_tokenizer_with_a_way_of_its_own_reads_what_it_likes(chat, monkeypatch):
    class Own(PreTrainedTokenizerFast):
        def apply_chat_template(self, messages, *, loud, **_):
            return messages[0]["content"].upper() if loud else ""

    chat.__class__ = Own
    assert encode_prompt(chat, MESSAGES, {"loud": True})[1] == MESSAGES[0]["content"].upper()
