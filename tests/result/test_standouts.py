"""Hubs and checkpoints: more than an even share, and without blanks, template and formatting."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from flowtracer_plugin.result.standouts import KINDS, of_kinds, standing_out
from tests.made_traces import make_trace

TOKENS = ("<s>", "Say", " it", "\n", "**", " 4", " </think>", " *", " 3", "7", ".")
KIND = {0: "template", 3: "blank", 4: "format", 6: "template"}


@pytest.fixture(scope="module")
def trace():
    return make_trace(TOKENS)


def found(trace, scores, throughput=None, **options):
    through = trace.throughput if throughput is None else np.array(throughput, float)
    order = standing_out(np.array(scores, float), through, trace.tokens, trace.spans, **options)
    return order.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_tokens(trace, kind):
    named = np.flatnonzero(of_kinds(trace.tokens, trace.spans, (kind,))).tolist()
    assert named == [place for place, name in KIND.items() if name == kind]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("<|im_end|>", "template"),
        ("<\uff5cAssistant\uff5c>", "template"),
        ("[/INST]", "template"),
        ("##", "format"),
        ("```", "format"),
        ("\\[", "format"),
        (" | ", "format"),
        ("*", None),
        ("-", None),
        ("$", None),
        ("", None),
        ("x**", None),
    ],
)
def test_kinds_of_texts(trace, text, kind):
    tokens = (*TOKENS[:5], text, *TOKENS[6:])
    assert [one for one in KINDS if of_kinds(tokens, trace.spans, (one,))[5]] == (
        [kind] if kind else []
    )


@given(st.lists(st.floats(0, 1e6), min_size=11, max_size=11))
def test_a_token_stands_out_with_more_than_its_even_share(trace, scores):
    ranked = [place for place in range(3, 9) if place not in KIND] + [10]
    even = sum(scores[place] for place in ranked) / len(ranked)
    order = found(trace, scores, skip="blank,template,format")
    assert set(order) <= {place for place in ranked if scores[place] > even}
    assert set(order) >= {place for place in ranked if scores[place] > even * (1 + 1e-6)}
    assert [scores[place] for place in order] == sorted((scores[p] for p in order), reverse=True)
    assert len(order) < len(ranked)


def test_equal_scores_have_no_standout(trace):
    assert found(trace, [0.1] * 11) == []
    assert found(trace, [0.1] * 11, within="all", skip="") == []


def test_skipped_tokens_are_ranked_if_asked_for_or_if_they_are_the_finding(trace):
    scores = [0, 0, 0, 9, 1, 3, 8, 2, 1, 99, 0]
    assert found(trace, scores, skip="") == [3, 6]
    assert found(trace, scores, skip="blank") == [6, 5]
    assert found(trace, scores, skip=" blank, template,format ") == [5, 7]
    most = [0.1] * 11
    assert found(trace, scores, most) == [5, 7]
    most[3] = 0.2
    assert found(trace, scores, most) == [3]
    most[5] = 0.2
    assert found(trace, scores, most) == [5, 7]


def test_hubs_and_checkpoints_take_the_same_words(trace):
    for kind in ("hubs", "checkpoints"):
        scores = getattr(trace.backbone, kind)
        wanted = found(trace, scores, within="all", skip="blank")
        ranked = getattr(trace, kind)(99, within="all", skip="blank")
        assert [token.index for token in ranked] == wanted
        assert ranked
        with pytest.raises(ValueError, match=r"skip must be 'auto' or some of blank, template"):
            getattr(trace, kind)(skip="blanks")


def test_a_response_of_nothing_but_its_answer_has_no_standout():
    trace = make_trace(("<s>", "a", "b", "7"), answer=(3,))
    assert trace.hubs() == trace.checkpoints() == ()
    assert replace(trace).hubs(within="all", skip="") != ()
