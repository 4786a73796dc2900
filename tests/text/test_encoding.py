import inspect

import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from flowtracer_plugin.text.encoding import (
    encode_prompt,
    encode_response,
    is_text,
    user_text,
    user_turns,
)
from tests.tiny import MESSAGES, PROMPT, tiny_tokenizer


@pytest.fixture(scope="module")
def plain():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def chat():
    return tiny_tokenizer(chat=True)


@pytest.fixture(scope="module")
def spacing():
    """A tokenizer that puts a space before every text, as Llama 2's does."""
    vocab = {name: place for place, name in enumerate(["<unk>", "▁", "▁a", "▁b", "▁2"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_a_text_is_encoded_unchanged(plain):
    ids, text = encode_prompt(plain, PROMPT)
    assert text == PROMPT
    assert plain.decode(ids) == PROMPT


def test_a_text_that_begins_with_the_first_token_has_it_once():
    tokenizer = tiny_tokenizer()
    first = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", first)]
    )
    bare, _ = encode_prompt(tokenizer, PROMPT)
    templated, text = encode_prompt(tokenizer, f"<s>{PROMPT}")
    assert bare == templated
    assert bare.count(first) == 1
    assert text == f"<s>{PROMPT}"


def test_messages_go_through_the_chat_template_once(chat):
    ids, text = encode_prompt(chat, MESSAGES)
    assert text == f"<s><|user|>\n{PROMPT}</s>\n<|assistant|>\n"
    assert ids.count(chat.bos_token_id) == 1
    assert chat.decode(ids) == text


def test_messages_need_a_template_and_a_string_does_not(plain):
    with pytest.raises(ValueError, match="this one has none; pass the prompt as a string"):
        encode_prompt(plain, MESSAGES)
    assert encode_prompt(plain, MESSAGES[0]["content"])[0]


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(chat, prompt):
    with pytest.raises(ValueError, match="the prompt is empty"):
        encode_prompt(chat, prompt)


def test_a_response_continues_the_prompt(plain):
    ids = encode_response(plain, PROMPT, " He had 3.")
    assert plain.decode(ids) == " He had 3."
    assert plain(PROMPT)["input_ids"] + ids == plain(PROMPT + " He had 3.")["input_ids"]


def test_no_space_is_added_between_prompt_and_response(spacing):
    def names(ids):
        return spacing.convert_ids_to_tokens(ids)

    assert names(spacing(" b 2")["input_ids"]) == ["▁", "▁b", "▁2"]
    assert names(encode_response(spacing, "a a", " b 2")) == ["▁b", "▁2"]


def test_a_response_that_would_change_the_prompts_last_token_is_encoded_alone(plain):
    # " apples" is one token, and this prompt ends within the word
    prompt, response = "Tom had 3 app", "les."
    joint = plain(prompt + response)["input_ids"]
    assert joint[: len(plain(prompt)["input_ids"])] != plain(prompt)["input_ids"]
    ids = encode_response(plain, prompt, response)
    assert ids == plain(response)["input_ids"]


def test_an_empty_response_has_no_tokens(plain):
    assert encode_response(plain, PROMPT, "") == []


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("text", "text"),
        (MESSAGES, PROMPT),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "a"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "b"),
        ([{"role": "system", "content": "a"}], None),
    ],
)
def test_user_text_is_the_last_message_of_the_user(prompt, words):
    assert user_text(prompt) == words


def test_content_may_be_a_list_of_text_parts(chat):
    first, second = PROMPT[:9], PROMPT[9:]
    parts = [{"type": "text", "text": first}, {"type": "text", "text": second}]
    messages = [{"role": "user", "content": parts}]
    assert encode_prompt(chat, messages) == encode_prompt(chat, MESSAGES)
    assert user_text(messages) == user_text(MESSAGES) == PROMPT
    assert messages[0]["content"] is parts


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("a", True),
        ([], True),
        ([{"type": "text", "text": "a"}], True),
        ([{"type": "text", "text": "a"}, {"type": "image"}], False),
        ([{"type": "image"}], False),
        (["a"], False),
        (None, False),
    ],
)
def test_is_text(content, wanted):
    assert is_text(content) is wanted


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    "extra",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [CALL], "content": None},
        {"tool_calls": [CALL], "content": ""},
        {"function_call": CALL["function"]},
    ],
)
def test_a_message_that_only_calls_tools_needs_no_content(chat, extra):
    messages = [
        {**MESSAGES[0], "tool_calls": None},  # as a table holds it
        {"role": "assistant", **extra},
        {"role": "tool", "content": "5"},
    ]
    text = encode_prompt(chat, messages)[1]
    assert text == (
        f"<s><|user|>\n{PROMPT}</s>\n<|assistant|>\n</s>\n<|tool|>\n5</s>\n<|assistant|>\n"
    )
    assert user_text(messages) == PROMPT


def test_a_template_may_need_content_in_every_message():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ';' }}{% endfor %}"
    for given in ({}, {"content": None}, {"content": ""}):
        messages = [MESSAGES[0], {"role": "assistant", "tool_calls": [CALL], **given}]
        assert encode_prompt(tokenizer, messages)[1] == f"{PROMPT};;"
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(TemplateError, match="no"):
        encode_prompt(tokenizer, MESSAGES)


@pytest.mark.parametrize(
    "message", [{"role": "user"}, {"content": "a"}, {"role": "assistant", "tool_calls": None}]
)
def test_a_message_without_role_or_anything_said_is_refused(chat, message):
    with pytest.raises(ValueError, match=r"needs 'role' and 'content', got \{.*\}; only"):
        encode_prompt(chat, [message])


@pytest.mark.parametrize("message", ["a", None, ["role", "content"]])
def test_a_message_that_is_none_is_refused(chat, message):
    encode = inspect.unwrap(encode_prompt)  # the tests' type checker would refuse it first
    with pytest.raises(ValueError, match="a chat message needs 'role' and 'content', got "):
        encode(chat, [message])
    with pytest.raises(ValueError, match="a chat message needs 'role' and 'content', got 'role'"):
        encode(chat, MESSAGES[0])


@pytest.mark.parametrize(
    "content", [5, {"a": 1}, ["a"], [None], [{"type": "text"}], [{"type": "text", "text": None}]]
)
def test_content_of_another_kind_is_refused(chat, content):
    with pytest.raises(ValueError, match="must be a text or a list of parts, and each part of"):
        encode_prompt(chat, [{"role": "user", "content": content}])


def test_a_template_that_cannot_take_parts_is_named():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ';' }}{% endfor %}"
    parts = [{"type": "image"}, {"type": "text", "text": "a"}]
    with pytest.raises(ValueError, match=r"template cannot take these messages .*; pass texts"):
        encode_prompt(tokenizer, [{"role": "user", "content": parts}])


def test_the_users_words_are_none_where_they_are_not_only_text():
    parts = [{"type": "image"}, {"type": "text", "text": "a"}]
    assert user_text([{"role": "user", "content": parts}]) is None


SYSTEM_ADDED = (
    "{% if messages[0]['role'] != 'system' %}system: You are kind.\n{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
)
STRIPPED = (
    "{% for message in messages %}{% if message.role == 'user' %}[INST] "
    "{% if loop.first %}Be kind. {% endif %}{{ message.content | trim }} [/INST]"
    "{% else %} {{ message.content | trim }} {% endif %}{% endfor %}"
)
FOLDED = (
    "[INST] {% for message in messages %}{{ (message.content ~ ' ').strip() }}\n{% endfor %}[/INST]"
)


def said(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("template", "messages", "wanted"),
    [
        (SYSTEM_ADDED, [said("user", "Who?")], ["Who?"]),
        # The same words stand in the template's system prompt, and in other roles' words.
        (SYSTEM_ADDED, [said("user", "You are kind.")], ["You are kind."]),
        (SYSTEM_ADDED, [said("system", "Who?"), said("user", "Who?")], ["Who?"]),
        (
            SYSTEM_ADDED,
            [said("user", "a b"), said("assistant", "a b"), said("user", "b")],
            ["a b", "b"],
        ),
        (SYSTEM_ADDED, [said("user", "Why\nuser: me?\n")], ["Why\nuser: me?\n"]),
        (STRIPPED, [said("user", "\n 3 + 4 \n")], ["3 + 4"]),
        (
            STRIPPED,
            [said("user", "kind "), said("assistant", " x"), said("user", " x")],
            ["kind", "x"],
        ),
        (FOLDED, [said("system", "Be kind. "), said("user", "kind. ")], ["kind."]),
        (SYSTEM_ADDED, [said("user", [{"type": "text", "text": "in parts"}])], ["in parts"]),
        (SYSTEM_ADDED, [said("assistant", "I begin.")], []),
        (SYSTEM_ADDED, [said("user", "")], []),
    ],
)
def test_the_turns_of_the_user_are_found_in_the_templated_text(template, messages, wanted):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    turns = user_turns(tokenizer, messages)
    assert turns.text == encode_prompt(tokenizer, messages)[1]
    assert [turns.text[start:end] for start, end in turns.spans] == wanted
    for start, _ in turns.spans:  # nobody else's words
        before = turns.text[:start]
        assert before.endswith(("user: ", "[INST] ", "Be kind. ", "Be kind.\n")), before


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (SYSTEM_ADDED, "a text"),
        (
            "{% for message in messages %}{{ message.content | upper }}{% endfor %}",
            [said("user", "a")],
        ),
        (
            "{% if messages[0].content != 'a' %}{{ raise_exception('ask for a') }}{% endif %}a",
            [said("user", "a")],
        ),
    ],
    ids=["text", "changed", "checked"],
)
def test_turns_are_unknown_in_a_text_and_where_the_template_changes_the_words(template, prompt):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert user_turns(tokenizer, prompt) is None


def test_the_arguments_of_the_template_reach_both_renderings():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ mood }}{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    turns = user_turns(tokenizer, [said("user", "kind")], {"mood": "kind"})
    assert turns == ("kindkind", ((4, 8),))


def test_an_image_beside_the_words_of_the_user_is_left_out():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for part in messages[0].content %}{{ part.text or '<image>' }}{% endfor %}"
    )
    parts = [
        {"type": "text", "text": "See "},
        {"type": "image"},
        {"type": "text", "text": " this?"},
    ]
    turns = user_turns(tokenizer, [said("user", parts)])
    assert [turns.text[start:end] for start, end in turns.spans] == ["See ", " this?"]
