"""What the answer loses without an edge: against gradients of eager attention, in plain loops."""

import accelerate
import pytest
import torch
from torch.testing import assert_close

from flowtracer_plugin.attention import AttentionCall, UnsupportedArchitectureError
from flowtracer_plugin.attention.head_mean import attention_output
from flowtracer_plugin.attention.removal import FeltCall, removal_losses
from flowtracer_plugin.evaluation.knockout import hidden_edges
from flowtracer_plugin.model.cutting import cutting
from flowtracer_plugin.reading.reader import AttentionReader
from flowtracer_plugin.reading.removal import asked_texts, edge_losses, helpful_edges
from tests.families import tiny_model
from tests.tiny import tiny_llama

TEXT = [5, 9, 14, 3, 8, 21, 17, 40, 11, 6]
START, ANSWER, LAYERS = 3, (7, 9), (0, 2, 5)
BACKENDS = {"llama": "nnsight", "gpt2": "interface", "gpt_oss": "interface"}


def answer_log_prob(logits, text):
    chances = logits[0].log_softmax(-1)
    return sum(chances[place - 1, text[place]] for place in range(*ANSWER))


def losses_by_hand(model, text, hidden=()):
    """`Σ a (g − Σ a g) / (1 − a)` of each row and key, with `g = ∂ log p / ∂a`."""
    ids, size = torch.tensor([text]), len(text)
    tokens, answer = torch.zeros(1, size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
    tokens[0, list(hidden)] = True
    model.set_attn_implementation("eager")
    with cutting(hidden_edges(tokens, answer, rows="future")):
        found = model(input_ids=ids, output_attentions=True)
    maps = [found.attentions[layer] for layer in LAYERS]
    gradients = torch.autograd.grad(answer_log_prob(found.logits, text), maps)
    model.set_attn_implementation("sdpa" if model.config.model_type != "gpt_oss" else "eager")
    total = torch.zeros(size, size, dtype=torch.float64)
    for map_, gradient in zip(maps, gradients, strict=True):
        for paid, felt in zip(map_[0].tolist(), gradient[0].tolist(), strict=True):
            for row in range(START, size):
                whole = sum(a * g for a, g in zip(paid[row], felt[row], strict=True))
                for key in range(row + 1):
                    a, g = paid[row][key], felt[row][key]
                    total[row, key] += a * (g - whole) / (1 - a) if a < 1 else 0.0
    return total


def losses(reader, text, hidden=()):
    ids, place = torch.tensor([text]), torch.arange(len(text))[None]
    answer = (place >= ANSWER[0]) & (place < ANSWER[1])
    unseen = torch.zeros_like(answer)
    unseen[0, list(hidden)] = True
    texts = asked_texts(reader, ids, torch.ones_like(answer), answer, START)
    return edge_losses(reader, texts, LAYERS, unseen)[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("hidden", [(), (3, 5)], ids=["whole", "with holes"])
def test_losses_are_those_of_the_slow_definition(family, hidden):
    model = tiny_model(family)
    exact = family != "gpt_oss"  # whose experts multiply no doubles
    model = model.double() if exact else model
    wanted = losses_by_hand(model, TEXT, hidden)
    found = losses(AttentionReader(model, backend=BACKENDS[family]), TEXT, hidden)
    assert found.dtype == torch.float32
    assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5 if exact else 1e-3)
    assert wanted.abs().max() > 0.1
    assert not found[:, list(hidden)].tril(-1).any()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_edge_says_what_its_removal_costs_to_first_order(monkeypatch):
    """A small part of the way to a row without the edge, in every head, with the rest rescaled."""
    model, row, key = tiny_model("llama").double(), 6, 4
    found = losses(AttentionReader(model, backend="interface"), TEXT)
    moved = [0.0]  # the share of the way, by which `without` moves

    def without(module, query, key_, value, mask, scaling, **_):
        each = query.shape[1] // key_.shape[1]
        key_, value = key_.repeat_interleave(each, 1), value.repeat_interleave(each, 1)
        later = torch.ones(len(TEXT), len(TEXT), dtype=torch.bool).triu(1)
        paid = (query @ key_.mT * scaling).masked_fill(later, -torch.inf).softmax(-1)
        removed = paid[:, :, row].clone()
        removed[..., key] = 0.0
        removed /= removed.sum(-1, keepdim=True)
        if module.layer_idx in LAYERS:
            paid[:, :, row] += moved[0] * (removed - paid[:, :, row])
        return (paid @ value).transpose(1, 2), paid

    functions = type(model.model.layers[0].self_attn).forward.__globals__["ALL_ATTENTION_FUNCTIONS"]
    monkeypatch.setitem(functions, "sdpa", without)
    ends = []
    with torch.no_grad():
        for moved[0] in (1e-2, -1e-2):  # the norms of the model are float32, whatever it is
            ends.append(answer_log_prob(model(torch.tensor([TEXT])).logits, TEXT).item())
    assert (ends[1] - ends[0]) / 2e-2 == pytest.approx(found[row, key].item(), rel=1e-3)
    assert abs(found[row, key]) > 0.01


@pytest.mark.parametrize(
    ("sharpness", "sinks"), [(0.5, None), (12.0, None), (0.5, torch.tensor([3.0, -1.0, 0.0, 2.0]))]
)
def test_removed_keys_are_those_of_rows_that_are_explicitly_renormalised(sharpness, sinks):
    """Also where a row attends to one key up to one part in 10¹²."""
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(1, 4, 7, 3, generator=generator)
    key, value = torch.randn(2, 1, 2, 7, 3, generator=generator)
    gradient = torch.randn(1, 7, 4, 3, generator=generator)
    call = AttentionCall(query=query, key=key, value=value, scaling=sharpness, sinks=sinks)
    felt = FeltCall(call=call, output=attention_output(call), gradient=gradient)
    found = removal_losses(felt, slice(2, 7), 7)[0]
    wanted, closest = torch.zeros(5, 7).double(), 1.0
    for head in range(4):
        keys, values = key[0, head // 2].double(), value[0, head // 2].double()
        for row in range(2, 7):
            scores = sharpness * (keys[: row + 1] @ query[0, head, row].double())
            if sinks is not None:  # the last key, which moves nothing
                scores = torch.cat([scores, sinks[head : head + 1].double()])
            felt_keys = torch.zeros(len(scores)).double()
            felt_keys[: row + 1] = values[: row + 1] @ gradient[0, row, head].double()
            for gone in range(row + 1):
                other = torch.arange(len(scores)) != gone
                part = scores.softmax(-1)[gone]
                closest = min(closest, 1 - part.item())
                left = (scores[other].softmax(-1) * felt_keys[other]).sum()
                wanted[row - 2, gone] += part * (felt_keys[gone] - left)
    assert closest < 1e-9 or sharpness < 1
    assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)


def test_losses_of_a_certain_answer_are_not_rounded_away():
    """With all logits times 40, the answer is certain to one part in 10⁹, and float32 says 1."""
    model = tiny_model("llama")
    text = [*TEXT[: ANSWER[0]], *TEXT[ANSWER[0] :]]
    with torch.no_grad():
        model.lm_head.weight *= 40
        for place in range(*ANSWER):
            text[place] = model(torch.tensor([text])).logits[0, place - 1].argmax().item()
        chances = model.double()(torch.tensor([text])).logits[0].softmax(-1)
    doubts = [1 - chances[place - 1, text[place]].item() for place in range(*ANSWER)]
    assert 1e-30 < max(doubts) < 1e-8
    found = losses(AttentionReader(model.float(), backend="interface"), text)
    wanted = losses_by_hand(model.double(), text)
    assert_close(found.double() / max(doubts), wanted / max(doubts), rtol=1e-2, atol=1e-2)
    assert (wanted / max(doubts)).abs().max() > 1


def test_padding_batches_and_the_cache_of_a_prompt_change_nothing():
    model = tiny_model("qwen3").double()
    reader = AttentionReader(model, backend="interface")
    texts = [TEXT, [7, *TEXT[:4], 33, *TEXT[4:]]]
    ids, visible, answer, hidden = torch.zeros(4, 2, 14, dtype=torch.long)
    for row, (text, left, right) in enumerate(zip(texts, (1, 0), (3, 2), strict=True)):
        ids[row, left : 14 - right] = torch.tensor(text)
        visible[row, left : 14 - right] = 1
        answer[row, 8:10] = 1
        hidden[row, [5, 6 + row]] = 1
    start = START + 1
    visible, answer, hidden = visible.bool(), answer.bool(), hidden.bool()
    together = edge_losses(reader, asked_texts(reader, ids, visible, answer, start), LAYERS, hidden)
    assert not together[:, :start].any()
    for row in range(2):
        one = slice(row, row + 1)
        alone = asked_texts(reader, ids[one], visible[one], answer[one], start)
        assert alone.first == int(visible[row, :start].sum())  # it continues from a cache
        found = edge_losses(reader, alone, LAYERS, hidden[one])
        assert_close(found, together[one], rtol=1e-4, atol=1e-6)
        assert found.abs().max() > 0.1
        assert not found[0, ~visible[row]].any()
        assert not found[0, :, ~visible[row]].any()


def test_helpful_edges_are_shares_of_a_row():
    losses_ = torch.tensor(
        [[[9.0, 0, 0], [2, 9, 0], [3, 1, 9]], [[9, 0, 0], [-2, 9, 0], [3, -1, 9]]]
    )
    wanted = [[[0, 0, 0], [1, 0, 0], [0.75, 0.25, 0]], [[0, 0, 0], [0, 0, 0], [1, 0, 0]]]
    assert helpful_edges(losses_).tolist() == wanted


def test_a_model_without_a_backward_pass_is_refused():
    ids = torch.tensor([TEXT])
    every = torch.ones_like(ids, dtype=torch.bool)
    model = accelerate.cpu_offload(tiny_llama(), torch.device("cpu"))
    with pytest.raises(UnsupportedArchitectureError, match=r"edges='causal' needs.*edges='value'"):
        asked_texts(AttentionReader(model), ids, every, every, START)
