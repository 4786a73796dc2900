"""Scorers against plain loops over one rollout without its padding, and the laws they keep."""

import doctest
import random
import struct
from collections import Counter
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

import flowtracer_plugin.credit.controls as controls_module
from flowtracer_plugin.attention import AttentionCall, AttentionWeights
from flowtracer_plugin.credit.controls import permute_within, role_and_position, row_draws
from flowtracer_plugin.credit.rhythm import Rhythm, coupled_boost, read_rhythm
from flowtracer_plugin.credit.scorers import SCORERS, Rollouts, credit_weights, find_scorer, lowest
from tests.attention.reference_attention import loop_head_mean
from tests.credit import reference_scorers as slow
from tests.device.gpu import GPU, on_gpu

FRACTIONS = st.sampled_from([0.0, 0.2, 0.4, 0.5, 1.0])
INPUTS = {
    "flow": "throughput",
    "attention": "attention",
    "heads": "calls",
    "entropy": "entropies",
    "surprisal": "surprisals",
    "saliency": "saliency",
    "swaps": "swaps",
    "sensitivity": "sensitivity",
    "removals": "removals",
    "flow_removals": "flow_removals",
    "oracle": "oracle",
}
RHYTHM = ("fai", "waad", "coupled")
LAYERED = (*RHYTHM, "rollout")
PRODUCTS = ("flow*entropy", "attention*surprisal", "reach*entropy*surprisal")
IN_STEPS = "flow:causal"


def input_of(name, need):
    """The field of `Rollouts` that provides one of a scorer's needs."""
    return "reach" if "reach" in name and need == "flow" else INPUTS[need]


def one_call(kind, shared, groups, visible, generator):
    """An attention call with NaN on the padding."""
    batch, tokens = visible.shape
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril() & visible[:, None]
    query = torch.randn(batch, groups * shared, tokens, 3, generator=generator) * 2
    key = torch.randn(batch, groups, tokens, 3, generator=generator)
    call = AttentionCall(query=query, key=key, mask=seen[:, None], scaling=0.7)
    if kind == "call":
        hidden = ~visible[:, None, :, None]
        query.masked_fill_(hidden, torch.nan)
        key.masked_fill_(hidden, torch.nan)
        return call
    weights = torch.stack(
        [torch.tensor(loop_head_mean(call, [head])) for head in range(groups * shared)], dim=1
    ).float()
    shown = (visible[:, :, None] & visible[:, None])[:, None]
    return AttentionWeights(weights=weights.masked_fill(~shown, torch.nan))


@st.composite
def rollouts(draw, longest=16):
    """What `Rollouts` holds: rows without tokens, answers, flow or a choice of the model's.

    As keywords, for the check of types draws random numbers, which a strategy may not.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    lengths = draw(
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, longest)), min_size=1, max_size=3)
    )
    prompts = max(asked for asked, _ in lengths) + draw(st.integers(0, 2))
    completions = max(1, *(said for _, said in lengths)) + draw(st.integers(0, 2))
    shape = len(lengths), prompts + completions
    visible, answer = torch.zeros(2, *shape, dtype=torch.bool)
    for row, (asked, said) in enumerate(lengths):
        visible[row, prompts - asked : prompts + said] = True
        start, end = sorted(draw(st.tuples(*[st.integers(0, said)] * 2)))
        answer[row, prompts + start : prompts + end] = True
    uniform = torch.rand(9, *shape, generator=generator)
    coarse = (uniform * 8).floor() / 8  # with ties and zeros
    competing = (visible & (uniform[0] < draw(st.sampled_from([0.0, 0.7, 1.0]))))[:, prompts:]
    attention = torch.rand(shape[0], shape[1], shape[1], generator=generator).tril()
    kinds = st.tuples(st.sampled_from(["call", "weights"]), st.integers(1, 2), st.integers(1, 2))
    return {
        "ids": torch.randint(0, 9, shape, generator=generator),
        "visible": visible,
        "prompt_length": prompts,
        "competing": competing,
        "target": answer if draw(st.booleans()) else answer.roll(-1, 1),
        "answer": answer,
        "throughput": coarse[1] * visible * answer.any(-1, keepdim=True),
        "attention": attention * visible[:, :, None] * visible[:, None],
        "calls": [
            one_call(*kind, visible, generator)
            for kind in draw(st.lists(kinds, min_size=1, max_size=2))
        ],
        "entropies": coarse[2, :, prompts:].masked_fill(~competing, torch.nan),
        "surprisals": coarse[6, :, prompts:].masked_fill(~competing, torch.nan),
        "reach": coarse[7] * visible * answer.any(-1, keepdim=True),
        "saliency": coarse[8] * visible,
        "swaps": coarse[8].flip(-1) * visible,
        "sensitivity": coarse[8].roll(1, -1) * visible,
        "removals": coarse[7].flip(-1) * visible,
        "flow_removals": coarse[6].flip(-1) * visible,
        "oracle": (uniform[3] < 0.3)[:, prompts:],
        "seed": draw(st.integers(-2, 2)),
    }


@dataclass(frozen=True, kw_only=True)
class Row:
    """One rollout without its padding, and its place in the batch."""

    alone: Rollouts
    where: torch.Tensor  # of its completion tokens, among the columns of the completions


def row_of(batch, row):
    """One row of the batch as a batch of its own, without padding."""
    seen = batch.visible[row]
    prompt = int(seen[: batch.prompt_length].sum())
    where = seen[batch.prompt_length :].nonzero()[:, 0]

    def square(maps):
        return None if maps is None else maps[row : row + 1, ..., seen, :][..., seen]

    def call(one):
        if isinstance(one, AttentionWeights):
            return AttentionWeights(weights=square(one.weights))
        query, key = (part[row : row + 1, :, seen] for part in (one.query, one.key))
        return replace(one, query=query, key=key, mask=square(one.mask))

    def tokens(part):
        return None if part is None else part[row : row + 1, seen]

    def said(part):
        return None if part is None else part[row : row + 1, where]

    return Row(
        where=where,
        alone=Rollouts(
            ids=tokens(batch.ids),
            visible=tokens(batch.visible),
            prompt_length=prompt,
            competing=batch.competing[row : row + 1, where],
            target=tokens(batch.target),
            answer=tokens(batch.answer),
            throughput=tokens(batch.throughput),
            reach=tokens(batch.reach),
            saliency=tokens(batch.saliency),
            swaps=tokens(batch.swaps),
            sensitivity=tokens(batch.sensitivity),
            removals=tokens(batch.removals),
            flow_removals=tokens(batch.flow_removals),
            attention=square(batch.attention),
            calls=[call(one) for one in batch.calls],
            entropies=said(batch.entropies),
            surprisals=said(batch.surprisals),
            oracle=said(batch.oracle),
            seed=batch.seed,
        ),
    )


def rows_of(batch):
    return [row_of(batch, row) for row in range(len(batch.ids))]


def slow_maps(row):
    """The probabilities [head][query][key] of a rollout without padding, one score at a time."""
    maps = []
    for call in row.alone.calls:
        if isinstance(call, AttentionWeights):
            maps += list(call.weights[0].double().numpy())
        else:
            maps += [loop_head_mean(call, [head])[0] for head in range(call.query.shape[1])]
    return maps


def slow_rhythm(row, window=10, horizon=(10, 50)):
    return slow.rhythm(slow_maps(row), row.alone.prompt_length, window, horizon)


def apart(values):
    """Whether float32 orders the values as float64 does."""
    return all(left == right or right - left > 1e-4 for left, right in pairwise(sorted(values)))


def slow_boost(name, row, top_fraction):
    """Each scorer's definition on one rollout, without the draws."""
    alone, competing = row.alone, row.alone.competing[0].tolist()
    if name in RHYTHM:
        waad, fai, step = slow_rhythm(row)
        if name != "coupled":
            return slow.top(fai if name == "fai" else step, competing, top_fraction)
        anchors = slow.top(fai, competing, top_fraction)
        return slow.coupled(waad, step, anchors, competing, 0.5, 2)
    if name == "oracle":
        return [float(a and b) for a, b in zip(alone.oracle[0].tolist(), competing, strict=True)]
    return slow.top(slow_score(name, row), competing, top_fraction)


def slow_score(name, row):
    """The score of each completion token by the definition of a scorer that has one."""
    alone, start = row.alone, row.alone.prompt_length
    target = alone.target[0].tolist()
    if "*" in name:
        factors = [slow_score(part, row) for part in name.split("*")]
        return [float(np.prod(values)) for values in zip(*factors, strict=True)]
    if name == "rollout":
        maps, layers = slow_maps(row), []
        for call in alone.calls:
            heads = (call.weights if isinstance(call, AttentionWeights) else call.query).shape[1]
            layers.append(np.mean([maps.pop(0) for _ in range(heads)], axis=0).tolist())
        return slow.rollout(layers, target, start)
    if name.startswith("attention"):
        return slow.hops(alone.attention[0].tolist(), target, start, 1 + (name != "attention"))
    fields_ = {
        "flow": "throughput",
        "reach": "reach",
        "grad_x_input": "saliency",
        "counterfactual": "swaps",
        "causal": "removals",
        "flow:causal": "flow_removals",
    }
    if name in fields_:
        return getattr(alone, fields_[name])[0, start:].tolist()
    part = {"entropy": alone.entropies, "surprisal": alone.surprisals}[name]
    return part[0].nan_to_num().tolist()


SUMS = ("rollout", "attention_power", *PRODUCTS)


def clear(name, row):
    """Whether rounding cannot change what is chosen."""
    if name in RHYTHM:
        return all(apart(values) for values in slow_rhythm(row))
    return name not in SUMS or apart(slow_score(name, row))


SHUFFLED = {"shuffled": "flow", "shuffled_reach": "reach"}
DEFINED = [name for name in SCORERS if name not in ("oar", "random", *SHUFFLED, "uniform")]


@pytest.mark.parametrize("name", [*DEFINED, *PRODUCTS, IN_STEPS])
@given(batch=rollouts(), top_fraction=FRACTIONS)
@settings(max_examples=30, deadline=None)
def test_every_row_gets_what_its_definition_says(name, batch, top_fraction):
    batch = Rollouts(**batch)
    found = find_scorer(name).boost(batch, top_fraction)
    wanted = torch.zeros(found.shape)
    for place, row in enumerate(rows_of(batch)):
        assume(clear(name, row))
        if len(row.where):
            wanted[place, row.where] = torch.tensor(slow_boost(name, row, top_fraction))
    assert found.tolist() == wanted.tolist()


@given(
    batch=rollouts(),
    window=st.integers(0, 6),
    nearest=st.integers(0, 4),
    depth=st.integers(0, 4),
    block=st.sampled_from([1, 3, 64]),
)
@settings(max_examples=100, deadline=None)
def test_the_rhythm_of_every_row_is_that_of_its_equations(batch, window, nearest, depth, block):
    batch = Rollouts(**batch)
    horizon = nearest, nearest + depth
    found = read_rhythm(
        batch.calls, batch.visible, batch.prompt_length, window=window, horizon=horizon, block=block
    )
    wanted = [torch.zeros(found.step.shape) for _ in range(3)]
    for place, row in enumerate(rows_of(batch)):
        for part, values in zip(wanted, slow_rhythm(row, window, horizon), strict=True):
            part[place, row.where] = torch.tensor(values, dtype=torch.float32)
    for name, part in zip(("distance", "influence", "step"), wanted, strict=True):
        torch.testing.assert_close(getattr(found, name), part, atol=1e-5, rtol=1e-5)


def long_rollout(heads=10, prompt=4, said=70):
    """One rollout that is longer than the furthest horizon."""
    tokens, random = prompt + said, torch.Generator().manual_seed(3)
    weights = (torch.randn(1, heads, tokens, tokens, generator=random) * 2).exp().tril()
    back = torch.arange(tokens)[:, None] - torch.arange(tokens)
    reach = torch.linspace(1, 40, heads)[:, None, None]
    weights *= (-(back.clamp_min(0) / reach)).exp()
    weights /= weights.sum(-1, keepdim=True)
    nowhere = torch.zeros(1, tokens, dtype=torch.bool)
    return Rollouts(
        ids=torch.arange(tokens)[None],
        visible=~nowhere,
        prompt_length=prompt,
        competing=~nowhere[:, prompt:],
        target=torch.arange(tokens)[None] % 50 == 49,
        answer=nowhere,
        attention=weights.mean(1),
        calls=[AttentionWeights(weights=weights)],
    )


@pytest.mark.parametrize("name", ["attention", *RHYTHM])
def test_a_long_rollout_gets_what_its_definition_says(name):
    batch = long_rollout(said=140)
    wanted = slow_boost(name, row_of(batch, 0), 0.4)
    assert SCORERS[name].boost(batch, 0.4)[0].tolist() == wanted
    assert 0 < sum(wanted) <= 56


def test_an_entropy_that_rounding_made_negative_is_none():
    entropies = torch.tensor([[-1e-7, 0.5]]).repeat(1, 35)
    found = SCORERS["entropy"].boost(replace(long_rollout(), entropies=entropies), 1.0)
    assert torch.equal(found, (entropies > 0).float())


@pytest.mark.parametrize("name", ["flow", "attention", "fai"])
def test_a_score_that_is_no_number_is_an_error(name):
    batch = long_rollout()
    batch.calls[0].weights[..., 60, 20] = torch.nan
    nowhere = torch.full((1, 74), torch.nan)
    attention = nowhere[:, None].expand(1, 74, 74)
    batch = replace(batch, throughput=nowhere, attention=attention, target=batch.visible)
    with pytest.raises(ValueError, match="must be finite and not negative"):
        SCORERS[name].boost(batch, 0.4)


def test_influence_is_counted_from_ten_to_fifty_tokens_ahead():
    """One head pays all of its attention to the fifth token of the completion."""
    batch = long_rollout(heads=1)
    weights = torch.zeros(1, 1, 74, 74)
    weights[..., 8:, 8] = 1.0
    for last, wanted in [(17, 0.0), (18, 1 / 1), (58, 1.0), (60, 1.0)]:
        cut = replace(
            batch, visible=torch.arange(74)[None] <= last, calls=[AttentionWeights(weights=weights)]
        )
        assert read_rhythm(cut.calls, cut.visible, 4).influence[0, 4] == wanted
    weights[..., 18:59, 8] = 0.0
    assert read_rhythm([AttentionWeights(weights=weights)], batch.visible, 4).influence[0, 4] == 0


def test_the_local_third_of_the_heads_measures_distance_and_the_global_third_influence():
    """Head `h` of ten looks `h` tokens back: 0, 1, 2 are local and 7, 8, 9 global."""
    weights = torch.stack([torch.eye(40).roll(back, 0).tril() for back in range(10)])[None]
    visible = torch.ones(1, 40, dtype=torch.bool)
    halves = [AttentionWeights(weights=part) for part in (weights[:, 6:], weights[:, :6])]
    found = read_rhythm(halves, visible, 10, window=5, horizon=(0, 9))
    assert found.distance[0].tolist() == [1.0] * 30  # (0 + 1 + 2) / 3
    # Each of the global heads pays to a token once in the ten rows ahead.
    torch.testing.assert_close(found.influence[0, :21], torch.full((21,), 1 / 10))


@st.composite
def rhythms(draw):
    """Statistics with many ties, and anchors among the competing tokens."""
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    numbers = torch.rand(4, *shape, generator=generator)
    coarse = (numbers * draw(st.sampled_from([2, 5, 100]))).floor()
    competing = numbers[2] < draw(st.sampled_from([0.0, 0.7, 1.0]))
    anchors = competing & (numbers[3] < 0.5)
    return Rhythm(distance=coarse[0], influence=coarse[0], step=coarse[1]), anchors, competing


@given(rhythms(), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(1, 3))
def test_coupled_credit_is_its_definition(drawn, alpha, reach):
    rhythm, anchors, competing = drawn
    found = coupled_boost(rhythm, anchors, competing, alpha=alpha, reach=reach)
    parts = (rhythm.distance, rhythm.step, anchors, competing)
    wanted = [
        slow.coupled(*(part.tolist() for part in row), alpha, reach)
        for row in zip(*parts, strict=True)
    ]
    assert found.tolist() == wanted
    assert ((found >= 0) & (found <= 1 + alpha)).all()
    assert not found[~competing].any()


def test_an_anchor_shares_with_the_largest_step_before_it():
    rhythm = Rhythm(
        distance=torch.tensor([[5.0, 5.0, 1.0, 1.0, 1.0]]),
        influence=torch.zeros(1, 5),
        step=torch.tensor([[0.0, 4.0, 3.0, 0.0, 0.0]]),
    )
    everyone = torch.ones(1, 5, dtype=torch.bool)
    anchors = torch.tensor([[True, True, False, True, False]])
    assert coupled_boost(rhythm, anchors, everyone).tolist() == [[1.0, 1.5, 0.0, 0.5, 0.0]]
    assert coupled_boost(rhythm, anchors, everyone, reach=1).tolist() == [[1.0, 1.0, 0.5, 0.5, 0.0]]
    calm = replace(rhythm, step=torch.tensor([[9.0, 0.0, 0.0, 9.0, 9.0]]))
    assert coupled_boost(calm, anchors, everyone).tolist() == [[1.0, 1.0, 0.0, 1.0, 0.0]]


@given(rollouts())
def test_bins_are_roles_and_tenths(batch):
    batch = Rollouts(**batch)
    answer = batch.answer[:, batch.prompt_length :]
    found = role_and_position(batch.competing, answer).tolist()
    for row, competing, is_answer in zip(found, batch.competing, answer, strict=True):
        wanted = slow.bins(competing.tolist(), is_answer.tolist())
        assert row == [20 if bin_ is None else 10 * bin_[0] + bin_[1] for bin_ in wanted]


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 40), st.integers(1, 5))
def test_a_permutation_stays_in_its_bins(seed, batch, tokens, most):
    generator = torch.Generator().manual_seed(seed)
    bins = torch.randint(0, most, (batch, tokens), generator=generator)
    mask = torch.rand(batch, tokens, generator=generator) < 0.4
    draws = torch.rand(batch, tokens, generator=generator)
    found = permute_within(bins, mask, draws).tolist()
    rows = zip(bins.tolist(), mask.tolist(), draws.tolist(), strict=True)
    assert found == [slow.permuted(*row) for row in rows]


@pytest.mark.parametrize("names", SHUFFLED.items())
@given(batch=rollouts(longest=40), top_fraction=FRACTIONS)
def test_a_shuffle_keeps_the_count_in_every_bin(names, batch, top_fraction):
    batch = Rollouts(**batch)
    moved, chosen = (SCORERS[name].boost(batch, top_fraction) for name in names)
    answer = batch.answer[:, batch.prompt_length :].tolist()
    for row, competing in enumerate(batch.competing.tolist()):
        bins = slow.bins(competing, answer[row])
        counts = [
            Counter(bin_ for bin_, boost in zip(bins, boosts[row], strict=True) if boost)
            for boosts in (chosen, moved)
        ]
        assert counts[0] == counts[1]
        assert None not in counts[1]


def simple(tokens=60, prompt=3, seed=0):
    """Rows of equal ids, all visible, with flow on every other token."""
    visible = torch.ones(2, prompt + tokens, dtype=torch.bool)
    return Rollouts(
        ids=torch.arange(prompt + tokens).expand(2, -1).clone(),
        visible=visible,
        prompt_length=prompt,
        competing=visible[:, prompt:],
        target=~visible,
        answer=~visible,
        throughput=(torch.arange(prompt + tokens) % 2).float().expand(2, -1),
        reach=(torch.arange(prompt + tokens) % 2).float().expand(2, -1),
        seed=seed,
    )


@pytest.mark.parametrize("name", ["random", *SHUFFLED])
def test_chance_is_fair(name):
    """Over many seeds every token is chosen equally often, and independently of its neighbours."""
    found = torch.stack([SCORERS[name].boost(simple(seed=seed), 0.5)[0] for seed in range(600)])
    assert (found.sum(-1) == 30).all()
    assert ((found.mean(0) - 0.5).abs() < 4.5 * 0.5 / 600**0.5).all()
    flow = SCORERS["flow"].boost(simple(), 0.5)[0]
    assert not torch.equal(found[0], flow)


@pytest.mark.parametrize("name", ["random", *SHUFFLED])
def test_chance_follows_from_the_seed_and_the_ids(name):
    score, batch = SCORERS[name].boost, simple()
    first = score(batch, 0.5)
    assert torch.equal(first, score(batch, 0.5))
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first, score(replace(batch, seed=1), 0.5))
    batch.ids[1, 0] += 1
    assert torch.equal(first[0], score(batch, 0.5)[0])
    assert not torch.equal(first[1], score(batch, 0.5)[1])


def test_the_seed_of_a_row_is_the_same_in_every_process():
    packed = blake2b(b"7:" + struct.pack("<3q", 1, 2, 70000), digest_size=8).digest()
    wanted = int.from_bytes(packed, "little") >> 1
    for dtype in (torch.int64, torch.int32):
        ids = torch.tensor([[0, 1, 2, 70000]], dtype=dtype)
        found = row_draws(ids, torch.tensor([[False, True, True, True]]), 2, 7)
        generator = torch.Generator().manual_seed(wanted)
        assert torch.equal(found[0], 1 - torch.rand(2, generator=generator))


@pytest.mark.parametrize("name", ["random", *SHUFFLED])
def test_no_global_random_state_is_used_or_changed(name):
    batch, found = simple(), []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        before = str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002
        found.append(SCORERS[name].boost(batch, 0.5).tolist())
        assert before == (str(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["flow", "reach", "attention", "entropy", "flow*entropy"])
@given(batch=rollouts(), top_fraction=FRACTIONS)
@settings(max_examples=30, deadline=None)
def test_the_bottom_is_what_its_definition_says(name, batch, top_fraction):
    batch = Rollouts(**batch)
    found = lowest(find_scorer(name)).boost(batch, top_fraction)
    for place, row in enumerate(rows_of(batch)):
        assume(clear(name, row))
        if len(row.where):
            competing = row.alone.competing[0].tolist()
            wanted = slow.bottom(slow_score(name, row), competing, top_fraction)
            assert found[place, row.where].tolist() == wanted


@pytest.mark.parametrize("name", SCORERS)
@given(batch=rollouts(), top_fraction=FRACTIONS)
@settings(max_examples=20, deadline=None)
def test_nothing_depends_on_the_other_rows_or_on_padding(name, batch, top_fraction):
    batch = Rollouts(**batch)
    together = SCORERS[name].boost(batch, top_fraction)
    for place, row in enumerate(rows_of(batch)):
        assume(clear(name, row))
        if len(row.where):
            alone = SCORERS[name].boost(row.alone, top_fraction)
            assert together[place, row.where].tolist() == alone[0].tolist()


@pytest.mark.parametrize("name", [name for name in SCORERS if name != "oar"])  # from −1 upwards
@given(batch=rollouts(), top_fraction=FRACTIONS)
@settings(max_examples=20, deadline=None)
def test_a_boost_is_a_number_from_zero_to_one_for_competing_tokens(name, batch, top_fraction):
    batch = Rollouts(**batch)
    found = SCORERS[name].boost(batch, top_fraction)
    assert found.dtype == torch.float32
    assert found.shape == batch.competing.shape
    assert not found[~batch.competing].any()
    assert ((found >= 0) & (found <= (1.5 if name == "coupled" else 1.0))).all()
    if name != "coupled":
        assert set(found.unique().tolist()) <= {0.0, 1.0}
        limit = (top_fraction * batch.competing.sum(-1)).ceil()
        assert name == "oracle" or (found.sum(-1) <= limit).all()
        assert name != "random" or torch.equal(found.sum(-1), limit)
    weights = credit_weights(found, batch.competing, gamma=1.0)
    assert torch.equal(weights, torch.ones_like(weights))


@pytest.mark.parametrize(
    "name", ["flow", "reach", *SHUFFLED, "attention", "attention_power", "rollout"]
)
@given(batch=rollouts())
@settings(max_examples=20, deadline=None)
def test_without_an_answer_nothing_is_boosted(name, batch):
    batch = Rollouts(**batch)
    found = SCORERS[name].boost(batch, 1.0)
    assert not found[~batch.target.any(-1)].any()


@given(rollouts(), FRACTIONS)
def test_uniform_is_plain_grpo(batch, top_fraction):
    batch = Rollouts(**batch)
    assert not SCORERS["uniform"].boost(batch, top_fraction).any()


@pytest.mark.parametrize("name", RHYTHM)
@pytest.mark.parametrize("said", [1, 2, 10, 11])
def test_short_completions(name, said):
    batch = long_rollout(said=said)
    found = SCORERS[name].boost(batch, 1.0)
    if name == "waad":  # the last token has no next one to differ from
        assert found.sum() == said - 1
    else:
        assert found.bool().any() == (said == 11)


@pytest.mark.parametrize("name", SCORERS)
def test_no_gradient_is_attached_and_autocast_lowers_nothing(name):
    batch = long_rollout()
    grown = torch.rand(1, 74, requires_grad=True) * 0.5
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 4, 74, 8, generator=generator).requires_grad_() for _ in range(2))
    batch = replace(
        batch,
        throughput=grown,
        attention=grown[:, None] * grown[..., None],
        entropies=grown[:, 4:],
        surprisals=grown[:, 4:],
        reach=grown,
        saliency=grown,
        swaps=grown,
        sensitivity=grown,
        removals=grown,
        oracle=grown[:, 4:] > 0.2,
        calls=[AttentionCall(query=query, key=key, scaling=0.3)],
        target=torch.arange(74)[None] == 70,
    )
    found = SCORERS[name].boost(batch, 0.4)
    assert not found.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(SCORERS[name].boost(batch, 0.4), found)


@pytest.mark.parametrize("name", SCORERS)
def test_a_scorer_reads_what_it_says_and_asks_for_it(name):
    scorer, batch = SCORERS[name], replace(long_rollout(), seed=1)
    numbers = torch.rand(1, 74)
    given_ = {
        "throughput": numbers,
        "attention": numbers[:, None] * numbers[..., None],
        "entropies": numbers[:, 4:],
        "surprisals": numbers[:, 4:],
        "reach": numbers,
        "saliency": numbers,
        "swaps": numbers,
        "sensitivity": numbers,
        "removals": numbers,
        "flow_removals": numbers,
        "oracle": numbers[:, 4:] > 0.5,
        "calls": batch.calls,
    }
    nothing = {field.name: field.default for field in fields(Rollouts) if field.name in given_}
    read = {input_of(name, need) for need in scorer.needs}
    enough = nothing | {part: given_[part] for part in read}
    assert scorer.name == name
    assert scorer.boost(replace(batch, **enough), 0.4).isfinite().all()
    for part in read:
        with pytest.raises(ValueError, match=f"reads the rollouts' {part}.*Rollouts\\({part}="):
            scorer.boost(replace(batch, **{**enough, part: nothing[part]}), 0.4)


def test_the_scorers_are_these():
    layers = {name: scorer.layers for name, scorer in SCORERS.items()}
    assert list(layers) == [
        "flow", "reach", "attention", "attention_power", "rollout", "fai", "waad", "coupled",
        "grad_x_input", "counterfactual", "causal", "oar", "entropy", "surprisal", "oracle",
        "random", "shuffled", "shuffled_reach", "uniform",
    ]  # fmt: skip
    assert {name for name, chosen in layers.items() if chosen == "middle:5"} == set(RHYTHM)
    assert {name for name, chosen in layers.items() if chosen == "all"} == {"rollout", "causal"}
    assert all(one.formula and one.source and one.cost for one in SCORERS.values())


# --- names ---


def test_a_name_may_have_a_preset_and_factors():
    assert find_scorer("flow") is SCORERS["flow"]
    sharp = find_scorer("attention:sharp")
    assert (sharp.name, sharp.preset, sharp.measure) == (
        "attention:sharp", "sharp", SCORERS["attention"].measure
    )  # fmt: skip
    product = find_scorer("flow:decision * entropy")
    assert (product.name, product.preset) == ("flow:decision*entropy", "decision")
    assert product.needs == {"flow", "entropy"}
    assert [part.name for part in product.parts] == ["flow:decision", "entropy"]
    assert find_scorer("entropy*surprisal").preset is None


def test_a_scorer_that_chooses_in_steps_may_say_in_how_many():
    assert [find_scorer(name).steps for name in ("causal", "causal:3", "flow")] == [8, 3, 0]
    flow = find_scorer("flow:causal:1")
    assert (flow.name, flow.preset, flow.steps) == ("flow:causal:1", "causal", 1)
    assert (flow.needs, flow.graph) == ({"flow_removals"}, False)
    product = find_scorer("flow:causal*entropy")
    assert (product.preset, product.parts[0].steps) == ("causal", 8)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("flw", r"scorer must be one of flow, reach, .*uniform, or .*, got 'flw'"),
        ("flow:blunt", r"preset must be one of paper, .*got 'blunt' in 'flow:blunt'"),
        ("entropy:sharp", r"'entropy' reads none; leave out ':sharp'"),
        ("flow*", r"got ''"),
        ("reach:causal", r"'causal' is for 'flow'.*'reach:causal' does not; choose 'flow:causal'"),
        ("causal:sharp", r"steps from 1 on may follow 'causal', as in 'causal:3', got 'sharp'"),
        ("flow:causal:0", r"may follow 'flow:causal', as in 'flow:causal:3', got '0'"),
        ("causal*causal:3", r"take \[3, 8\] steps; choose the same for all"),
        ("flow:causal*flow", r"other graphs.*presets \['None', 'causal'\]"),
        ("coupled*entropy", r"'coupled' does not choose by its score, and cannot be multiplied"),
        ("flow:sharp*reach", r"read other layers or other graphs.*presets \['None', 'sharp'\]"),
        ("flow*fai", r"read other layers or other graphs: \['middle', 'middle:5'\]"),
    ],
)
def test_unknown_names_are_refused(name, said):
    with pytest.raises(ValueError, match=said):
        find_scorer(name)


@pytest.mark.parametrize("name", ["coupled", "oar", *SHUFFLED, "oracle"])
def test_scorers_with_a_choice_of_their_own_have_no_bottom(name):
    with pytest.raises(
        ValueError, match=f"{name!r} does not choose by the highest score, so it has no bottom"
    ):
        lowest(SCORERS[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCORERS)
def test_cuda_chooses_the_same_tokens(name):
    batch = long_rollout()
    numbers = torch.rand(1, 74, generator=torch.Generator().manual_seed(1))
    batch = replace(
        batch,
        throughput=numbers,
        attention=(numbers[:, None] * numbers[..., None]).tril(),
        entropies=numbers[:, 4:],
        surprisals=numbers[:, 4:],
        reach=numbers,
        saliency=numbers,
        swaps=numbers,
        sensitivity=numbers,
        removals=numbers,
        oracle=numbers[:, 4:] > 0.5,
        target=torch.arange(74)[None] == 70,
        answer=torch.arange(74)[None] == 70,
    )
    tensors = {
        field.name: value
        for field in fields(Rollouts)
        if isinstance(value := getattr(batch, field.name), torch.Tensor)
    }
    wanted = SCORERS[name].boost(batch, 0.4)
    with on_gpu() as place:
        calls = [AttentionWeights(weights=place(batch.calls[0].weights))]
        found = SCORERS[name].boost(replace(batch, **place(tensors), calls=calls), 0.4)
        assert found.device == GPU
        torch.testing.assert_close(found.cpu(), wanted)


def test_docstring_examples():
    assert doctest.testmod(controls_module, extraglobs={"torch": torch}).attempted == 2
    assert doctest.testmod(controls_module).failed == 0
