from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import flowtracer_plugin as ft
from flowtracer_plugin.credit.token_scores import TOKEN_SCORES, read_text
from flowtracer_plugin.evaluation.knockout import knock_out, set_drops, token_drops
from flowtracer_plugin.evaluation.ranked_tokens import (
    KnockOutOptions,
    chosen_sets,
    measure_knock_outs,
)
from flowtracer_plugin.evaluation.scored_example import (
    ScoredExample,
    TooFewTokensError,
    candidate_tokens,
)
from flowtracer_plugin.evaluation.token_sets import (
    matched_draw,
    position_bins,
    ranking,
    set_size,
    token_classes,
    top_and_bottom,
)
from tests.evaluation import reference_knockout as slow
from tests.evaluation.planted import planted_text
from tests.tiny import PROMPT, RESPONSE, eager_attention, tiny_llama, tiny_tokenizer

TRUE = ("far", "near")
FEW = KnockOutOptions(percents=(10, 30), gaps=(0,), draws=4)


@pytest.fixture(scope="module")
def scored(tiny, trace):
    return read_text(tiny, trace)


def places(masks):
    return [set(np.flatnonzero(mask)) for mask in masks]


# --- a model whose weights were written by hand ---


@pytest.mark.parametrize("seed", range(5))
def test_single_knock_outs_find_the_two_tokens_and_no_other(planted, seed):
    prompt, response, true, node = planted_text(seed)
    trace = planted.trace_tokens(prompt, response)
    assert trace.spans.answer_text == node
    one_each = torch.eye(len(trace.token_ids), dtype=torch.bool)
    ids, answer = torch.from_numpy(trace.token_ids), torch.from_numpy(trace.spans.answer)
    future = knock_out(planted.model, ids, answer, one_each)
    assert future.predicted
    assert set(np.flatnonzero(future.drop > 1)) == {true[name] for name in TRUE}
    assert set(np.flatnonzero(future.flipped)) == {true[name] for name in TRUE}
    assert future.drop[future.drop < 1].abs().max() < 0.05
    drops = token_drops(planted.model, trace, [true["near"], 0])
    wanted = {true["near"]: float(future.drop[true["near"]]), 0: float(future.drop[0])}
    assert drops == pytest.approx(wanted, abs=1e-5)
    before = token_drops(planted.model, trace)
    assert [*before] == [*range(len(ids) - 1)]
    assert [*before.values()] == pytest.approx(future.drop[:-1].tolist(), abs=1e-5)
    with pytest.raises(ValueError, match=f"wanted tokens 0 to {len(ids) - 1}, found \\[-1\\]"):
        token_drops(planted.model, trace, [3, -1])
    sets = [[0, true["near"]], [], [*true.values()]]
    masks = torch.zeros(3, len(ids), dtype=torch.bool)
    masks[0, [0, true["near"]]] = masks[2, [*true.values()]] = True
    wanted = knock_out(planted.model, ids, answer, masks).drop.tolist()
    assert set_drops(planted.model, trace, sets) == pytest.approx(wanted, abs=1e-5)
    assert (wanted[0] > 1, wanted[1]) == (True, 0)
    with pytest.raises(ValueError, match=f"wanted tokens 0 to {len(ids) - 1}, found \\[-1, 99\\]"):
        set_drops(planted.model, trace, [[0, 99], [-1]])
    # The row that chooses the answer looks at one of them alone.
    direct = knock_out(planted.model, ids, answer, one_each, rows="answer")
    assert set(np.flatnonzero(direct.drop > 1)) == {true["near"]}


@pytest.mark.parametrize("seed", range(5))
def test_flow_finds_both_tokens_and_one_hop_of_attention_one(planted, seed):
    prompt, response, true, _ = planted_text(seed)
    text = read_text(planted, planted.trace_tokens(prompt, response))
    among = candidate_tokens(text.trace, np.zeros(len(text.trace.token_ids), bool), gap=1)
    for name in ("flow:decision", "reach:decision"):
        order = ranking(TOKEN_SCORES[name](text), among)
        assert set(order[:2]) == {true[name] for name in TRUE}
    hop = TOKEN_SCORES["attention:decision"](text)
    assert ranking(hop, among)[0] == true["near"]
    others = among.copy()
    others[true["near"]] = False
    assert hop[others].max() - hop[true["far"]] < 1e-6


def test_knock_outs_rank_known_scores_as_they_must(planted):
    prompt, response, true, _ = planted_text(0)
    trace = planted.trace_tokens(prompt, response)
    first = np.isin(np.arange(len(trace.token_ids)), [true[name] for name in TRUE])
    scores = {
        "true": lambda _: first.astype(float),
        "false": lambda _: 1.0 - first,
        "flow": TOKEN_SCORES["flow"],
    }
    options = KnockOutOptions(percents=(16, 50), gaps=(1,), draws=30, matched="true")
    found = measure_knock_outs(planted, trace, options, scores=scores)
    assert (found.predicted, found.answer_tokens, found.candidates) == (True, 1, (12,))
    assert found.log_prob == pytest.approx(0, abs=1e-5)
    effects = {(effect.score, effect.side): effect for effect in found.effects}
    assert min(effects["true", "top"].drop) > 10
    assert effects["true", "top"].flipped == (1.0, 1.0)
    assert max(effects["true", "bottom"].drop) < 0.05
    # Two of two flip it and none of them none, one of them does: 1 − C(10, 2)/C(12, 2).
    assert effects["random", "top"].flipped[0] == pytest.approx(1 - 45 / 66, abs=0.25)
    assert 0 < effects["random", "top"].drop[0] < effects["true", "top"].drop[0]
    assert effects["true", "top"].divergence[0] == pytest.approx(effects["true", "top"].drop[0])


# --- the sets ---


@given(st.data())
def test_tops_and_bottoms_are_those_of_the_definition(data):
    size = data.draw(st.integers(1, 30))
    scores = data.draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))
    among = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    percent = data.draw(st.sampled_from([1, 2, 5, 7, 10, 20, 29, 50, 100]))
    count = set_size(int(among.sum()), percent)
    found = top_and_bottom(np.array(scores, float), among, [count])
    assert set(np.flatnonzero(found["top"])) == slow.top(scores, among, percent)
    assert set(np.flatnonzero(found["bottom"])) == slow.bottom(scores, among, percent)


def test_tokens_have_classes():
    tokens = ["12", " 3", "3rd", " +", "=", " × ", ".", " (", "\n", "  ", "", "apples", " He", "'s"]
    words = ["number"] * 3 + ["operator"] * 3 + ["mark"] * 2 + ["space"] * 3 + ["word"] * 3
    found = token_classes(tokens).tolist()
    assert len(set(zip(found, words, strict=True))) == len(set(words)) == len(set(found))


def test_bins_are_tenths_by_distance():
    among = np.array([False, *[True] * 7, False, *[True] * 13, False])
    bins = position_bins(among)
    assert bins[among].tolist() == [2 * n // 4 for n in range(20)]
    assert set(bins[~among]) == {-1}


@given(seed=st.integers(0, 2**32 - 1))
def test_matched_draws_keep_the_counts_of_every_group(seed):
    rng = np.random.default_rng(seed)
    groups = rng.integers(-1, 4, 40)
    members = np.flatnonzero(groups >= 0)
    chosen = rng.choice(members, size=rng.integers(0, len(members) + 1), replace=False)
    drawn = matched_draw(chosen, groups, rng)
    assert sorted(groups[drawn]) == sorted(groups[chosen])


def test_every_token_is_drawn_as_often():
    groups = np.array([0, 0, 0, 1, 1, -1])
    rng = np.random.default_rng(0)
    drawn = np.mean([matched_draw(np.array([0, 3]), groups, rng) for _ in range(3000)], axis=0)
    assert drawn == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2, 0], abs=0.04)


def test_candidates_lie_before_the_answer(trace):
    special = np.zeros(len(trace.token_ids), bool)
    first, start = int(trace.spans.answer.argmax()), trace.spans.prompt_length
    assert np.flatnonzero(candidate_tokens(trace, special, gap=0)).tolist() == [
        *range(start, first)
    ]
    special[start + 2] = True
    wanted = [k for k in range(start, first - 3) if k != start + 2]
    assert np.flatnonzero(candidate_tokens(trace, special, gap=3)).tolist() == wanted
    with pytest.raises(TooFewTokensError, match=r"only 9 tokens .* 3 before the answer '2' left"):
        candidate_tokens(trace, np.arange(len(special)) < first - 12, gap=3)


def test_each_gap_score_side_and_control_has_its_sets(tiny, trace):
    among = candidate_tokens(trace, np.zeros(len(trace.token_ids), bool), gap=0)
    scores = {name: TOKEN_SCORES[name] for name in ("flow", "recency")}
    example = ScoredExample(tracer=tiny, trace=trace, scores=scores)
    sets = chosen_sets(example, among, FEW, 0)
    found = {(one.score, one.side): places(one.masks) for one in sets}
    for name, score in example.values.items():
        for n, percent in enumerate(FEW.percents):
            assert found[name, "top"][n] == slow.top(score, among, percent)
            assert found[name, "bottom"][n] == slow.bottom(score, among, percent)
    groups = {
        "random": among.astype(int) - 1,
        "random_position": position_bins(among),
        "random_class": np.where(among, token_classes(trace.tokens), -1),
    }
    assert {name for name, _ in found} == {*groups, *scores}
    for name, group in groups.items():
        for n in range(2):
            wanted = sorted(group[list(found["flow", "top"][n])])
            for drawn in found[name, "top"][4 * n : 4 * n + 4]:
                assert sorted(group[list(drawn)]) == wanted
                assert among[list(drawn)].all()
    again = chosen_sets(example, among, FEW, 0)
    other = chosen_sets(example, among, replace(FEW, seed=1), 0)
    assert places(sets[-1].masks) == places(again[-1].masks) != places(other[-1].masks)


def test_effects_are_those_of_the_sets(tiny, trace):
    options = replace(FEW, gaps=(0, 4))
    found = measure_knock_outs(tiny, trace, options)
    special = np.zeros(len(trace.token_ids), bool)
    ids, answer = torch.from_numpy(trace.token_ids), torch.from_numpy(trace.spans.answer)
    example = ScoredExample(tracer=tiny, trace=trace, scores=TOKEN_SCORES)
    effects = iter(found.effects)
    for gap in (0, 4):
        among = candidate_tokens(trace, special, gap=gap)
        for chosen in chosen_sets(example, among, options, gap):
            effect = next(effects)
            assert (effect.gap, effect.score, effect.side) == (gap, chosen.score, chosen.side)
            wanted = knock_out(tiny.model, ids, answer, torch.from_numpy(np.stack(chosen.masks)))
            for name in ("drop", "flipped", "divergence"):
                means = getattr(wanted, name).float().reshape(2, -1).mean(1)
                assert getattr(effect, name) == pytest.approx(means.tolist(), abs=1e-4)
    assert next(effects, None) is None


# --- the scores ---


def test_scores_equal_their_definitions(tiny, trace, scored):
    attention = eager_attention(tiny.model, trace.token_ids.tolist(), tiny.layers).numpy()
    attention[np.diag_indices(len(attention))] = 0
    start, rows = trace.spans.prompt_length, trace.spans.answer
    for name, chosen in (("attention", rows), ("attention:decision", np.roll(rows, -1))):
        found = TOKEN_SCORES[name](scored)
        assert found[start:] == pytest.approx(attention[chosen].mean(0)[start:], abs=1e-5)
    said = np.arange(len(rows)) >= start  # the prompt's tokens do not compete, and score 0
    assert np.array_equal(TOKEN_SCORES["flow"](scored), np.where(said, trace.throughput, 0))
    assert np.array_equal(TOKEN_SCORES["reach"](scored), np.where(said, trace.reach, 0))
    decided = ft.wrap(
        tiny.model,
        tiny.tokenizer,
        target="decision",
        question_weights="reach",
        mode="dense",
        preset="paper",
    ).trace(PROMPT, RESPONSE)
    assert TOKEN_SCORES["flow:decision"](scored) == pytest.approx(
        np.where(said, decided.throughput, 0), abs=1e-6
    )
    assert TOKEN_SCORES["reach:decision"](scored) == pytest.approx(
        np.where(said, decided.reach, 0), abs=1e-6
    )
    ids = torch.from_numpy(trace.token_ids)[None]
    with torch.no_grad():
        chances = tiny.model(ids).logits[0].double().softmax(-1).numpy()
    surprise = [-np.log(chances[k - 1, ids[0, k]]) for k in range(start, ids.shape[1])]
    assert TOKEN_SCORES["surprisal"](scored) == pytest.approx([0.0] * start + surprise, abs=1e-4)
    unsure = [-(p @ np.log(p)) for p in chances[start - 1 : -1]]
    assert TOKEN_SCORES["entropy"](scored)[start:] == pytest.approx(unsure, abs=1e-4)
    assert TOKEN_SCORES["recency"](scored).tolist() == [*range(len(rows))]
    for name in ("fai", "waad"):
        found = TOKEN_SCORES[name](scored)
        assert found.shape == rows.shape
        assert found.max() > 0


def test_a_streamed_trace_is_refused_and_a_dense_one_helps():
    tracer = ft.wrap(tiny_llama(), tiny_tokenizer(), mode="streamed", preset="paper")
    with pytest.raises(ValueError, match=r"was streamed; make it with wrap\(..., mode='dense'\)"):
        measure_knock_outs(tracer, tracer.trace(PROMPT, RESPONSE), FEW)
    tracer = ft.wrap(tiny_llama(), tiny_tokenizer(), mode="dense", preset="paper")
    assert measure_knock_outs(
        tracer, tracer.trace(PROMPT, RESPONSE), FEW, scores={"flow": TOKEN_SCORES["flow"]}
    ).effects


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": "all"}, "rows must be one of answer, future, got 'all'"),
        ({"percents": ()}, r"percents must be from 1 to 100, got \(\)"),
        ({"percents": (0, 5)}, "percents must be from 1 to 100"),
        ({"gaps": (-1,)}, "gaps must be 0 or more tokens"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
    ],
)
def test_impossible_options_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        KnockOutOptions(**change)


def test_missing_and_infinite_scores_are_refused(tiny, trace):
    with pytest.raises(ValueError, match="one of the scores recency, got 'flow'"):
        measure_knock_outs(tiny, trace, FEW, scores={"recency": TOKEN_SCORES["recency"]})
    broken = {"flow": lambda text: np.full(len(text.trace.token_ids), np.nan)}
    with pytest.raises(ValueError, match="the score 'flow' is not finite"):
        measure_knock_outs(tiny, trace, FEW, scores=broken)
