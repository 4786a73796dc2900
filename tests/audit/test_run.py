import itertools
import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from scipy.stats import ttest_rel

import flowtracer_plugin as ft
from flowtracer_plugin.audit import run as audit_run
from flowtracer_plugin.audit.policy_gradient import gradients_for, named_parameters
from flowtracer_plugin.audit.run import AuditOptions, NoSignalError, audit, split_into_batches
from flowtracer_plugin.audit.sampling import Group
from flowtracer_plugin.audit.summary import holm, summarise_audit, tilted_cosines
from flowtracer_plugin.credit.scorers import SCORERS, every, find_scorer
from flowtracer_plugin.evaluation.token_sets import CLASS_NAMES
from tests.audit import reference_audit as reference
from tests.credit.reference_scorers import top
from tests.tiny import PROMPT, tiny_llama, tiny_tokenizer

TEXTS = (
    " He had 3. 3 - 1 = 2.\nThe answer is 2.",
    " He ate one.\nThe answer is 3.",
    " 3 apples - 1 = 2. The answer is 2.",
    " The answer is 1, or 12.",
)
OPTIONS = AuditOptions(batches=4, temperature=0.7)
DIGITS = r"\d"


@pytest.fixture(scope="module")
def tracer():
    return ft.wrap(tiny_llama(), tiny_tokenizer(), preset="paper")


def groups(rewards=((1, 0, 1, 0), (0, 0, 0.5, 1), (1, 1, 1, 1), (0, 1, 0, 0))):
    """Eight prompts, two of them without signal."""
    tokenizer = tiny_tokenizer()
    return [
        Group(
            row=row,
            prompt_ids=tuple(tokenizer.encode(f"{PROMPT} {row}")),
            completions=tuple(
                tuple(tokenizer.encode(TEXTS[(row + number) % 4][: 40 - row]))
                for number in range(4)
            ),
            rewards=tuple(map(float, rewards[(row + row // 4) % 4])),
        )
        for row in range(8)
    ]


def parameters(tracer, pattern=None):
    return list(named_parameters(tracer.model, pattern).values())


def audited(tracer, *names, given=None, pattern=None, options=OPTIONS, oracle=DIGITS, **others):
    scorers = [find_scorer(name) if isinstance(name, str) else name for name in names]
    chosen = parameters(tracer, pattern)
    given = given or groups()
    return list(audit(tracer, given, scorers, chosen, options, oracle=oracle, **others))


def boosts(tracer):
    """The choices of the scorers, one rollout at a time."""
    tokenizer, model = tracer.tokenizer, tracer.model

    def digits(group, said):
        return [float(any(c.isdigit() for c in tokenizer.decode([one]))) for one in said]

    def flow(group, said):
        prompt, completion = torch.tensor([group.prompt_ids]), torch.tensor([said])
        batch = tracer.trace_ids(
            prompt, completion, torch.ones_like(prompt), torch.ones_like(completion)
        )
        return top(batch.completion_throughput[0].tolist(), [True] * len(said), 0.4)

    return {
        "entropy": reference.most_uncertain(model, OPTIONS.temperature, 0.4),
        "oracle": digits,
        "flow": flow,
    }


def test_gradients_are_those_of_the_slow_definition(tracer):
    names, boosted = list(named_parameters(tracer.model, None)), boosts(tracer)
    batches = [[group for group in groups()[start::4] if group.has_signal] for start in range(4)]
    halves = [batches[0] + batches[2], batches[1] + batches[3]]
    assert sum(map(len, halves)) == 6

    def gradient(part, gamma, boost):
        def weigh(group, said):
            if math.isinf(gamma):
                return boost(group, said)
            return [1 + (gamma - 1) * one for one in boost(group, said)]

        return reference.gradient(
            tracer.model, parameters(tracer), part, weigh, OPTIONS.temperature
        )

    def nothing(group, said):
        return [0.0] * len(said)

    sums = [gradient(half, 1.0, nothing) for half in halves]
    plain = [gradient(batch, 1.0, nothing) for batch in batches]
    tilted = {
        (number, name, gamma): gradient(batch, gamma, boost)
        for number, batch in enumerate(batches)
        for name, boost in boosted.items()
        for gamma in (1.5, 3.0, math.inf)
    }
    for pattern in (None, r"layers\.1\.", "embed_tokens"):
        chosen = set(named_parameters(tracer.model, pattern))

        def cosine(vectors, number, chosen=chosen):
            pairs = zip(names, vectors, sums[1 - number % 2], strict=True)
            kept = [(one, other) for name, one, other in pairs if name in chosen]
            return reference.cosine(*zip(*kept, strict=True))

        found = audited(tracer, *boosted, pattern=pattern)
        assert [batch.number for batch in found] == [n for n in (0, 2, 1, 3) if batches[n]]
        for batch in found:
            uniform = batch.with_reference / math.sqrt(batch.squared)
            wanted = cosine(plain[batch.number], batch.number)
            assert uniform == pytest.approx(wanted, abs=1e-4)
        for (number, name, gamma), vectors in tilted.items():
            place = [batch.number for batch in found].index(number)
            wanted = cosine(vectors, number)
            cosines = tilted_cosines(name, found, gamma)
            assert cosines[place] == pytest.approx(wanted, abs=1e-4), (pattern, name, gamma)


def test_the_summary_counts_what_the_scorers_chose(tracer):
    found = audited(tracer, "entropy", "oracle", "flow")
    tokenizer, boosted = tracer.tokenizer, boosts(tracer)
    summary = summarise_audit(found)
    told = [group for group in groups() if group.has_signal]
    said = [(group, one) for group in told for one in group.completions]
    assert summary.tokens == sum(len(one) for _, one in said)
    uncertain = [
        reference.entropies(tracer.model, group.prompt_ids, one, OPTIONS.temperature)
        for group, one in said
    ]
    assert summary.entropy == pytest.approx(sum(map(sum, uncertain)) / summary.tokens, rel=1e-4)
    for scorer in summary.scorers:
        weights = [boosted[scorer.scorer](group, one) for group, one in said]
        chosen = sum(map(sum, weights))
        entropy = sum(
            w * h
            for a, b in zip(weights, uncertain, strict=True)
            for w, h in zip(a, b, strict=True)
        )
        assert scorer.chosen == pytest.approx(chosen / summary.tokens)
        assert scorer.entropy == pytest.approx(entropy / chosen, rel=1e-4)
        numbers = sum(
            weight
            for row, (_, one) in zip(weights, said, strict=True)
            for weight, token in zip(row, one, strict=True)
            if any(letter.isdigit() for letter in tokenizer.decode([token]))
        )
        assert scorer.classes["number"] == pytest.approx(numbers / chosen)
        assert sum(scorer.classes.values()) == pytest.approx(1)
        assert tuple(scorer.classes) == CLASS_NAMES


def test_uniform_credit_does_not_differ_from_itself(tracer):
    (uniform,) = summarise_audit(audited(tracer, "uniform"), gammas=(1.5, 3.0)).scorers
    for difference in uniform.differences:
        assert (difference.mean, difference.error, difference.p) == (0.0, 0.0, 1.0)
    assert (uniform.signal, uniform.noise, uniform.chosen) == (0.0, 0.0, 0.0)


def test_choosing_all_tokens_does_not_turn_the_gradient(tracer):
    options = replace(OPTIONS, top_fraction=1.0)
    (drawn,) = summarise_audit(audited(tracer, "random", options=options)).scorers
    assert [one.mean for one in drawn.differences] == pytest.approx([0, 0, 0], abs=1e-6)
    assert (drawn.signal, drawn.noise, drawn.chosen) == pytest.approx((1, 1, 1), abs=1e-5)


def by_place(name, remainder):
    """A scorer that chooses every other token."""

    def measure(rollouts):
        places = torch.arange(rollouts.competing.shape[1])
        return (places % 2 == remainder).float().expand_as(rollouts.competing)[None]

    return replace(SCORERS["oracle"], name=name, needs=frozenset(), measure=measure, choose=every)


def test_the_signals_of_disjoint_choices_add_up(tracer):
    found = summarise_audit(audited(tracer, by_place("even", 0), by_place("odd", 1)))
    even, odd = found.scorers
    assert even.signal + odd.signal == pytest.approx(1, abs=1e-5)
    assert even.chosen + odd.chosen == pytest.approx(1)


def test_differences_are_tested_as_pairs(tracer):
    found = audited(tracer, "entropy")
    difference = summarise_audit(found).scorers[0].differences[0]
    uniform = [batch.with_reference / math.sqrt(batch.squared) for batch in found]
    test = ttest_rel(tilted_cosines("entropy", found, 1.5), uniform)
    assert difference.p == pytest.approx(test.pvalue)
    interval = test.confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))
    assert difference.mean / difference.error == pytest.approx(test.statistic)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(chances):
    numbers = range(len(chances))
    subsets = [
        chosen
        for size in range(1, len(chances) + 1)
        for chosen in itertools.combinations(numbers, size)
    ]
    wanted = [
        max(
            min(1.0, len(chosen) * min(chances[n] for n in chosen))
            for chosen in subsets
            if number in chosen
        )
        for number in numbers
    ]
    assert holm(chances) == pytest.approx(wanted)


# --- a task in which one token decides ---


def planted_groups(seed=0):
    """Groups in which the letter after `=` decides the reward, and all others are noise."""
    tokenizer, rng = tiny_tokenizer(), random.Random(seed)
    prompt = tuple(tokenizer.encode(PROMPT))
    found = []
    for row in range(32):
        letters = ["".join(rng.choices("bcfg", k=16)) for _ in range(8)]
        said = [f"{one[:4]}={one[4:]}" for one in letters]
        assert {len(tokenizer.encode(one)) for one in said} == {17}
        found.append(
            Group(
                row=row,
                prompt_ids=prompt,
                completions=tuple(tuple(tokenizer.encode(one)) for one in said),
                rewards=tuple(float(one[4] in "bf") for one in letters),
            )
        )
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_where_one_token_decides_the_oracle_helps_and_random_choice_does_not(tracer, seed):
    options = AuditOptions(batches=8)
    found = audited(
        tracer,
        "oracle",
        "random",
        given=planted_groups(seed),
        options=options,
        oracle="=(.)",
    )
    summary = summarise_audit(found)
    knowing, chance = summary.scorers
    assert all(difference.low > 0 for difference in knowing.differences)
    assert knowing.signal > 0.5 > 0.45 > knowing.noise
    assert knowing.chosen == pytest.approx(1 / 17)
    assert knowing.over_random.low > 0
    # A random share of independent tokens has that share of the signal, and its root of the noise.
    assert all(difference.mean < 0 for difference in chance.differences)
    assert chance.signal == pytest.approx(0.4, abs=0.06)
    assert chance.noise == pytest.approx(math.sqrt(0.4), abs=0.04)


# --- halves, parameters, mistakes ---


def test_batches_cover_all_of_the_data_and_leave_out_groups_without_signal():
    parts = split_into_batches(groups(), 4)
    assert not any(groups()[row].has_signal for row in (2, 5))
    assert [[group.row for group in part] for part in parts] == [[0, 4], [1], [6], [3, 7]]


def test_no_more_forward_passes_are_run_than_memory_demands(tracer, monkeypatch):
    """One for each group, and one more in the half that is the first reference."""
    rows, run = [], audit_run.token_probabilities

    def counted(model, ids, *given):
        rows.append(ids.shape)
        return run(model, ids, *given)

    monkeypatch.setattr(audit_run, "token_probabilities", counted)
    found = audited(tracer, "random")
    assert len(rows) == 6 + 3
    audited(tracer, "random", done=[batch.number for batch in found])
    assert len(rows) == 6 + 3


def test_batches_that_are_known_are_not_measured_again(tracer):
    whole = audited(tracer, "random")
    left = audited(tracer, "random", done=[batch.number for batch in whole[:2]])
    assert left == whole[2:]


def test_rewards_that_never_differ_are_refused(tracer):
    with pytest.raises(NoSignalError, match="among 8 prompts, none in one half got completions"):
        audited(tracer, "random", given=groups(rewards=[(1, 1, 1, 1)] * 4))


def test_a_single_batch_is_refused(tracer):
    with pytest.raises(ValueError, match="at least 2 batches in which rewards differ, found 1"):
        summarise_audit(audited(tracer, "random")[:1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batches": 5}, "batches must be an even number of at least 4, got 5"),
        ({"batches": 2}, "at least 4, got 2"),
        ({"top_fraction": 0.0}, "top_fraction must be above 0 and up to 1, got 0.0"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        AuditOptions(**options)


def test_parameters_are_found_by_a_pattern():
    model = tiny_llama()
    assert set(named_parameters(model, r"layers\.1\.")) == {
        name for name, _ in model.named_parameters() if ".layers.1." in name
    }
    assert set(named_parameters(model, None)) == {name for name, _ in model.named_parameters()}
    model.model.embed_tokens.requires_grad_(False)
    assert "model.embed_tokens.weight" not in named_parameters(model, None)
    with pytest.raises(ValueError, match=r"name that matches 'layers\.9'; the model has model"):
        named_parameters(model, "layers.9")


def test_a_model_is_left_as_it_was():
    model = tiny_llama().train()
    model.lm_head.requires_grad_(False)
    before = {name: one.requires_grad for name, one in model.named_parameters()}
    chosen = list(named_parameters(model, r"layers\.1\.").values())
    with gradients_for(model, chosen):
        assert not model.training
        asking = {id(one) for one in model.parameters() if one.requires_grad}
        assert asking == set(map(id, chosen))
    assert model.training
    assert {name: one.requires_grad for name, one in model.named_parameters()} == before


def test_an_audit_touches_no_gradient_and_no_random_state(tracer):
    state = torch.random.get_rng_state()
    audited(tracer, "random", "entropy")
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(one.grad is None for one in tracer.model.parameters())


def test_only_the_adapters_of_lora_are_measured():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    tracer = ft.wrap(model, tiny_tokenizer(), preset="paper")
    found = named_parameters(tracer.model, None)
    assert found
    assert all("lora_" in name for name in found)
    batches = audited(tracer, "entropy")
    # B starts at 0, so A has no gradient, and the whole gradient is that of B.
    of_b = audited(tracer, "entropy", pattern="lora_B")
    assert [batch.squared for batch in batches] == pytest.approx([b.squared for b in of_b])
    assert all(batch.squared > 0 for batch in batches)
    assert np.isfinite(summarise_audit(batches).scorers[0].differences[0].mean)


def test_a_completion_that_fails_costs_no_other(tracer, caplog):
    """Finders that fail in one text choose what they choose if there is nothing to find in it."""

    def digits(text):
        return [found.span() for found in re.finditer(DIGITS, text) if "He ate" not in text]

    def failing(text):
        if "He ate" in text:
            raise KeyError("no such token")
        return digits(text)

    wanted = audited(tracer, "oracle", oracle=digits)
    caplog.clear()
    assert audited(tracer, "oracle", oracle=failing) == wanted
    assert len(caplog.records) == 1
    assert "oracle chooses nothing in a completion" in caplog.records[0].message
