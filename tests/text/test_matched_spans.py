"""The tokens that a pattern or a function selects."""

import doctest
import re

import numpy as np
import pytest
from hypothesis import given, strategies as st

from flowtracer_plugin.text import matched_spans
from flowtracer_plugin.text.matched_spans import matched_mask
from flowtracer_plugin.text.spans import decode_tokens
from tests.text.test_spans import BYTE_LEVEL, special_id
from tests.tiny import RESPONSE, tiny_tokenizer


def ids_of(text):
    return BYTE_LEVEL(text)["input_ids"]


def chosen(text, finder):
    """The selected characters; in these texts, every character is one token."""
    mask = matched_mask(BYTE_LEVEL, ids_of(text), finder)
    return [character for character, one in zip(text, mask, strict=True) if one]


@pytest.mark.parametrize(
    ("finder", "wanted"),
    [
        (r"\d+", "3142"),  # all matches
        (re.compile(r"[A-Z]", re.IGNORECASE), "abc"),
        (r"([a-z])(\d)", "a3b1c4"),  # the groups, both
        (r"[a-z](\d)", "314"),
        (r"c(4)(x)?", "4"),  # a group that took no part
        (r"z", ""),
        (r"x*", ""),  # matches that are empty
        (lambda text: [(0, 1), (0, 2), (len(text) - 1, len(text))], "a3."),
        (lambda text: (), ""),
        (lambda text: iter([(1, 1)]), ""),
    ],
)
def test_a_finder_selects_these_tokens(finder, wanted):
    assert "".join(chosen("a3 b1-c42.", finder)) == wanted


@given(st.text(st.sampled_from("ab1€ 2é"), max_size=12), st.data())
def test_a_token_is_chosen_if_it_touches_a_span(text, data):
    """Also if several tokens make one character, or one token makes several."""
    tokenizer, cuts = tiny_tokenizer(), st.integers(0, len(text))
    ids = tokenizer(text)["input_ids"]
    spans = data.draw(st.lists(st.tuples(cuts, cuts).map(sorted).map(tuple), max_size=3))
    found = matched_mask(tokenizer, ids, lambda _: spans).tolist()
    decoded = decode_tokens(tokenizer, ids)
    inside = {place for start, end in spans for place in range(start, end)}
    bounds = zip(decoded.starts.tolist(), decoded.ends.tolist(), strict=True)
    wanted = [any(place in inside for place in range(start, end)) for start, end in bounds]
    for one, other, token in zip(found, wanted, ids, strict=True):
        # A token with only a part of a character touches it too.
        part = "\N{REPLACEMENT CHARACTER}" in tokenizer.decode([token])
        assert one == other or (one and part)


def test_a_finder_does_not_see_special_tokens():
    end = special_id("<|im_end|>")
    ids = [end, *ids_of("a1"), end, *ids_of("2"), end]
    seen = []

    def all_of(text):
        seen.append(text)
        return [(0, len(text))]

    mask = matched_mask(BYTE_LEVEL, ids, all_of)
    assert "im_end" not in seen[0]
    assert seen[0][:2] == "a1"
    assert seen[0][-1] == "2"
    assert mask.tolist() == [False, True, True, False, True, False]
    assert matched_mask(BYTE_LEVEL, ids, r"\d").tolist() == [False, False, True, False, True, False]


def test_any_tokenization_of_the_text_is_read():
    tokenizer = tiny_tokenizer()
    whole = tokenizer(RESPONSE)["input_ids"]
    single = [i for character in RESPONSE for i in tokenizer(character)["input_ids"]]
    assert len(single) > len(whole)
    for ids in (whole, single):
        mask = matched_mask(tokenizer, ids, "answer")
        said = [tokenizer.decode([i]) for i in np.array(ids)[mask]]
        assert "".join(said).strip() == "answer"


@pytest.mark.parametrize("span", [(-1, 1), (2, 1), (0, 9)])
def test_a_span_beyond_the_text_is_refused(span):
    with pytest.raises(
        ValueError, match=r"within the text of 2 characters, got \(.*from <function"
    ):
        matched_mask(BYTE_LEVEL, ids_of("a1"), lambda _: [span])


def test_an_empty_response_has_an_empty_mask():
    assert matched_mask(BYTE_LEVEL, [], r"\d").tolist() == []


def test_docstring_example():
    found = doctest.testmod(matched_spans, extraglobs={"tokenizer": BYTE_LEVEL})
    assert (found.attempted, found.failed) == (1, 0)
