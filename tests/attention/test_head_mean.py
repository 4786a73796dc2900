"""The blockwise head mean compared with its slow definition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import flowtracer_plugin.attention.head_mean as head_mean_module
from flowtracer_plugin.attention import AttentionCall, AttentionWeights
from flowtracer_plugin.attention.head_mean import (
    add_head_mean,
    row_probabilities,
    rows_at_once,
    token_probabilities,
)
from flowtracer_plugin.reading.rows import AttentionRows
from tests.attention.reference_attention import loop_head_mean
from tests.tiny import tiny_llama

MASKS = ("causal", "everything", "bool", "per head", "minimum", "infinite", "numbers")


@st.composite
def calls(draw: st.DrawFn, masks: tuple[str, ...] = MASKS) -> AttentionCall:
    """Attention calls of every kind that the contract allows."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    batch, groups, shared = (draw(st.integers(1, 3)) for _ in range(3))
    queries, width = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    keys = queries + draw(st.sampled_from([0, 0, 3]))
    heads = groups * shared

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random) * 2

    def some(shape: tuple[int, ...], share: float) -> Tensor:
        return torch.rand(shape, generator=random) < share

    kind = draw(st.sampled_from(masks))
    lows = {"minimum": torch.finfo(torch.float32).min, "infinite": -torch.inf}
    mask: Tensor | None = None
    if kind in lows:
        mask = torch.zeros(batch, 1, queries, keys).masked_fill(
            some((batch, 1, queries, keys), 0.4), lows[kind]
        )
    elif kind == "numbers":
        mask = numbers(1, heads, queries, keys)
    elif kind in ("bool", "per head"):
        mask = some((batch, heads if kind == "per head" else 1, queries, keys), 0.6)
        mask[:, :, draw(st.integers(0, queries - 1))] = False  # a query that sees nothing
    return AttentionCall(
        query=numbers(batch, heads, queries, width),
        key=numbers(batch, groups, keys, width),
        mask=mask,
        scaling=draw(st.sampled_from([1.0, 0.3, width**-0.5])),
        softcap=draw(st.sampled_from([None, 2.0])),
        bias=draw(st.sampled_from([None, numbers(1, heads, queries, keys)])),
        sinks=draw(st.sampled_from([None, numbers(heads)])),
        causal=kind != "everything",
    )


def head_mean(
    call: AttentionCall, *, heads: list[int] | None = None, block: int = 64, weight: float = 1.0
) -> Tensor:
    total = torch.zeros(call.query.shape[0], call.query.shape[2], call.key.shape[2])
    chosen = None if heads is None else torch.tensor(heads)
    add_head_mean(call, total, heads=chosen, block=block, weight=weight)
    return total


@pytest.mark.parametrize(("limit", "rows"), [(1, 16), (20 * 4 * 2 * 4 * 40, 20), (2**24, 32)])
def test_the_host_holds_few_scores_at_a_time(monkeypatch, limit, rows):
    call = AttentionCall(query=torch.rand(2, 4, 40, 3), key=torch.rand(2, 2, 40, 3), scaling=1.0)
    seen, compute = [], head_mean_module.row_probabilities

    def watched(one, asked, *rest):
        seen.append(asked.stop - asked.start)
        return compute(one, asked, *rest)

    wanted = loop_head_mean(call)
    monkeypatch.setattr(head_mean_module, "SCORES", limit)
    monkeypatch.setattr(head_mean_module, "row_probabilities", watched)
    np.testing.assert_allclose(head_mean(call, block=32), wanted, atol=2e-6)
    streamed = AttentionRows(tiny_llama(), [call], torch.ones(2, 40).bool(), block=32)
    np.testing.assert_allclose(streamed(0, 40), wanted, atol=2e-6)
    each = [rows] * (40 // rows) + ([40 % rows] if 40 % rows else [])
    assert seen == each * 2
    # On a device, more calls would take longer.
    assert rows_at_once(replace(call, query=call.query.to("meta")), 32) == 32


@given(call=calls(), block=st.sampled_from([1, 2, 5, 64]))
@settings(max_examples=60)
def test_the_blockwise_mean_equals_its_definition(call, block):
    np.testing.assert_allclose(head_mean(call, block=block), loop_head_mean(call), atol=2e-6)


@given(call=calls(), data=st.data())
@settings(max_examples=40)
def test_a_choice_of_heads_gives_the_mean_over_those_heads(call, data):
    every = range(call.query.shape[1])
    heads = data.draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
    found = head_mean(call, heads=heads, block=3)
    np.testing.assert_allclose(found, loop_head_mean(call, heads), atol=2e-6)


@given(call=calls())
@settings(max_examples=50)
def test_rows_sum_to_one_without_sinks_and_to_less_with_them(call):
    sums = head_mean(replace(call, sinks=None)).sum(-1)
    assert torch.all(sums <= 1 + 1e-5)
    if call.mask is None:
        torch.testing.assert_close(sums, torch.ones_like(sums))
    if call.sinks is not None:
        # A weak sink may take less than float32 resolves, a strong one takes all.
        assert torch.all(head_mean(call).sum(-1) <= sums + 1e-6)
        strong = replace(call, sinks=call.sinks + 1e4)
        assert torch.all(head_mean(strong).sum(-1) < 1e-3)


@given(call=calls(masks=("bool", "per head", "minimum", "infinite")))
@settings(max_examples=50)
def test_hidden_keys_get_exactly_zero(call):
    seen = call.mask if call.mask.dtype == torch.bool else call.mask == 0
    probabilities = row_probabilities(call, slice(0, call.query.shape[2]))
    known = probabilities.shape[-1]  # keys that no row sees may be left out
    assert not seen[..., known:].any()
    forbidden = ~seen[..., :known].expand_as(probabilities)
    assert torch.all(probabilities.masked_select(forbidden) == 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low", [None, "minimum", "infinite"])
@given(call=calls(masks=("causal",)))
@settings(max_examples=25)
def test_half_precision_inputs_are_computed_in_float32(dtype, low, call):
    keys = (call.query.shape[2], call.key.shape[2])
    floor = -torch.inf if low == "infinite" else torch.finfo(dtype).min
    mask = torch.full(keys, floor, dtype=dtype).triu(1)[None, None] if low else None
    half = replace(call, query=call.query.to(dtype), key=call.key.to(dtype), mask=mask)
    found = head_mean(half)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, loop_head_mean(half), atol=2e-6)


@given(call=calls())
@settings(max_examples=25)
def test_autocast_does_not_lower_the_precision(call):
    with torch.autocast("cpu", torch.bfloat16):
        found = head_mean(call)
    np.testing.assert_allclose(found, loop_head_mean(call), atol=2e-6)


@given(call=calls(), grouped=st.booleans(), normalized=st.booleans(), start=st.integers(0, 8))
@settings(max_examples=40)
def test_token_probabilities_equal_the_mean_over_a_single_head(call, grouped, normalized, start):
    keys, heads = call.key.shape[2], call.query.shape[1]
    random = torch.Generator().manual_seed(start)
    shares = torch.rand(1, keys, keys + 2, generator=random) if grouped else None
    call = replace(call, key_tokens=shares, normalized=normalized)
    rows = slice(min(start, call.query.shape[2] - 1), call.query.shape[2])
    weights = row_probabilities(call, slice(0, rows.stop))
    whole = nn.functional.pad(weights, (0, keys - weights.shape[-1]))  # causal ones end early
    for one in (call, AttentionWeights(weights=whole)):
        total = torch.zeros(len(call.query), rows.stop, keys)
        for head in range(heads):
            found = token_probabilities(one, rows, keys)[:, head]
            add_head_mean(one, total.zero_(), heads=torch.tensor([head]))
            seen = found.shape[-1]
            torch.testing.assert_close(found, total[:, rows, :seen])
            assert not total[:, rows, seen:].any()


def small_call(**changes) -> AttentionCall:
    random = torch.Generator().manual_seed(0)
    query, key = (
        torch.randn(1, 4, 6, 8, generator=random),
        torch.randn(1, 2, 6, 8, generator=random),
    )
    return AttentionCall(**{"query": query, "key": key, "scaling": 0.5, **changes})


def test_the_mean_is_added_times_its_weight():
    call = small_call()
    total = torch.ones(1, 6, 6)
    add_head_mean(call, total, weight=0.25)
    torch.testing.assert_close(total, 1 + 0.25 * head_mean(call))


def test_a_query_that_sees_nothing_leaves_its_row_unchanged():
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    mask[:, :, 2] = False
    found = head_mean(small_call(mask=mask))
    assert torch.all(found[0, 2] == 0)
    assert torch.all(found[0, [0, 1, 3, 4, 5]].sum(-1) > 0.99)


def test_sinks_may_differ_between_queries():
    sinks = torch.linspace(-2, 2, 24).view(1, 4, 6, 1)
    found = head_mean(small_call(sinks=sinks), block=4)
    for query in range(6):
        same = head_mean(small_call(sinks=sinks[0, :, query, 0]))
        torch.testing.assert_close(found[:, query], same[:, query])


def test_a_single_query_without_a_mask_sees_every_key():
    call = small_call()
    found = head_mean(replace(call, query=call.query[:, :, -1:]))
    torch.testing.assert_close(found, head_mean(call)[:, -1:])


def test_a_mask_longer_than_the_keys_is_cut_to_them():
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    longer = torch.nn.functional.pad(mask, (0, 5), value=True)
    assert torch.equal(head_mean(small_call(mask=longer)), head_mean(small_call(mask=mask)))


@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()])
def test_a_nan_in_a_query_shows_in_its_row_and_nowhere_else(mask):
    call = small_call(mask=mask)
    call.query[0, 1, 3, 0] = torch.nan
    found = head_mean(call)[0]
    assert found[3, :4].isnan().all()
    assert not found[[0, 1, 2, 4, 5]].isnan().any()


def test_gradients_do_not_flow_into_the_mean():
    call = small_call()
    call.query.requires_grad_()
    assert not head_mean(call).requires_grad
