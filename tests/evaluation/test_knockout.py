import threading
from contextlib import contextmanager
from unittest.mock import patch

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from flowtracer_plugin.evaluation import cut_passes, knockout
from flowtracer_plugin.evaluation.knockout import Baseline, cut_edges, hidden_edges, knock_out
from flowtracer_plugin.model.cutting import KnockOutError, check_model, cutting
from tests.evaluation import reference_knockout as slow
from tests.families import FAMILIES, WINDOW, quiet_transformers, redrawn, tiny_model

SIZE = 14
SMALL = LlamaConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def small():
    return redrawn(SMALL)


def text(size=SIZE, seed=0, vocabulary=24, answers=(10, 11, 13)):
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, vocabulary, size))
    answer = torch.zeros(size, dtype=torch.bool)
    answer[list(answers)] = True
    return ids, answer


def close(found, wanted):
    torch.testing.assert_close(
        found.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-4, atol=1e-5
    )


def test_the_slow_model_is_the_model(small):
    ids, _ = text()
    with torch.no_grad():
        logits = small(ids[None]).logits[0]
    nothing = [[False] * SIZE] * SIZE
    close(logits, slow.llama_logits(small, ids.tolist(), nothing))


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.sampled_from(knockout.ROWS),
    batch_size=st.sampled_from([None, 1, 3]),
    pack=st.sampled_from([1, 6, 1000]),
)
def test_a_knock_out_is_that_of_the_slow_model(small, seed, rows, batch_size, pack):
    rng = np.random.default_rng(seed)
    ids, _ = text(seed=seed)
    early = int(rng.choice([1, 10]))  # a late answer leaves more to be read from the cache
    answer = torch.from_numpy((rng.random(SIZE) < 0.3) & (np.arange(SIZE) >= early))
    answer[int(rng.integers(early, SIZE))] = True
    tokens = torch.from_numpy(rng.random((4, SIZE)) < rng.choice([0.1, 0.4, 0.9]))
    tokens[3] = False
    with patch.object(cut_passes, "PACKED_ROWS", pack):
        found = knock_out(small, ids, answer, tokens, rows=rows, batch_size=batch_size)
    wanted = [
        slow.effect(small, ids.tolist(), answer.tolist(), slow.removed_edges(cut, answer, rows))
        for cut in tokens.tolist()
    ]
    close(found.drop, [each[0] for each in wanted])
    assert found.flipped.tolist() == [each[1] for each in wanted]
    close(found.divergence, [each[2] for each in wanted])
    assert abs(found.drop[3]) < 1e-5


def test_edges_are_cut_one_by_one(small):
    ids, answer = text()
    rng = np.random.default_rng(3)
    edges = torch.from_numpy(rng.random((3, SIZE, SIZE)) < 0.3)
    found = cut_edges(small, ids, answer, edges)
    wanted = [slow.effect(small, ids.tolist(), answer.tolist(), one) for one in edges.tolist()]
    close(found.drop, [each[0] for each in wanted])
    sets = torch.from_numpy(rng.random((2, SIZE)) < 0.3)
    as_edges = cut_edges(small, ids, answer, hidden_edges(sets, answer, rows="answer"))
    torch.testing.assert_close(
        as_edges.drop, knock_out(small, ids, answer, sets, rows="answer").drop
    )


@contextmanager
def counted_tokens(model):
    """The number of tokens of each pass over the model."""
    read = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda _, given: read.append(given[0].numel())
    )
    yield read
    hook.remove()


def test_what_cuts_have_in_common_is_read_once(small):
    ids, answer = text(answers=(12,))
    tokens = torch.from_numpy(np.random.default_rng(4).random((9, SIZE)) < 0.2)
    tokens[:, 0] = False
    tokens[:, 3] |= ~tokens.any(1)
    baseline = Baseline.read(small, ids, answer)
    assert baseline.cache is not None
    with counted_tokens(small) as read:
        baseline.knock_out(tokens)
    start = int(tokens.int().argmax(1).min()) + 1
    rows = {
        (row, *cut[:row])
        for cut in tokens.tolist()
        for row in range(start, 12)
        if row == 11 or not cut[row]  # nothing sees a token that is hidden
    }
    plain = 12 - start
    assert read == [len(rows) + plain]
    assert len(rows) < 0.7 * len(tokens) * (12 - start)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_model_that_counts_distances_is_not_packed(family):
    model = tiny_model(family)
    ids, answer = text(40, vocabulary=128, answers=(36,))
    tokens = torch.from_numpy(np.random.default_rng(1).random((9, 40)) < 0.1)
    baseline = Baseline.read(model, ids, answer)
    assert baseline.cache is not None
    with counted_tokens(model) as read:
        baseline.knock_out(tokens)
    start = int(tokens.int().argmax(1).min()) + 1
    assert len(read) == (1 if family == "llama" else 2)
    assert read[-1] == read[0] if family == "llama" else read[-1] == 9 * (40 - start)


def test_log_probability_and_prediction_without_a_cut(small):
    ids, answer = text()
    with torch.no_grad():
        logits = small(ids[None]).logits[0]
    nothing = torch.zeros(0, SIZE, dtype=torch.bool)
    found = knock_out(small, ids, answer, nothing)
    chosen = slow.log_probs(logits.double().numpy())
    wanted = np.mean([chosen[p - 1][ids[p]] for p in (10, 11, 13)])
    assert found.log_prob == pytest.approx(wanted, abs=1e-5)
    assert found.drop.shape == found.flipped.shape == found.divergence.shape == (0,)
    assert not found.predicted
    said = ids.clone()
    for place in (10, 11, 13):
        with torch.no_grad():
            said[place] = small(said[None]).logits[0, place - 1].argmax()
    assert knock_out(small, said, answer, nothing).predicted


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_cut_edges_get_nothing_and_others_share_it(family, implementation):
    model = tiny_model(family)
    if implementation == "sdpa" and family in {"gemma2", "gpt_oss"}:
        implementation = "eager"  # these have no other
    model.set_attn_implementation(implementation)
    ids = torch.arange(20)[None] % 128
    removed = torch.from_numpy(np.random.default_rng(0).random((1, 20, 20)) < 0.4)
    answer = torch.arange(20) >= 18
    effect = cut_edges(model, ids[0], answer, removed).drop
    model.set_attn_implementation("eager")
    with torch.no_grad():
        plain = model(ids, output_attentions=True)
        with cutting(removed):
            cut = model(ids, output_attentions=True)
    gone = (removed[0] & ~torch.eye(20, dtype=torch.bool)).expand_as(plain.attentions[0][0])
    for before, after in zip(plain.attentions, cut.attentions, strict=True):
        assert (after[0][gone] == 0).all()
        assert (after[0][before[0] == 0] == 0).all()  # what a window hides stays hidden
        assert (after[0][~gone & (before[0] > 0)] > 0).all()
    first = plain.attentions[0][0]
    kept = first.masked_fill(gone, 0.0)
    sink = 1 - first.sum(-1, keepdim=True)
    torch.testing.assert_close(
        cut.attentions[0][0], kept / (kept.sum(-1, keepdim=True) + sink), rtol=1e-4, atol=1e-6
    )
    chosen = [out.logits[0, 17:19].log_softmax(-1) for out in (plain, cut)]
    fell = [scores.gather(-1, ids[0, 18:, None]).mean() for scores in chosen]
    torch.testing.assert_close(effect[0], fell[0] - fell[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral", "gpt2"])
@pytest.mark.parametrize("rows", knockout.ROWS)
def test_a_cached_beginning_changes_nothing(family, rows, monkeypatch):
    model = tiny_model(family)
    ids, answer = text(40, vocabulary=128, answers=(36, 37))
    assert WINDOW < 40
    tokens = torch.from_numpy(np.random.default_rng(1).random((9, 40)) < 0.1)
    assert check_model(model)
    reused = knock_out(model, ids, answer, tokens, rows=rows)
    monkeypatch.setattr(knockout, "check_model", lambda _: False)
    whole = knock_out(model, ids, answer, tokens, rows=rows)
    torch.testing.assert_close(reused.drop, whole.drop, rtol=1e-3, atol=1e-4)
    assert whole.drop.abs().max() > 0.01


def test_a_text_grows_while_it_is_cut(small):
    ids, _ = text(8, answers=())
    tokens = torch.zeros(1, 12, dtype=torch.bool)
    tokens[0, 3] = True
    other = ids.clone()
    other[3] = (ids[3] + 1) % 24
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}

    def said(start):
        return small.generate(start[None], attention_mask=torch.ones(1, 8), **options)[0, 8:]

    edges = hidden_edges(tokens, torch.zeros(12, dtype=torch.bool), rows="future")
    with cutting(edges):
        assert said(ids).tolist() == said(other).tolist()
    plain = said(ids)
    with torch.no_grad(), cutting(edges):
        rest = ids
        for _ in range(4):
            rest = torch.cat([rest, small(rest[None]).logits[0, -1:].argmax(-1)])
        assert said(ids).tolist() == rest[8:].tolist()
    assert said(ids).tolist() == plain.tolist()


def test_a_text_longer_than_its_cut_is_refused(small):
    ids, _ = text()
    with (
        pytest.raises(KnockOutError, match=r"a mask of 14 places .* cut has 13 tokens"),
        torch.no_grad(),
        cutting(torch.zeros(1, 13, 13, dtype=torch.bool)),
    ):
        small(ids[None])


def test_the_model_and_the_table_of_masks_stay_unchanged(small):
    before = dict(ALL_MASK_ATTENTION_FUNCTIONS)
    ids, answer = text()
    small.train()
    try:
        knock_out(small, ids, answer, torch.ones(1, SIZE, dtype=torch.bool))
        assert all(module.training for module in small.modules())
    finally:
        small.eval()
    with pytest.raises(ZeroDivisionError), cutting(torch.ones(1, 2, 2, dtype=torch.bool)):
        _ = 1 / 0
    assert dict(ALL_MASK_ATTENTION_FUNCTIONS) == before
    assert not ALL_MASK_ATTENTION_FUNCTIONS._local_mapping


def test_masks_that_others_registered_are_restored():
    def own(*args, **options):
        return before(*args, **options)

    before = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = own
    try:
        with cutting(torch.ones(1, 2, 2, dtype=torch.bool)):
            assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is not own
        assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is own
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


def test_other_threads_are_not_cut(small):
    ids, _ = text()
    found = []

    def run():
        with torch.no_grad():
            found.append(small(ids[None]).logits)

    run()
    with cutting(torch.ones(1, SIZE, SIZE, dtype=torch.bool)):
        other = threading.Thread(target=run)
        other.start()
        other.join()
        run()
    assert torch.equal(found[1], found[0])
    assert not torch.allclose(found[2], found[0])


def test_a_recurrent_model_is_refused():
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(
            MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2)
        )
    ids, answer = text()
    with pytest.raises(KnockOutError, match="cutting attention has no effect on MambaForCausalLM"):
        knock_out(model, ids, answer, torch.ones(1, SIZE, dtype=torch.bool))


def test_a_model_whose_tokens_leak_is_refused(small):
    leaking = redrawn(SMALL)
    leaking.model.layers[0].mlp.register_forward_hook(
        lambda _module, _args, out: out + 0.3 * torch.nn.functional.pad(out, (0, 0, 1, -1))
    )
    with pytest.raises(KnockOutError, match=r"by other ways than attention.* still has \d+% of"):
        check_model(leaking)


def test_an_implementation_without_masks_is_refused_and_another_helps(small):
    model = redrawn(SMALL)
    sdpa = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = lambda *args, **options: None  # as flash attention's
    try:
        with pytest.raises(KnockOutError, match=r"'sdpa' attention.*load it with .*'eager'"):
            check_model(model)
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa
    model.set_attn_implementation("eager")
    assert check_model(model)


def test_a_text_that_continues_differently_from_a_cache_is_read_whole(small, monkeypatch):
    ids, answer = text()
    tokens = torch.from_numpy(np.random.default_rng(1).random((5, SIZE)) < 0.3)
    wanted = knock_out(small, ids, answer, tokens).drop
    used = []
    monkeypatch.setattr(
        cut_passes, "prefix_copies", lambda *given: used.append(0) or _scaled(*given)
    )
    found = knock_out(small, ids, answer, tokens).drop
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert len(used) == 1


def test_impossible_words_keep_the_divergence_finite():
    model = redrawn(SMALL)
    banned = torch.where(torch.arange(24) == 5, -torch.inf, 0.0)
    model.lm_head.register_forward_hook(lambda _module, _args, out: out + banned)
    ids, answer = text()
    found = knock_out(model, ids, answer, torch.ones(1, SIZE, dtype=torch.bool))
    assert 0 < float(found.divergence) < 100


def _scaled(cache, length, copies):
    from flowtracer_plugin.model.cutting import prefix_copies

    fresh = prefix_copies(cache, length, copies)
    for layer in fresh.layers:
        layer.keys = layer.keys * 1.5
    return fresh


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": "all"}, "rows must be one of answer, future, got 'all'"),
        ({"tokens": torch.ones(1, 3, dtype=torch.bool)}, r"boolean sets \[cut, 14\].*\(1, 3\)"),
        ({"tokens": torch.ones(1, SIZE)}, "boolean sets .* got torch.float32"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"answer": torch.zeros(SIZE, dtype=torch.bool)}, "answer must mark at least one token"),
        ({"answer": torch.ones(SIZE, dtype=torch.bool)}, "and not the first"),
        ({"answer": torch.ones(3, dtype=torch.bool)}, r"got \(14,\) and torch.bool of shape \(3,"),
        ({"ids": torch.full((SIZE,), 24)}, "between 0 and 23"),
    ],
)
def test_mistakes_are_named(small, change, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it refuses shapes first
    ids, answer = text()
    given = {
        "ids": ids,
        "answer": answer,
        "tokens": torch.ones(1, SIZE, dtype=torch.bool),
        "rows": "future",
    } | change
    with pytest.raises(ValueError, match=message):
        knock_out(small, **given)


def test_edges_of_another_text_are_refused(small, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    ids, answer = text()
    with pytest.raises(ValueError, match=r"boolean \[cut, query, key\] with 14 tokens"):
        cut_edges(small, ids, answer, torch.ones(1, 3, 3, dtype=torch.bool))
