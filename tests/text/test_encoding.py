import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flowtracer_plugin.text.encoding import encode_prompt, encode_response, is_text, user_text
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
