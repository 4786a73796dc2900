import numpy as np
import pytest
import torch

import flowtracer_plugin as ft
from flowtracer_plugin.credit.token_scores import TOKEN_SCORES, read_text
from flowtracer_plugin.evaluation import knockout
from flowtracer_plugin.evaluation.curves import measure_curves
from flowtracer_plugin.evaluation.knockout import cut_edges, hidden_edges, knock_out
from flowtracer_plugin.evaluation.lines_and_edges import knock_out_backbone, knock_out_lines
from flowtracer_plugin.evaluation.protocols import measure
from flowtracer_plugin.evaluation.ranked_tokens import KnockOutOptions
from flowtracer_plugin.evaluation.regeneration import regenerate
from flowtracer_plugin.evaluation.scored_example import TooFewTokensError
from flowtracer_plugin.model.cutting import cutting
from flowtracer_plugin.text.answers import same_answer
from tests.evaluation.planted import planted_text
from tests.tiny import PROMPT, RESPONSE, tiny_llama, tiny_tokenizer

STORY = "Ann has 4 apples. Ann buys 1. Ann gets 3. Ann sees 6. Ann buys 6. How many apples?\n"
FLOW = {"flow": TOKEN_SCORES["flow"]}


@pytest.fixture(scope="module")
def planted(planted):
    return ft.wrap(
        planted.model,
        planted.tokenizer,
        answer=planted.answer,
        mode="dense",
        target="decision",
        preset="paper",
    )


def known(seed):
    """Scores that rank the two true tokens first, and last."""
    *_, true, _ = planted_text(seed)

    def first(text):
        return np.isin(np.arange(len(text.trace.token_ids)), list(true.values())).astype(float)

    return {"true": first, "false": lambda text: 1 - first(text)}


def parts(trace):
    return torch.from_numpy(trace.token_ids), torch.from_numpy(trace.spans.answer)


def test_protocols_share_the_scores_and_the_text_without_a_cut(reasoner, monkeypatch):
    asked, read, real = [], [], knockout.read_prefix
    monkeypatch.setattr(knockout, "read_prefix", lambda *text: read.append(0) or real(*text))
    scores = {"flow": lambda text: asked.append(0) or FLOW["flow"](text)}
    options = KnockOutOptions(percents=(20,), draws=1)
    protocols = ("knock_out", "curves", "lines", "edges")
    found = measure(reasoner, reasoner.generate(STORY), options, protocols=protocols, scores=scores)
    assert not any("skipped" in found[name] for name in protocols)
    assert len(asked) == len(read) == 1


# --- deletion and insertion ---


def test_curves_of_known_scores_are_steep_and_flat(planted):
    prompt, response, *_ = planted_text(1)
    trace = planted.trace_tokens(prompt, response)
    options = KnockOutOptions(gaps=(1,), draws=5)
    curves = {
        one.score: one for one in measure_curves(planted, trace, options, scores=known(1), steps=6)
    }
    best, worst, chance = (curves[name] for name in ("true", "false", "random"))
    assert best.shares == pytest.approx(np.arange(7) / 12)
    assert best.deletion[0] == worst.deletion[0] == pytest.approx(1, abs=0.01)
    assert max(best.deletion[2:]) < 0.2
    assert min(best.insertion[2:]) > 0.99
    assert min(worst.deletion) > 0.99
    assert max(worst.insertion) < 0.6
    assert best.deletion_area < chance.deletion_area < worst.deletion_area
    assert best.insertion_area > chance.insertion_area > worst.insertion_area


def test_curves_are_those_of_the_definition(reasoner):
    trace = reasoner.generate(STORY)
    options = KnockOutOptions(gaps=(3,), draws=2)
    curve = measure_curves(reasoner, trace, options, scores=FLOW, steps=4)[0]
    first, start = int(trace.spans.answer.argmax()), trace.spans.prompt_length
    among = [*range(start, first - 3)]
    ranked = sorted(among, key=lambda k: (-trace.throughput[k], k))
    sizes = [round(len(among) * share) for share in (0, 0.125, 0.25, 0.375, 0.5)]

    def drop(hidden):
        sets = torch.zeros(1, len(trace.token_ids), dtype=torch.bool)
        sets[0, hidden] = True
        return float(knock_out(reasoner.model, *parts(trace), sets).drop)

    without = drop(among)
    assert without > 0
    lost = [min(1, max(0, 1 - drop(ranked[:size]) / without)) for size in sizes]
    won = [min(1, max(0, 1 - drop(ranked[size:]) / without)) for size in sizes]
    assert curve.deletion == pytest.approx([min(lost[: n + 1]) for n in range(5)], abs=1e-3)
    assert curve.insertion == pytest.approx([max(won[: n + 1]) for n in range(5)], abs=1e-3)
    shares = [size / len(among) for size in sizes]
    assert curve.shares == pytest.approx(shares)
    area = sum(
        (shares[n + 1] - shares[n]) * (curve.deletion[n + 1] + curve.deletion[n]) / 2
        for n in range(4)
    )
    assert curve.deletion_area == pytest.approx(area / shares[-1])


def test_an_answer_that_needs_nothing_has_no_curve(tiny, trace):
    with pytest.raises(ValueError, match="the answer '2' is no less likely without any of the 11"):
        measure_curves(tiny, trace, KnockOutOptions(gaps=(3,)), scores=FLOW)


# --- regeneration ---


def test_without_the_true_tokens_the_answer_changes(planted):
    for seed in range(3):
        prompt, response, _, node = planted_text(seed)
        trace = planted.trace_tokens(prompt, response)
        found = regenerate(
            planted, trace, scores=known(seed), right=node, keep=1.0, max_new_tokens=1, percent=15
        )
        by = {(one.score, one.side): one for one in found}
        assert (by["true", "top"].changed, by["true", "top"].reversed) == (1.0, 1.0)
        assert by["true", "bottom"].answers == by["false", "top"].answers == (node,)
        assert by["true", "bottom"].changed == by["true", "bottom"].reversed == 0.0
        assert len(by["random", "top"].answers) == 5


def test_the_rest_is_written_without_looking_at_what_is_hidden(reasoner):
    trace = reasoner.generate(STORY)
    kept = trace.spans.prompt_length + 16
    first = int(trace.spans.answer.argmax())
    keep = 16 / (first - trace.spans.prompt_length)
    found = regenerate(reasoner, trace, scores=FLOW, keep=keep, draws=2, max_new_tokens=40)
    among = [*range(trace.spans.prompt_length, kept)]
    hidden = sorted(among, key=lambda k: (-trace.throughput[k], k))[:4]
    tokens = torch.zeros(1, 100, dtype=torch.bool)
    tokens[0, hidden] = True
    edges = hidden_edges(tokens, torch.zeros(100, dtype=torch.bool), rows="future")
    ids = trace.token_ids[:kept].tolist()
    with torch.no_grad(), cutting(edges):
        for _ in range(40):
            ids.append(int(reasoner.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == reasoner.tokenizer.eos_token_id:
                break
    text = reasoner.tokenizer.decode(ids[trace.spans.prompt_length :])
    wanted = ft.find_answer(text)
    assert found[0].answers == (wanted and text[wanted.start : wanted.end],)
    assert found[0].reversed is None
    assert not reasoner.model.training


def test_answers_are_compared_by_what_they_say():
    assert same_answer(" $1,200. ", "1200")
    assert same_answer("Yes", "yes")
    assert same_answer("1.5e3", "1500")
    assert same_answer("\N{MINUS SIGN}7.0", "-7")
    assert not same_answer("nan", "inf")
    assert not same_answer("1e999999999", "1")
    assert same_answer(None, None)
    assert not same_answer(None, "none")
    assert not same_answer("12", "120")


def test_a_response_kept_too_short_is_refused_and_more_helps(planted):
    prompt, response, *_ = planted_text(0)
    trace = planted.trace_tokens(prompt, response)
    with pytest.raises(TooFewTokensError, match="only 6 tokens of the response"):
        regenerate(planted, trace, scores=known(0), max_new_tokens=1)
    assert regenerate(planted, trace, scores=known(0), max_new_tokens=1, keep=1.0)
    with pytest.raises(ValueError, match=r"keep must be above 0 and at most 1, got 0\.0"):
        regenerate(planted, trace, keep=0.0)


# --- lines and edges ---


def ranks(values):
    """Of equal values, the mean of their ranks."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2
        for value in values
    ]


def test_lines_are_knocked_out_one_by_one(reasoner):
    trace = reasoner.generate(STORY)
    scores = {name: TOKEN_SCORES[name] for name in ("flow", "surprisal")}
    found = knock_out_lines(reasoner, trace, scores=scores)
    texts = ["".join(trace.tokens[start:stop]) for start, stop in found.lines]
    assert texts == ["4 + 1 = 5\n", "5 + 3 = 8\n", "8 + 6 = 14\n", "The answer is \\boxed{"]
    assert np.argmax(found.drop) == 2  # the answer is copied from there
    text = read_text(reasoner, trace)
    for number, (start, stop) in enumerate(found.lines):
        sets = torch.zeros(1, len(trace.token_ids), dtype=torch.bool)
        sets[0, start:stop] = True
        effect = knock_out(reasoner.model, *parts(trace), sets)
        assert found.drop[number] == pytest.approx(float(effect.drop), abs=1e-4)
    for name, score in scores.items():
        values = score(text)
        for measured, gather in ((found.by_sum, np.sum), (found.by_max, np.max)):
            lines = [gather(values[start:stop]) for start, stop in found.lines]
            wanted = np.corrcoef(ranks(lines), ranks(found.drop))[0, 1]
            assert measured[name] == pytest.approx(wanted)


def test_constant_scores_have_no_rank_correlation(reasoner):
    trace = reasoner.generate(STORY)
    found = knock_out_lines(
        reasoner, trace, scores={"zero": lambda text: np.zeros(len(text.trace.token_ids))}
    )
    assert found.by_sum == found.by_max == {"zero": None}


def test_two_lines_are_too_few(tiny):
    with pytest.raises(ValueError, match="has 1 lines or sentences before the answer, wanted at"):
        knock_out_lines(tiny, tiny.trace(PROMPT, " 3 - 1 = 2"))


def test_the_backbone_of_a_known_model_carries_its_answer(planted):
    for seed in range(3):
        prompt, response, *_ = planted_text(seed)
        trace = planted.trace_tokens(prompt, response)
        (found,) = knock_out_backbone(planted, trace, percents=(8,), draws=5)
        assert found.backbone > 10
        assert found.others < found.backbone / 3
        assert found.edges == 7  # of 13 · 12 / 2 between the response's tokens before the answer
        assert found.other_attention >= found.attention * 0.99 or found.other_edges == 71


def test_edges_have_the_most_flow_and_others_as_much_attention(tiny, trace):
    found = knock_out_backbone(tiny, trace, percents=(5, 20), draws=3)
    flow, last = trace.flow.edge_flow(), int(np.flatnonzero(trace.spans.answer)[-1])
    inner = range(trace.spans.prompt_length, last)
    edges = sorted(
        ((q, k) for q in inner for k in inner if k < q), key=lambda edge: (-flow[edge], edge)
    )
    for one in found:
        chosen = edges[: -(-len(edges) * one.percent // 100)]
        cut = torch.zeros(1, *flow.shape, dtype=torch.bool)
        for edge in chosen:
            cut[0][edge] = True
        effect = cut_edges(tiny.model, *parts(trace), cut)
        assert one.backbone == pytest.approx(float(effect.drop), abs=1e-4)
        assert one.edges == len(chosen)
        assert one.attention == pytest.approx(sum(trace.attention[edge] for edge in chosen))
        assert one.attention <= one.other_attention < 1.2 * one.attention
        assert one.other_edges <= len(edges) - len(chosen)


def test_edges_of_deciding_rows_are_cut_in_these_rows(tiny):
    decided = ft.wrap(tiny.model, tiny.tokenizer, preset="decided", mode="dense")
    trace = decided.trace(PROMPT, RESPONSE)
    (found,) = knock_out_backbone(decided, trace, percents=(10,), draws=1)
    flow, last = trace.flow.edge_flow(), int(np.flatnonzero(trace.spans.answer)[-1])
    start = trace.spans.prompt_length
    edges = [(q, k) for q in range(start, last + 1) for k in range(start, last) if k < q - 1]
    chosen = sorted(edges, key=lambda edge: (-flow[edge], edge))[: -(-len(edges) // 10)]
    cut = torch.zeros(1, *flow.shape, dtype=torch.bool)
    for later, earlier in chosen:
        cut[0, later - 1, earlier] = True
    effect = cut_edges(tiny.model, *parts(trace), cut)
    assert found.edges == len(chosen)
    assert found.backbone == pytest.approx(float(effect.drop), abs=1e-4)


def test_streamed_traces_and_no_draws_are_refused(tiny, trace):
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        knock_out_backbone(tiny, trace, draws=0)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        measure_curves(tiny, trace, steps=0)
    streamed = ft.wrap(tiny_llama(), tiny_tokenizer(), mode="streamed", preset="paper").trace(
        PROMPT, RESPONSE
    )
    with pytest.raises(ValueError, match="was streamed"):
        knock_out_backbone(tiny, streamed)
