"""Comparisons of traces."""

import json

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import flowtracer_plugin as ft
from flowtracer_plugin.comparison.traces import MEASURES, compare, origins
from tests.comparison import reference_contrast as slow
from tests.comparison.compared import GROUP, OTHER, PROMPT_TOKENS, RIGHT, TRUTHS, WRONG, make_trace
from tests.tiny import PROMPT, tiny_llama, tiny_tokenizer


def test_right_traces_are_compared_with_wrong_ones_and_copies_count_once():
    found = compare(GROUP, right=TRUTHS)
    assert (found.names, found.sides.first, found.sides.second) == (
        ("right", "wrong"),
        (0, 2),
        (1, 3),
    )
    assert [one.label for one in found.traces] == ["A", "B", "C", "D", "E"]
    assert [one.same_as for one in found.traces] == [None, None, None, None, 0]
    assert [one.answer for one in found.traces] == [" 7", " 8", " 7", " 8", " 7"]
    expected = (RIGHT.reasoning_share + OTHER.reasoning_share) / 2
    assert found.measures.columns()[MEASURES.index("reasoning_share")]["first"] == pytest.approx(
        expected
    )


@pytest.mark.parametrize("right", [None, [None, None], [True, None], [True, True], [False, None]])
def test_two_traces_are_compared_with_each_other(right):
    found = compare([RIGHT, WRONG], labels=["base", "trained"], right=right)
    assert found.names == ("base", "trained")
    assert found.measures.p is None
    assert found.words[0].p is None
    assert found.measures.first[0] == pytest.approx(RIGHT.reasoning_share)


@pytest.mark.parametrize("right", [None, [True] * 5, [None, True, None, True, None]])
def test_more_than_two_traces_without_sides_report_highest_and_lowest(right):
    found = compare(GROUP, right=right)
    assert (found.sides, found.names) == (None, ("highest", "lowest"))
    shares = [trace.reasoning_share for trace in GROUP]
    assert (found.measures.first[0], found.measures.second[0]) == pytest.approx(
        (max(shares), min(shares))
    )


def test_numpy_booleans_are_accepted(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it refuses them
    assert compare(GROUP, right=np.array(TRUTHS)).sides == compare(GROUP, right=TRUTHS).sides


def test_traces_that_are_neither_right_nor_wrong_do_not_count():
    truths = [True, False, None, False, True]
    found, without = (
        compare(GROUP, right=truths),
        compare([GROUP[0], GROUP[1], GROUP[3]], right=[True, False, False]),
    )
    assert found.sides.members == (0, 1, 3)
    assert {word.text for word in found.words} == {word.text for word in without.words}
    assert found.measures.columns() == without.measures.columns()
    assert found.traces[2].right is None


def test_the_shared_beginning_is_compared_token_by_token():
    found = compare(GROUP, right=TRUTHS)
    length = len(PROMPT_TOKENS) + 2
    assert found.tokens == (*PROMPT_TOKENS, "3", " +")
    for token, numbers in enumerate(found.beginning.contrast.columns()):
        means = [
            np.mean([GROUP[at].throughput[token] for at in side])
            for side in (found.sides.first, found.sides.second)
        ]
        assert (numbers["first"], numbers["second"]) == pytest.approx(means)
    assert [(way.text, way.texts) for way in found.beginning.continuations] == [
        (" 4", (0, 1, 2, 4)),
        (" 5\nNo 8", (3,)),
    ]
    assert found.beginning.length == length


def test_the_shared_beginning_of_equal_texts_is_the_whole_text():
    trained = make_trace(RIGHT.tokens[len(PROMPT_TOKENS) :], seed=9, model="trained")
    found = compare([RIGHT, trained])
    assert found.beginning.length == len(RIGHT.tokens)
    assert found.beginning.continuations == ()
    np.testing.assert_allclose(
        found.beginning.contrast.difference, RIGHT.throughput - trained.throughput
    )
    assert found.traces[1].same_as is None


TEXTS = st.lists(
    st.sampled_from(["a", " b", ".", "\n", " c.", "!\n", " d"]), min_size=1, max_size=14
)


@settings(max_examples=40)
@given(TEXTS, st.integers(0, 3), st.data())
def test_origins_equal_their_slow_definition(response, seed, data):
    places = st.integers(0, len(response) - 1)
    answer = data.draw(st.sets(places, min_size=1, max_size=2))
    border = len(PROMPT_TOKENS)
    trace = make_trace(tuple(response), answer=[at + border for at in answer], seed=seed)
    expected = slow.entering(
        trace.flow.edge_flow().tolist(),
        trace.backbone.source.tolist(),
        trace.outline.bounds,
        border,
        trace.spans.target.nonzero()[0].tolist(),
    )
    found = origins(trace)
    assert (found.prompt, found.early, found.middle, found.late) == pytest.approx(
        expected, abs=1e-6
    )
    assert sum(expected) == pytest.approx(1, abs=1e-6)


def test_a_target_in_the_prompt_draws_from_the_prompt():
    border = len(PROMPT_TOKENS)
    trace = make_trace((" 7",), target=(border - 1,))
    assert origins(trace).prompt == 1


def test_origins_are_those_of_the_line_of_the_target():
    trace = make_trace(("a", "\n", "7"), target=(len(PROMPT_TOKENS) + 1,))
    assert origins(trace).prompt == 1


def test_one_line_is_the_middle_third_and_two_are_early_and_late():
    one = origins(make_trace(("a", "\n", "7")))
    two = origins(make_trace(("a", "\n", "b", "\n", "7")))
    assert one.early == one.late == two.middle == 0
    assert min(one.middle, two.early, two.late) > 0


def test_stops_are_the_mean_number_of_tokens_on_a_path():
    trace = make_trace(("a", " b", " c", "\n", "7"))
    border, edges = len(PROMPT_TOKENS), trace.flow.edge_flow()
    inflow = edges[border:-1].sum()
    assert compare([trace, WRONG]).traces[0].stops == pytest.approx(inflow)


def test_streamed_traces_give_the_same_numbers():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    said = [" He had 3. 3 - 1 = 2.\nThe answer is 2.", " He had 3. 3 + 1 = 4.\nThe answer is 4."]
    dense, streamed = (
        compare(
            [
                ft.wrap(model, tokenizer, mode=mode, preset="paper").trace(PROMPT, one)
                for one in said
            ]
        )
        for mode in ("dense", "streamed")
    )
    np.testing.assert_allclose(dense.measures.first, streamed.measures.first, atol=1e-5)
    np.testing.assert_allclose(dense.measures.second, streamed.measures.second, atol=1e-5)
    assert [word.text for word in dense.words] == [word.text for word in streamed.words]


def test_the_document_holds_everything_in_plain_values():
    found = compare(GROUP, right=TRUTHS)
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["sides"] == {"first": [0, 2], "second": [1, 3]}
    assert (document["first"], document["second"], document["deals"]) == ("right", "wrong", 6)
    assert set(document["measures"]) == set(MEASURES)
    assert document["traces"][1]["origins"]["prompt"] == found.traces[1].origins.prompt
    assert "".join(one["text"] for one in document["beginning"]) == "".join(found.tokens)
    assert document["continuations"][0] == {"text": " 4", "texts": [0, 1, 2, 4]}
    assert len(document["words"]) == len(found.words)
    assert compare(GROUP).to_dict()["sides"] is None


def test_many_traces_are_numbered():
    found = compare([RIGHT] * 27)
    assert [found.traces[at].label for at in (0, 26)] == ["1", "27"]


@pytest.mark.parametrize(
    ("traces", "options", "message"),
    [
        ([], {}, "at least two traces to compare, found 0"),
        ([RIGHT], {}, "at least two traces to compare, found 1"),
        ([RIGHT, WRONG], {"labels": ["a"]}, "one of labels for each of the 2 traces, found 1"),
        ([RIGHT, WRONG], {"right": [True] * 3}, "one of right for each of the 2 traces, found 3"),
    ],
)
def test_impossible_comparisons_are_refused(traces, options, message):
    with pytest.raises(ValueError, match=message):
        compare(traces, **options)


def test_traces_of_different_tokenizers_are_refused():
    changed = make_trace(("3", " +", " 4"))
    object.__setattr__(changed, "tokens", (*changed.tokens[:-1], " four"))
    with pytest.raises(ValueError, match=r"token \d+ is '4' in A and 'four' in B; compare traces"):
        compare([RIGHT, changed])
    # The same bytes can end "é" or "ã", and a text's first token may have lost its space.
    object.__setattr__(changed, "tokens", ("<s>", *changed.tokens[1:-1], "é"))
    other = make_trace(("3", " +", " 4"))
    object.__setattr__(other, "tokens", ("<s>", "What ", *other.tokens[2:-1], "ã"))
    compare([changed, other])
