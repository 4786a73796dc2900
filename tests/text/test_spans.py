import doctest
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from flowtracer_plugin.text import spans
from flowtracer_plugin.text.answers import FoundAnswer
from flowtracer_plugin.text.encoding import encode_prompt
from flowtracer_plugin.text.spans import (
    DecodedTokens,
    answer_mask,
    decode_tokens,
    find_spans,
    question_mask,
    tokens_in_span,
    turns_mask,
)

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
FAMILY = "👨\N{ZERO WIDTH JOINER}👩\N{ZERO WIDTH JOINER}👧"
TEXTS = [
    "",
    "x",
    " x  y ",
    "5 €",
    "naïve café",
    "答案是四十二。",
    f"a {FAMILY} b",
    "\n\t\0",
    UNKNOWN,
]

# Byte-level BPE: every byte is a token, and some hold the end of one character and more.
BYTE_NAMES = {byte: name for name, byte in spans._BYTE_LEVEL.items()}
BYTE_TOKENS = [
    *(bytes([byte]) for byte in range(256)),
    b"\xe2\x82",
    b"\xac 5",
    b" x",
    b"=1",
    b"\xac\xe2",
    "é€".encode(),
]
BOX = ["<|begin_of_box|>", "<|end_of_box|>"]
SPECIAL = ["<|im_end|>", "<|reserved_5|>", "</think>", "<ANSWER>", "</answer>", *BOX]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    names = ["".join(BYTE_NAMES[byte] for byte in token) for token in BYTE_TOKENS]
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    backend.add_tokens([AddedToken("<tool 7>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


# Llama 2's scheme: spaces are ▁, and text outside the vocabulary is written byte by byte.
PIECES = ["▁", "▁▁", "x", "▁x", "é", "1", "▁12", "=1", UNKNOWN, "."]


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    vocab = {name: i for i, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def word_piece_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {name: i for i, name in enumerate(["[UNK]", "play", "##ing", "##ed", "the", "7", "."])}
    backend = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


class SlowByteLevelTokenizer(PreTrainedTokenizer):
    """No backend of the tokenizers library; its tokens are single bytes in GPT-2's alphabet."""

    @property
    def vocab_size(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        return {name: byte for byte, name in BYTE_NAMES.items()} | self.added_tokens_encoder

    def _convert_id_to_token(self, index: int) -> str:
        return BYTE_NAMES[index]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.get_vocab().get(token)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        stored = b"".join(
            bytes(map(spans._BYTE_LEVEL.__getitem__, token))
            if set(token) <= set(spans._BYTE_LEVEL)
            else token.encode()
            for token in tokens
        )
        return stored.decode(errors="replace")


BYTE_LEVEL = byte_level_tokenizer()
BYTE_FALLBACK = byte_fallback_tokenizer()
TOKENIZERS: dict[str, PreTrainedTokenizerBase] = {
    "byte_level": BYTE_LEVEL,
    "byte_fallback": BYTE_FALLBACK,
    "word_piece": word_piece_tokenizer(),
    "slow": SlowByteLevelTokenizer(eos_token="<|end|>"),
}
EVERY_TOKENIZER = pytest.mark.parametrize("name", TOKENIZERS)


def byte_ids(text: str) -> list[int]:
    """One id of the byte-level tokenizer per byte."""
    return list(text.encode())


def fallback_ids(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


def special_id(name: str) -> int:
    found = BYTE_LEVEL.convert_tokens_to_ids(name)
    assert isinstance(found, int)
    return found


def slow_definition(chunks: Sequence[bytes]) -> tuple[str, list[set[int]]]:
    """The text, and the characters that each token touches, by trying all lengths at each byte."""
    stored = b"".join(chunks)
    token_of_byte = [token for token, chunk in enumerate(chunks) for _ in chunk]
    text, touched, at = "", [set[int]() for _ in chunks], 0
    while at < len(stored):
        char, size = UNKNOWN, 1
        for length in (1, 2, 3, 4):
            try:
                char, size = stored[at : at + length].decode(), length
            except UnicodeDecodeError:
                continue
            break
        for token in token_of_byte[at : at + size]:
            touched[token].add(len(text))
        text, at = text + char, at + size
    return text, touched


def touched_by(decoded: DecodedTokens) -> list[set[int]]:
    return [set(range(start, end)) for start, end in zip(decoded.starts, decoded.ends, strict=True)]


def test_the_byte_alphabet_equals_that_of_the_tokenizers_library():
    assert set(spans._BYTE_LEVEL) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(spans._BYTE_LEVEL.values()) == list(range(256))
    backend = decoders.ByteLevel()
    for name, byte in spans._BYTE_LEVEL.items():
        assert backend.decode([name]) == bytes([byte]).decode(errors="replace")


def test_a_token_touches_just_the_characters_whose_bytes_it_holds():
    decoded = decode_tokens(
        BYTE_LEVEL, [BYTE_TOKENS.index(b"\xe2\x82"), BYTE_TOKENS.index(b"\xac 5")]
    )
    assert decoded.text == "€ 5"
    assert decoded.pieces == ("", "€ 5")
    assert touched_by(decoded) == [{0}, {0, 1, 2}]


def test_characters_split_between_all_tokens_are_decoded():
    # E2 82 | AC E2 | 82 | AC E2 | 82: no token but the first begins at a character
    ids = [BYTE_TOKENS.index(b"\xe2\x82"), *[BYTE_TOKENS.index(b"\xac\xe2"), 0x82] * 50, 0xAC]
    decoded = decode_tokens(BYTE_LEVEL, ids)
    assert decoded.text == "€" * 51
    assert touched_by(decoded)[:4] == [{0}, {0, 1}, {1}, {1, 2}]


@EVERY_TOKENIZER
@pytest.mark.parametrize("text", TEXTS)
def test_valid_text_is_what_the_tokenizer_decodes(name, text):
    tokenizer = TOKENIZERS[name]
    ids = fallback_ids(text) if name == "byte_fallback" else byte_ids(text)
    ids = [0, 1, 2, 4, 5, 6] if name == "word_piece" else ids
    decoded = decode_tokens(tokenizer, ids)
    assert decoded.text == "".join(decoded.pieces) == tokenizer.decode(ids)


@given(st.lists(st.integers(0, len(BYTE_TOKENS) - 1), max_size=20))
def test_random_byte_level_ids_obey_the_slow_definition(ids):
    decoded = decode_tokens(BYTE_LEVEL, ids)
    text, touched = slow_definition([BYTE_TOKENS[i] for i in ids])
    assert decoded.text == text
    assert touched_by(decoded) == touched


@given(st.lists(st.integers(3, len(BYTE_FALLBACK) - 1), max_size=20))
def test_random_byte_fallback_ids_obey_the_slow_definition(ids):
    names = BYTE_FALLBACK.convert_ids_to_tokens(ids)
    chunks = [
        bytes.fromhex(name[3:5]) if name.startswith("<0x") else name.replace("▁", " ").encode()
        for name in names
    ]
    if chunks:  # the decoder strips one space at the start of the text
        chunks[0] = chunks[0].removeprefix(b" ")
    text, touched = slow_definition(chunks)
    decoded = decode_tokens(BYTE_FALLBACK, ids)
    assert decoded.text == text
    assert touched_by(decoded) == touched


@EVERY_TOKENIZER
@given(data=st.data())
def test_any_ids_decode_to_pieces_and_spans_that_cover_the_text_in_order(name, data):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    decoded = decode_tokens(tokenizer, ids)
    assert "".join(decoded.pieces) == decoded.text
    assert len(decoded.pieces) == len(decoded.starts) == len(decoded.ends) == len(ids)
    assert (np.diff(decoded.starts) >= 0).all()
    assert (np.diff(decoded.ends) >= 0).all()
    assert (decoded.starts <= decoded.ends).all()
    assert set().union(*touched_by(decoded)) == set(range(len(decoded.text)))
    whole = tokenizer.decode(ids)
    if UNKNOWN not in whole:
        assert decoded.text == whole


@settings(max_examples=30)
@given(st.text(max_size=20), st.data())
def test_a_sampled_segmentation_of_valid_text_keeps_the_text(text, data):
    stored, ids, at = text.encode(), [], 0
    while at < len(stored):
        fitting = [i for i, token in enumerate(BYTE_TOKENS) if stored.startswith(token, at)]
        ids.append(data.draw(st.sampled_from(fitting)))
        at += len(BYTE_TOKENS[ids[-1]])
    decoded = decode_tokens(BYTE_LEVEL, ids)
    assert decoded.text == text == BYTE_LEVEL.decode(ids)
    assert touched_by(decoded) == slow_definition([BYTE_TOKENS[i] for i in ids])[1]


def test_a_split_character_is_in_the_piece_of_its_last_byte():
    decoded = decode_tokens(BYTE_LEVEL, byte_ids(FAMILY))
    assert [piece for piece in decoded.pieces if piece] == list(FAMILY)
    assert [len(piece) for piece in decoded.pieces[:4]] == [0, 0, 0, 1]


def test_the_space_of_a_sentencepiece_token_is_kept_except_at_the_start():
    ids = BYTE_FALLBACK.convert_tokens_to_ids(["▁x", "▁", "▁x", "x", "<0x0A>", "▁12"])
    assert decode_tokens(BYTE_FALLBACK, ids).pieces == ("x", " ", " x", "x", "\n", " 12")
    ids = BYTE_FALLBACK.convert_tokens_to_ids(["▁", "▁x", "</s>", "▁x"])
    assert decode_tokens(BYTE_FALLBACK, ids).pieces == ("", " x", "</s>", " x")


def test_word_pieces_join_as_the_tokenizer_joins_them():
    decoded = decode_tokens(TOKENIZERS["word_piece"], [1, 2, 4, 1, 3])
    assert decoded.pieces == ("play", "ing", " the", " play", "ed")


def test_a_literal_byte_name_in_a_byte_level_vocabulary_is_text():
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<0x41>"])
    assert decode_tokens(tokenizer, [65, len(tokenizer) - 1]).pieces == ("A", "<0x41>")


@EVERY_TOKENIZER
def test_an_id_that_the_tokenizer_does_not_know_is_shown_as_such(name):
    tokenizer, size = TOKENIZERS[name], len(TOKENIZERS[name])
    ids = [1, 2, 3]
    shown = [f"<|unknown {size}|>", f"<|unknown {size + 1000}|>"]
    decoded = decode_tokens(tokenizer, [size, *ids, size + 1000])
    known = decode_tokens(tokenizer, ids)
    assert decoded.pieces == (shown[0], *known.pieces, shown[1])
    assert decoded.text == shown[0] + known.text + shown[1]
    assert decode_tokens(tokenizer, [size]).text == shown[0]


def test_an_unknown_id_may_cut_a_character():
    start, *rest = byte_ids("€")
    size = len(BYTE_LEVEL)
    decoded = decode_tokens(BYTE_LEVEL, [start, size, *rest])
    assert decoded.text == f"\ufffd<|unknown {size}|>\ufffd\ufffd"


@EVERY_TOKENIZER
def test_an_id_below_zero_is_refused(name):
    with pytest.raises(ValueError, match="wanted token ids of at least 0, found -100; leave out"):
        decode_tokens(TOKENIZERS[name], [0, -1, -100])


def test_ids_with_gaps_may_exceed_the_vocabulary_size():
    backend = Tokenizer(models.WordLevel(vocab={"<unk>": 0, "a": 7}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert decode_tokens(tokenizer, [7]).text == "a"
    assert decode_tokens(tokenizer, [7, 1]).text == "a<|unknown 1|>"


def test_an_unknown_id_is_no_answer_and_no_part_of_one():
    size = len(BYTE_LEVEL)
    mask, found = answer_mask(BYTE_LEVEL, [*byte_ids("x 12"), size, *byte_ids("7"), size + 3])
    assert mask.tolist() == [False] * 5 + [True, False]
    assert found.rule == "last_number"
    assert answer_mask(BYTE_LEVEL, [size, size + 3]) is None


@pytest.mark.usefixtures("unchecked")
def test_ids_may_be_a_tensor():
    ids = torch.tensor([*byte_ids("x 12"), special_id("<|im_end|>")])
    mask, _ = answer_mask(BYTE_LEVEL, ids)
    assert mask.tolist() == answer_mask(BYTE_LEVEL, ids.tolist())[0].tolist()
    assert (
        question_mask(BYTE_LEVEL, ids).tolist() == question_mask(BYTE_LEVEL, ids.tolist()).tolist()
    )


def test_no_ids_decode_to_no_text():
    assert decode_tokens(BYTE_LEVEL, []).pieces == ()


def test_a_span_that_begins_in_a_token_takes_the_whole_token():
    decoded = decode_tokens(BYTE_LEVEL, [0x78, BYTE_TOKENS.index(b"=1"), 0x30, 0x2E])
    assert decoded.text == "x=10."
    assert tokens_in_span(decoded, 2, 4).tolist() == [False, True, True, False]
    assert not tokens_in_span(decoded, 2, 2).any()


@given(st.lists(st.integers(0, len(BYTE_TOKENS) - 1), min_size=1, max_size=12), st.data())
def test_tokens_in_a_span_are_those_that_hold_a_byte_of_it(ids, data):
    decoded = decode_tokens(BYTE_LEVEL, ids)
    start = data.draw(st.integers(0, len(decoded.text)))
    end = data.draw(st.integers(start, len(decoded.text)))
    wanted = [bool(chars & set(range(start, end))) for chars in touched_by(decoded)]
    assert tokens_in_span(decoded, start, end).tolist() == wanted


def test_a_token_without_text_is_in_no_span():
    ids = BYTE_FALLBACK.convert_tokens_to_ids(["▁", "x", "1"])
    decoded = decode_tokens(BYTE_FALLBACK, ids)
    assert tokens_in_span(decoded, 0, 2).tolist() == [False, True, True]


@pytest.mark.parametrize("span", [(-1, 1), (0, 4), (2, 1)])
def test_a_span_outside_the_text_is_refused(span):
    decoded = decode_tokens(BYTE_LEVEL, byte_ids("abc"))
    with pytest.raises(ValueError, match=rf"text of 3 characters, found \({span[0]}, {span[1]}\)"):
        tokens_in_span(decoded, *span)


def test_the_answer_tokens_are_those_that_touch_the_answer():
    ids = [0x78, BYTE_TOKENS.index(b"=1"), 0x30, 0x2E]
    located = answer_mask(BYTE_LEVEL, ids)
    assert located is not None
    mask, found = located
    assert mask.tolist() == [False, True, True, False]
    assert found == FoundAnswer(start=2, end=4, rule="last_number")


@pytest.mark.parametrize("ids", [[], byte_ids("no number"), [special_id("<|im_end|>")] * 2])
def test_a_response_without_an_answer_has_no_mask(ids):
    assert answer_mask(BYTE_LEVEL, ids) is None


def test_a_function_does_not_search_an_empty_response():
    end = special_id("<|im_end|>")
    for ids in ([], [end], [len(BYTE_LEVEL)]):
        assert answer_mask(BYTE_LEVEL, ids, lambda text: (0, 1 // len(text))) is None


def test_a_wrong_finder_is_refused_even_for_an_empty_response():
    with pytest.raises(ValueError, match="name of an answer finder"):
        answer_mask(BYTE_LEVEL, [], "last")


def test_an_answer_includes_all_tokens_of_its_split_characters():
    ids = [*byte_ids("answer: "), BYTE_TOKENS.index(b"\xe2\x82"), BYTE_TOKENS.index(b"\xac 5")]
    located = answer_mask(BYTE_LEVEL, ids, re.compile("answer: (.+)"))
    assert located is not None
    assert np.flatnonzero(located[0]).tolist() == [8, 9]


def test_a_number_inside_a_special_token_is_no_answer():
    reserved = special_id("<|reserved_5|>")
    ids = [reserved, *byte_ids("it is 7"), reserved, special_id("<|im_end|>")]
    located = answer_mask(BYTE_LEVEL, ids, re.compile(r"^it is (\d)$"))
    assert located is not None
    mask, found = located
    assert np.flatnonzero(mask).tolist() == [7]
    assert decode_tokens(BYTE_LEVEL, ids).text[found.start : found.end] == "7"


def test_a_special_token_separates_numbers():
    ids = [*byte_ids("5"), special_id("<|im_end|>"), *byte_ids("6")]
    located = answer_mask(BYTE_LEVEL, ids)
    assert located is not None
    assert located[0].tolist() == [False, False, True]


def test_a_special_token_inside_the_answer_is_no_answer_token():
    ids = [*byte_ids("</think>5"), special_id("<|im_end|>"), *byte_ids("6")]
    located = answer_mask(BYTE_LEVEL, ids, "after_think")
    assert located is not None
    assert np.flatnonzero(located[0]).tolist() == [8, 10]


def test_an_answer_of_only_special_tokens_is_none():
    ids = [*byte_ids("a"), special_id("<|im_end|>"), *byte_ids("b")]
    assert answer_mask(BYTE_LEVEL, ids, re.compile(r"(\n)")) is None


@pytest.mark.parametrize(
    ("ids", "rule", "places"),
    [
        ([0x35, special_id("</think>"), 0x36], "after_think", [2]),
        ([special_id("<ANSWER>"), 0x36, special_id("</answer>"), 0x37], "answer_tag", [1]),
        ([special_id(BOX[0]), 0x36, special_id(BOX[1]), 0x37], "boxed", [1]),
    ],
)
def test_markers_are_found_even_if_the_tokenizer_calls_them_special(ids, rule, places):
    located = answer_mask(BYTE_LEVEL, ids)
    assert located is not None
    mask, found = located
    assert found.rule == rule
    assert np.flatnonzero(mask).tolist() == places


def test_added_tokens_that_are_not_special_are_text():
    located = answer_mask(BYTE_LEVEL, [special_id("<tool 7>")])
    assert located is not None
    assert located[1].rule == "last_number"


@given(st.lists(st.integers(0, len(BYTE_LEVEL) - 1), max_size=20))
def test_answer_tokens_are_never_hidden_and_hold_the_answer(ids):
    located = answer_mask(BYTE_LEVEL, ids, "last_number")
    if located is None:
        return
    mask, found = located
    decoded = decode_tokens(BYTE_LEVEL, ids)
    assert mask.any()
    assert mask.tolist() == tokens_in_span(decoded, found.start, found.end).tolist()
    assert re.search(r"\d", decoded.text[found.start : found.end])


END = special_id("<|im_end|>")
PROMPT = [END, *byte_ids("ab"), special_id("<|reserved_5|>"), *byte_ids("a")]


@pytest.mark.parametrize(
    ("question", "user_text", "wanted"),
    [
        ("prompt", None, [0, 1, 1, 0, 1]),
        ("auto", None, [0, 1, 1, 0, 1]),
        ("all", None, [1, 1, 1, 1, 1]),
        ("user", "ab", [0, 1, 1, 0, 0]),
        ("user", " a\n", [0, 0, 0, 0, 1]),
        ([True, False, False, False, True], None, [1, 0, 0, 0, 1]),
        (np.array([0, 1, 0, 0, 0], bool), None, [0, 1, 0, 0, 0]),
    ],
)
def test_the_question_mask_follows_the_option(question, user_text, wanted):
    mask = question_mask(BYTE_LEVEL, PROMPT, question, user_text)
    assert mask.tolist() == np.array(wanted, bool).tolist()


def turns_of(tokenizer, messages):
    ids, _ = encode_prompt(tokenizer, messages)
    mask = turns_mask(tokenizer, messages, ids)
    pieces = decode_tokens(tokenizer, ids).pieces
    return None if mask is None else "".join(np.array(pieces, object)[mask])


def test_the_tokens_of_the_users_turns_are_found_among_equal_words():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = (
        "<|im_end|>ab {% for message in messages %}"
        "{{ message.role }}:{{ message.content | trim }}<|im_end|>{% endfor %}b"
    )
    chat = [
        {"role": "user", "content": " ab "},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "b5 €<|im_end|>"},
    ]
    assert turns_of(tokenizer, chat) == "abb5 €"  # without the special token that the user wrote
    ids, _ = encode_prompt(tokenizer, chat)
    touched = np.flatnonzero(turns_mask(tokenizer, chat, ids))
    decoded = decode_tokens(tokenizer, ids)
    first = decoded.text.index("user:ab") + len("user:")
    assert int(decoded.starts[touched[0]]) == first  # not the template's "ab"
    assert turns_of(tokenizer, chat[1:2]) is None  # the user says nothing


def test_turns_are_found_where_the_decoder_adds_blanks():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, "<unk>")),
        unk_token="<unk>",
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.chat_template = "b{{ messages[0].content }}a"
    messages = [{"role": "user", "content": "a"}]
    ids, text = encode_prompt(tokenizer, messages)
    assert (text, tokenizer.decode(ids)) == ("baa", "b a a")
    assert turns_mask(tokenizer, messages, ids).tolist() == [False, True, False]
    messages[0]["content"] = "ab"  # which the decoder writes as "a b"
    assert turns_mask(tokenizer, messages, encode_prompt(tokenizer, messages)[0]) is None


def test_the_first_token_is_not_a_question_even_if_it_is_not_special():
    assert question_mask(BYTE_LEVEL, byte_ids("ab")).tolist() == [False, True]


def test_a_token_that_is_only_named_special_is_not_a_question():
    tokenizer = byte_level_tokenizer()
    tokenizer.pad_token = "x"
    assert question_mask(tokenizer, byte_ids("abxc")).tolist() == [False, True, False, True]


def test_the_users_words_are_found_in_split_characters():
    ids = [0x78, *byte_ids("€")]
    mask = question_mask(BYTE_LEVEL, ids, "user", "€")
    assert mask.tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        ([], {}, "at least one prompt token, found none"),
        (PROMPT, {"question": [False] * 5}, "found none among 5 prompt tokens"),
        (PROMPT, {"question": "promt"}, "'all', 'user' or a boolean mask, found 'promt'"),
        (PROMPT, {"question": "user"}, "wanted user_text for question='user', found None"),
        (PROMPT, {"question": "user", "user_text": " "}, "wanted user_text .*, found ' '"),
        (PROMPT, {"question": "user", "user_text": "xyz"}, "found no 'xyz' there"),
        (PROMPT, {"question": "user", "user_text": "reserved"}, "found no 'reserved' there"),
        (PROMPT, {"question": [True]}, r"shape \(5,\), .* found bool of shape \(1,\)"),
        (PROMPT, {"question": np.ones((1, 5), bool)}, r"found bool of shape \(1, 5\)"),
        (PROMPT, {"question": np.arange(5)}, r"found int64 of shape \(5,\)"),
    ],
)
def test_an_impossible_question_is_refused(ids, arguments, message):
    with pytest.raises(ValueError, match=message):
        question_mask(BYTE_LEVEL, ids, **arguments)


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        ([65], [True]),  # the only token
        ([END], [True]),
        ([65, END], [True, False]),  # the first, but no special one
        ([END, 65], [False, True]),
        ([END, END, END], [False, True, True]),  # not the first
    ],
)
def test_a_prompt_of_few_or_special_tokens_has_a_question(ids, wanted):
    assert question_mask(BYTE_LEVEL, ids).tolist() == wanted


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.ma.array([True] * 5, mask=[0, 1, 0, 0, 0]), TypeError, r"pass question\.filled\(0\)"),
        ([True, None, False, False, False], TypeError, "booleans, or 0 and 1, got None"),
        ([[True], [True, False]], ValueError, "in rows of one length"),
        (torch.ones(5, device="meta", dtype=torch.bool), TypeError, "on the meta device"),
        (torch.ones(5, dtype=torch.bool).to_sparse(), TypeError, r"pass question\.to_dense\(\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_question_mask_that_cannot_be_read_is_refused(mask, error, message):
    with pytest.raises(error, match=message):
        question_mask(BYTE_LEVEL, PROMPT, mask)


def test_spans_show_counts_and_the_answer_in_one_line():
    found = find_spans(
        BYTE_LEVEL,
        BYTE_LEVEL.encode("3 + 4?"),
        BYTE_LEVEL.encode("It is 7."),
        finder="auto",
        question="prompt",
        user_text=None,
        target="answer",
    )
    assert repr(found) == (
        "Spans(5 of 6 prompt tokens ask, 1 of 8 response tokens answer: '7' by 'last_number')"
    )


def test_docstring_examples():
    result = doctest.testmod(spans, extraglobs={"tokenizer": BYTE_LEVEL})
    assert result.attempted >= 6
    assert result.failed == 0
