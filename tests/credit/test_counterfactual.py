"""What an answer loses when a token is swapped for the likeliest other one."""

import pytest
import torch
from torch.testing import assert_close

from flowtracer_plugin.credit.counterfactual import swap_losses
from tests.families import tiny_model

TEXT = [5, 9, 14, 3, 8, 21, 17, 40, 11, 6]
START, ANSWER = 3, (7, 9)


def log_prob(model, text):
    with torch.no_grad():
        chances = model(torch.tensor([text])).logits[0].double().log_softmax(-1)
    return sum(chances[place - 1, text[place]].item() for place in range(*ANSWER))


def swapped(model, text, place):
    with torch.no_grad():
        chances = model(torch.tensor([text])).logits[0, place - 1]
    ranked = chances.argsort(descending=True).tolist()
    other = next(token for token in ranked if token != text[place])
    return [*text[:place], other, *text[place + 1 :]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_losses_are_those_of_the_slow_definition(family):
    model = tiny_model(family)
    wanted = torch.zeros(len(TEXT))
    for place in range(START, ANSWER[0]):
        lost = log_prob(model, TEXT) - log_prob(model, swapped(model, TEXT, place))
        wanted[place] = max(0.0, lost)
    assert wanted.max() > 0
    ids = torch.tensor([TEXT])
    place = torch.arange(len(TEXT))[None]
    answer = (place >= ANSWER[0]) & (place < ANSWER[1])
    found = swap_losses(model, ids, torch.ones_like(answer), answer, START)
    assert_close(found[0], wanted, rtol=1e-4, atol=1e-5)


def test_padding_and_batches_change_nothing_and_rows_without_an_answer_have_none():
    model = tiny_model("gpt2")
    ids = torch.tensor([[0, 0, *TEXT], [0, 0, *TEXT], [0, 0, *TEXT]])
    visible = torch.ones_like(ids, dtype=torch.bool)
    visible[0, :2] = visible[2, :2] = False
    place = torch.arange(ids.shape[1])[None].expand_as(ids)
    answer = (place >= ANSWER[0] + 2) & (place < ANSWER[1] + 2)
    answer[2] = False
    alone = swap_losses(model, torch.tensor([TEXT]), visible[:1, 2:], answer[:1, 2:], START)
    for size in (None, 1, 3):
        found = swap_losses(model, ids, visible, answer, START + 2, batch_size=size)
        assert_close(found[0, 2:], alone[0], rtol=1e-4, atol=1e-5)
        assert found[1, 2:].ne(0).any()
        assert not found[2].any()
        assert not found[:, : START + 2].any()
        assert not found[:, ANSWER[0] + 2 :].any()
    assert all(parameter.grad is None for parameter in model.parameters())
