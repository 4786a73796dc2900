"""A text scores as in training, by every scorer."""

import numpy as np
import pytest
import torch

import flowtracer_plugin as ft
from flowtracer_plugin.credit.read_rollouts import Late
from flowtracer_plugin.credit.scorers import SCORERS, find_scorer
from flowtracer_plugin.credit.token_scores import NAMES, TOKEN_SCORES, read_text, token_score
from flowtracer_plugin.grpo.scoring import RolloutScorer
from tests.credit import reference_scorers as slow
from tests.tiny import PROMPT, RESPONSE, tiny_llama, tiny_tokenizer

PROMPTS = [PROMPT, "Tom ate 3 apples. How many?"]
OTHERS = [
    *("flow:paper", "reach:decision", "attention:decision", "attention_power:sharp"),
    *("flow:decided", "reach:decided*entropy", "attention:decided", "flow:derivation"),
    *("flow:sharp*grad_x_input", "rollout*surprisal", "fai*entropy", "reach*attention"),
    *("flow:causal:2", "causal:1*entropy", "flow:causal:1*grad_x_input"),
]
MEASURED = [name for name in {*SCORERS, *NAMES, *OTHERS} if name not in ("coupled", "recency")]
ORACLE = r"\d"


def told(name):
    return ORACLE if "oracle" in name else None


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def texts(model):
    tracer = ft.wrap(model, tiny_tokenizer(), mode="dense", preset="paper")
    return [read_text(tracer, tracer.trace(prompt, RESPONSE)) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def batch(model, texts):
    """Both texts with padding on both sides, and entropies and surprisals from the model."""
    start = max(text.trace.spans.prompt_length for text in texts)
    said = max(len(text.trace.token_ids) - text.trace.spans.prompt_length for text in texts) + 1
    ids = torch.zeros(2, start + said, dtype=torch.long)
    visible, late = torch.zeros_like(ids, dtype=torch.bool), torch.full((2, 2, said), torch.nan)
    for row, trace in enumerate(text.trace for text in texts):
        first = start - trace.spans.prompt_length
        ids[row, first : first + len(trace.token_ids)] = torch.from_numpy(trace.token_ids)
        visible[row, first : first + len(trace.token_ids)] = True
        with torch.no_grad():
            chances = model(ids[row : row + 1, visible[row]]).logits[0].double().softmax(-1)
        for place in range(trace.spans.prompt_length, len(trace.token_ids)):
            before, column = chances[place - 1], place + first - start
            late[0, row, column] = -(before * before.log()).sum()
            late[1, row, column] = -before[trace.token_ids[place]].log()
    return ids, visible, start, Late(*late)


@pytest.mark.parametrize("name", sorted(MEASURED))
def test_a_text_scores_as_in_training(model, texts, batch, name):
    ids, visible, start, late = batch
    scorer = find_scorer(name)
    tracer = ft.wrap(model, tiny_tokenizer(), preset=scorer.preset or "paper", layers=scorer.layers)
    reader = RolloutScorer(tracer, scorer, oracle=told(name))
    trained = reader.read(ids, visible, start, 2, late).features
    for row, text in enumerate(texts):
        found = token_score(name, oracle=told(name))(text)
        prompt = text.trace.spans.prompt_length
        assert found.shape == text.trace.token_ids.shape
        assert not found[:prompt].any()
        assert found.any() or name == "uniform"
        wanted = trained[:, row, visible[row, start:]].tolist()
        if name.startswith("shuffled"):
            answer = text.trace.spans.answer[prompt:]
            bins = slow.bins(np.ones_like(answer), answer)
            wanted = [slow.permuted(bins, *wanted)]
        assert found[prompt:].tolist() == pytest.approx(wanted[0], rel=1e-4, abs=1e-6)


def test_coupled_scores_by_its_choice_and_then_by_influence(texts):
    for text in texts:
        prompt = text.trace.spans.prompt_length
        found, fai = token_score("coupled")(text)[prompt:], token_score("fai")(text)[prompt:]
        scorer = find_scorer("coupled")
        boost = scorer.boost(text.rollouts(scorer), 0.4)[0].tolist()
        assert len(set(boost)) > 1
        wanted = sorted(range(len(found)), key=lambda i: (-boost[i], -fai[i], i))
        assert np.argsort(-found, kind="stable").tolist() == wanted


def test_a_preset_wins_over_the_options_of_the_trace(model, texts):
    """Without a preset, a name means the graph as it was traced."""
    tracer = ft.wrap(model, tiny_tokenizer(), mode="dense", preset="sharp")
    sharp = read_text(tracer, tracer.trace(PROMPT, RESPONSE))
    for name in ("flow", "reach", "attention"):
        one, other = token_score(name), token_score(f"{name}:paper")
        assert other(sharp) == pytest.approx(one(texts[0]), abs=1e-6)
        assert one(sharp) == pytest.approx(token_score(f"{name}:sharp")(texts[0]), abs=1e-6)
        assert np.abs(one(sharp) - other(sharp)).max() > 1e-3


def test_a_text_is_read_once_for_all_scores(model, monkeypatch):
    tracer = ft.wrap(model, tiny_tokenizer(), mode="dense", preset="paper")
    text = read_text(tracer, tracer.trace(PROMPT, RESPONSE))
    passes = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    for score in TOKEN_SCORES.values():
        score(text)
    hook.remove()
    # Attention of all layers, projections of values, entropies; and the gradients of the answer and
    # of what was sampled.
    assert sorted(passes) == [False, False, False, True, True]


def test_the_score_oracle_needs_an_oracle_and_takes_any(texts):
    with pytest.raises(ValueError, match="the score 'oracle' needs oracle, a pattern"):
        token_score("oracle")
    trace = texts[0].trace
    for pattern, wanted in ((r"\d", ["3", "3", "1", "2", "2"]), ("answer", ["answer"])):
        found = token_score("oracle", oracle=pattern)(texts[0])
        said = [piece for piece, one in zip(trace.tokens, found, strict=True) if one == 1]
        assert [piece.strip(" .") for piece in said] == wanted
        assert not found[: trace.spans.prompt_length].any()


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"scorer must be one of flow, .*got 'love'"):
        token_score("love")
    assert token_score("recency").__name__ == "recency"
