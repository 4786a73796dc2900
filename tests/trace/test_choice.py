"""The order in which tokens are chosen and hidden: against plain loops over one text."""

import math
import re

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

import flowtracer_plugin as ft
from flowtracer_plugin.evaluation.knockout import hidden_edges, knock_out
from flowtracer_plugin.flow.solve import solve_flow
from flowtracer_plugin.model.cutting import cutting
from flowtracer_plugin.options import PRESETS, FlowOptions
from flowtracer_plugin.reading.reader import AttentionReader
from flowtracer_plugin.reading.removal import asked_texts, edge_losses
from flowtracer_plugin.trace.choice import (
    before_answer,
    flow_order,
    order_of_choice,
    removal_order,
)
from flowtracer_plugin.trace.rollouts import RolloutMasks
from tests.families import tiny_model
from tests.tiny import PROMPT as ASKED, RESPONSE, tiny_llama, tiny_tokenizer

PROMPT, SAID, FIRST, SPARED = 4, 24, 20, 5


def order_by_hand(losses, candidates, spared, steps):
    """One text: the score of each token; `losses` maps a list of hidden tokens to numbers."""
    chosen, ranked_first, size = [], [], math.ceil(len(candidates) / 5)
    for step in range(1, steps + 1):
        wanted = math.ceil(size * step / min(steps, size)) if step <= size else size
        if wanted <= len(chosen):
            continue
        lost = losses(chosen)
        ranked = sorted(
            (t for t in candidates if t not in ranked_first and lost[t] > 0),
            key=lambda t: (-lost[t], t),
        )
        new = [t for t in ranked if t not in spared][: wanted - len(chosen)]
        near = [t for t in ranked if new and t in spared and lost[t] >= lost[new[-1]]]
        ranked_first += [t for t in ranked if t in new or t in near]
        chosen += new
    ranked = [*ranked_first, *(t for t in ranked if t not in ranked_first)]
    return {token: 1 - place / len(candidates) for place, token in enumerate(ranked)}


@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.integers(1, 9),
    texts=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 5)), min_size=1, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_the_order_is_that_of_the_slow_definition_whatever_else_is_in_the_batch(seed, steps, texts):
    generator = torch.Generator().manual_seed(seed)
    shape, width = (len(texts), 32), 32
    base = torch.randn(shape, generator=generator).mul(4).round().div(4)  # with ties and zeros
    change = torch.randn(len(texts), width, width, generator=generator).mul(2).round().div(8)
    candidates, spared = torch.zeros(2, *shape, dtype=torch.bool)
    for row, (count, last) in enumerate(texts):
        candidates[row, 1 : 1 + count] = True
        spared[row, 1 + count - min(last, count - 1) : 1 + count] = True
    asked = []

    def losses(hidden):
        asked.append(hidden.clone())
        return base + (change @ hidden[..., None].float())[..., 0]

    found = order_of_choice(losses, candidates, spared, steps)
    assert len(asked) <= steps
    assert not asked[0].any()
    for row in range(len(texts)):

        def of_row(hidden, row=row):
            return (base[row] + change[row][:, hidden].sum(-1)).tolist()

        tokens, kept = (part[row].nonzero()[:, 0].tolist() for part in (candidates, spared))
        wanted = order_by_hand(of_row, tokens, kept, steps)
        assert {t: v for t, v in enumerate(found[row].tolist()) if v} == pytest.approx(wanted)


def test_losses_that_are_not_finite_spoil_their_own_text_alone():
    candidates = torch.tensor([[True, True, False]] * 2)
    lost = torch.tensor([[1.0, torch.nan, 0.0], [1.0, 2.0, torch.nan]])
    found = order_of_choice(lambda _: lost, candidates, candidates & False, 2)
    assert found[0, :2].isnan().all()
    assert found[1].tolist() == [0.5, 1.0, 0.0]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=2).double()


@pytest.fixture(scope="module")
def text():
    """Ids, what is visible, and the answer: the last four tokens but two."""
    ids = torch.randint(3, 100, (1, SAID), generator=torch.Generator().manual_seed(5))
    place = torch.arange(SAID)[None]
    return ids, torch.ones_like(place, dtype=torch.bool), (place >= FIRST) & (place < FIRST + 2)


def read(model):
    return AttentionReader(model, backend="interface")


def masks_of(answer, prompt=PROMPT):
    question = torch.zeros_like(answer)
    question[:, prompt - 3 : prompt] = True
    every = (None,) * len(answer)
    return RolloutMasks(question=question, target=answer, answer=answer, answers=every)


def eager_losses(model, ids, answer, hidden):
    """What each later row loses without each token, by the gradient of eager attention."""
    tokens = torch.zeros_like(answer)
    tokens[0, hidden] = True
    model.set_attn_implementation("eager")
    with cutting(hidden_edges(tokens, answer[0], rows="future")):
        found = model(input_ids=ids, output_attentions=True)
    asked = answer[0].nonzero()[:, 0]
    chances = found.logits[0, asked - 1].log_softmax(-1)
    total = chances.gather(-1, ids[0, asked, None]).sum()
    gradients = torch.autograd.grad(total, found.attentions)
    model.set_attn_implementation("sdpa")
    edges = torch.zeros(SAID, SAID).double()
    for paid, felt in zip(found.attentions, gradients, strict=True):
        part = paid * (felt - (paid * felt).sum(-1, keepdim=True)) / (1 - paid)
        edges += part[0].sum(0).detach().nan_to_num(0.0).tril(-1)
    edges[:PROMPT] = 0
    return edges, total.item() / len(asked)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("by_flow", [False, True], ids=["removal", "flow"])
def test_orders_are_those_of_gradients_of_eager_attention(model, text, by_flow, steps):
    ids, visible, answer = text
    reader, options = read(model), FlowOptions(**PRESETS["causal"], damping=0.5)
    seen = []

    def losses(hidden):
        edges, log_prob = eager_losses(model, ids, answer, hidden)
        seen.append((list(hidden), log_prob))
        if not by_flow:
            return edges.sum(0).tolist()
        edges = edges.clamp_min(0)
        edges /= 2 * edges.sum(-1, keepdim=True).clamp_min(1e-300)  # the damping
        target = answer[0].roll(-1).numpy()
        question = masks_of(answer).question[0].numpy()
        flow = solve_flow(edges.numpy(), question, target, question_weights="reach")
        return np.where(target, 0.0, flow.throughput)

    wanted = order_by_hand(losses, range(PROMPT, FIRST), range(FIRST - SPARED, FIRST), steps)
    if by_flow:
        found, errors = flow_order(
            reader, ids, visible, masks_of(answer), PROMPT, options, steps=steps
        )
        assert errors == {}
    else:
        found = removal_order(reader, ids, visible, answer, PROMPT, steps=steps)
    assert len(seen) == steps
    assert {t: v for t, v in enumerate(found[0].tolist()) if v} == pytest.approx(wanted)
    # What is hidden in each step is hidden as a knock-out hides it.
    sets = torch.zeros(len(seen), SAID, dtype=torch.bool)
    for number, (hidden, _) in enumerate(seen):
        sets[number, hidden] = True
    measured = knock_out(model, ids[0], answer[0], sets)
    lost = [seen[0][1] - log_prob for _, log_prob in seen]
    assert measured.drop.tolist() == pytest.approx(lost, abs=1e-4)


def test_one_step_ranks_by_one_pass(model, text):
    ids, visible, answer = text
    reader = read(model)
    asked = asked_texts(reader, ids, visible, answer, PROMPT)
    layers = [site.layer for site in reader.sites]
    lost = edge_losses(reader, asked, layers)[0].tril(-1).sum(0)
    found = removal_order(reader, ids, visible, answer, PROMPT, steps=1)[0]
    first = found[PROMPT : FIRST - SPARED].argsort(descending=True)
    assert (
        first.tolist()
        == lost[PROMPT : FIRST - SPARED].clamp_min(0).argsort(descending=True, stable=True).tolist()
    )


@pytest.mark.parametrize("by_flow", [False, True], ids=["removal", "flow"])
def test_padding_and_batches_change_nothing(model, text, by_flow):
    ids, visible, answer = text
    reader, options = read(model), FlowOptions(**PRESETS["causal"])

    def order(ids, visible, answer, start, size):
        if by_flow:
            masks = masks_of(answer, start)
            return flow_order(
                reader, ids, visible, masks, start, options, steps=2, batch_size=size
            )[0]
        return removal_order(reader, ids, visible, answer, start, steps=2, batch_size=size)

    alone = order(ids, visible, answer, PROMPT, None)
    wide = torch.zeros(3, SAID + 5, dtype=torch.long)
    seen, asked = torch.zeros(2, *wide.shape, dtype=torch.bool)
    wide[0, 2:-3], seen[0, 2:-3], asked[0, 2:-3] = ids[0], True, answer[0]
    wide[1, 3:], seen[1, 3:], asked[1, -1] = 7 + torch.arange(SAID + 2), True, True
    wide[2], seen[2] = 9, True  # no answer
    for size in (None, 3):
        found = order(wide, seen, asked, PROMPT + 2, size)
        assert_close(found[0, 2:-3], alone[0], rtol=1e-5, atol=1e-6)
        assert found[1].any()
        assert not found[2].any()
        assert not found[~seen].any()


def test_candidates_stand_before_the_answer_and_the_last_five_of_them_are_spared():
    visible = torch.ones(3, 14, dtype=torch.bool)
    answer = torch.zeros_like(visible)
    answer[0, 11:13] = answer[1, 8] = True
    candidates, spared = before_answer(visible, answer, 3)
    assert [row.nonzero()[:, 0].tolist() for row in candidates] == [
        [*range(3, 11)],
        [*range(3, 8)],
        [],
    ]
    assert [row.nonzero()[:, 0].tolist() for row in spared] == [[*range(6, 11)], [], []]


@pytest.fixture(scope="module")
def tracer():
    model = tiny_llama(num_hidden_layers=2)
    return ft.wrap(model, tiny_tokenizer(), preset="causal", backend="interface")


def test_a_trace_shows_the_first_step_and_the_order_of_choice(tracer, tmp_path):
    trace = tracer.trace(ASKED, RESPONSE)
    reader, spans = tracer.reader, trace.spans
    ids, answer = torch.from_numpy(trace.token_ids)[None], torch.from_numpy(spans.answer)[None]
    every = torch.ones_like(answer)
    asked = asked_texts(reader, ids, every, answer, spans.prompt_length)
    edges = edge_losses(reader, asked, trace.layers)[0].clamp_min(0).tril(-1).numpy()
    sums = edges.sum(1, keepdims=True)
    np.testing.assert_allclose(trace.attention, edges / np.where(sums > 0, sums, 1), atol=1e-6)
    assert not trace.attention[: spans.prompt_length].any()
    masks = RolloutMasks(
        question=torch.from_numpy(spans.question)[None],
        target=torch.from_numpy(spans.target)[None],
        answer=answer,
        answers=(None,),
    )
    order, _ = flow_order(reader, ids, every, masks, spans.prompt_length, tracer.options)
    count = math.ceil((np.argmax(spans.answer) - spans.prompt_length) / 5)
    assert trace.chosen == tuple(order[0].argsort(descending=True)[:count].tolist())
    assert len(trace.chosen) == count > 1
    loaded = ft.load(trace.save(tmp_path / "trace.flow"))
    assert loaded.chosen == trace.chosen
    assert trace.to_dict()["chosen"] == list(trace.chosen)
    jsonschema.validate(trace.to_dict(), ft.json_schema())
    page = trace.to_html(tmp_path / "page.html").read_text()
    shown = page.split('<ol class="paths" id="chosen">')[1].split("</ol>")[0]
    numbers = [int(one) for one in re.findall(r'data-unit="(\d+)"', shown)]
    assert numbers == list(trace.chosen)
    assert "edges of the model's attention that help the answer" in page


def test_rollouts_have_the_flow_of_their_traces(tracer):
    trace = tracer.trace(ASKED, RESPONSE)
    start = trace.spans.prompt_length
    ids = torch.from_numpy(trace.token_ids)[None].expand(2, -1)
    found = tracer.trace_ids(
        ids[:, :start], ids[:, start:], torch.ones(2, start).long(), torch.ones_like(ids[:, start:])
    )
    np.testing.assert_allclose(found.throughput[1], trace.throughput, atol=1e-5)


def test_a_causal_trace_cannot_be_streamed():
    with pytest.raises(ValueError, match=r"edges='causal'.*wrap\(..., mode='dense'\)"):
        ft.wrap(tiny_llama(), tiny_tokenizer(), preset="causal", mode="streamed")
    ft.wrap(tiny_llama(), tiny_tokenizer(), preset="causal", mode="dense")
    with pytest.raises(ValueError, match=r"edges='causal'.*use heads='all'"):
        ft.wrap(tiny_llama(), tiny_tokenizer(), preset="causal", heads=0.3)
