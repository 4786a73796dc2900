"""OAR-G: how far noise at a token moves the answer, and the gate that makes weights of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from flowtracer_plugin.credit.controls import row_generator
from flowtracer_plugin.credit.measures import Rollouts
from flowtracer_plugin.credit.outcome_gate import outcome_gate, outcome_sensitivity
from flowtracer_plugin.credit.scorers import SCORERS, credit_weights
from tests.credit.test_counterfactual import ANSWER, START, TEXT
from tests.families import tiny_model


def slow_sensitivity(model, text, seed):
    """By the definition, for one text, with the noise of the same generator."""
    table = model.get_input_embeddings()
    plain = table(torch.tensor([text])).detach()
    moved = torch.zeros_like(plain)
    generator, width = row_generator(torch.tensor(text), seed), plain.shape[-1]
    drawn = torch.randn(ANSWER[0] - START, width, generator=generator)
    moved[0, START : ANSWER[0]] = 1e-3 * drawn
    asked = [place - 1 for place in range(*ANSWER)]
    given = plain.clone().requires_grad_()
    usual = model(inputs_embeds=plain).logits[0, asked].mean(0).softmax(-1).detach()
    noisy = model(inputs_embeds=given + moved).logits[0, asked].mean(0).softmax(-1)
    (usual * (usual.log() - noisy.log())).sum().backward()
    wanted = torch.zeros(len(text))
    for place in range(START, ANSWER[0]):
        wanted[place] = abs(float(given.grad[0, place] @ plain[0, place]))
    return wanted


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sensitivity_is_that_of_the_slow_definition_whatever_the_padding(family):
    model = tiny_model(family)
    wanted = slow_sensitivity(model, TEXT, seed=3)
    assert wanted.max() > 0
    ids = torch.tensor([[0, 0, *TEXT], [0, 0, *TEXT], [0, 0, *TEXT]])
    visible = torch.ones_like(ids, dtype=torch.bool)
    visible[0, :2] = visible[2, :2] = False
    place = torch.arange(ids.shape[1])[None].expand_as(ids)
    answer = (place >= ANSWER[0] + 2) & (place < ANSWER[1] + 2)
    answer[2] = False
    model.zero_grad()
    for size in (None, 1):
        found = outcome_sensitivity(model, ids, visible, answer, START + 2, seed=3, batch_size=size)
        # The divergence is quadratic in noise of 0.001, so float32 keeps few digits of it.
        assert_close(found[0, 2:], wanted, rtol=2e-2, atol=2e-2 * float(wanted.max()))
        assert not found[2].any()
    assert not outcome_sensitivity(model, ids, visible, answer & False, START + 2).any()
    assert all(parameter.grad is None for parameter in model.parameters())


def slow_gate(scores, share):
    logs = np.log1p(scores)
    place = (logs - logs.min()) / (np.ptp(logs) or 1.0)
    border = np.quantile(place, 1 - share)
    weights = [
        max(one / (border + 1e-8), 0.1)
        if one < border
        else 1 + (one - border) / (1 - border + 1e-8)
        for one in place
    ]
    return np.array(weights) / np.mean(weights)


def test_the_gate_is_that_of_the_slow_definition_and_keeps_the_mean():
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.exponential(size=(3, 9))).float()
    scores[2] = 0.25  # all equal: nothing to tell apart
    weighed = torch.ones(3, 9, dtype=torch.bool)
    weighed[0, 5:] = weighed[1, 0] = False
    for share in (0.1, 0.4, 1.0):
        found = outcome_gate(scores, weighed, share)
        for row in range(3):
            mine = weighed[row]
            wanted = torch.from_numpy(slow_gate(scores[row, mine].double().numpy(), share))
            assert_close(found[row, mine].double(), wanted, rtol=1e-5, atol=1e-6)
        assert (found[~weighed] == 1).all()
        assert_close(found.mean(-1), torch.ones(3))


def test_a_gamma_of_two_gives_the_published_weights_before_the_answer():
    ids = torch.arange(24).reshape(2, 12)
    answer = torch.zeros_like(ids, dtype=torch.bool)
    answer[0, 8:10] = True  # the second row has none
    given = Rollouts(
        ids=ids,
        visible=torch.ones_like(answer),
        prompt_length=3,
        competing=torch.ones(2, 9, dtype=torch.bool),
        target=answer,
        answer=answer,
        sensitivity=torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)),
    )
    boost = SCORERS["oar"].boost(given, 0.4)
    before = torch.zeros(2, 9, dtype=torch.bool)
    before[0, :5] = True
    weights = credit_weights(boost, given.competing, gamma=2.0)
    assert_close(weights, outcome_gate(given.sensitivity[:, 3:], before, 0.4))
    assert weights[0, :5].min() < 0.5 < 1.5 < weights[0, :5].max()
    assert (weights[~before] == 1).all()
    assert (credit_weights(boost, given.competing, gamma=9.0) >= 0).all()
    with pytest.raises(ValueError, match="finite"):
        SCORERS["oar"].boost(replace(given, sensitivity=given.sensitivity * torch.nan), 0.4)
