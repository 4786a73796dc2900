"""The slow definition of a credit audit: one rollout at a time, with the weights in the loss."""

import math
import statistics

import numpy as np
import torch

from tests.credit.reference_scorers import top


def advantages(rewards):
    """Each reward minus the mean, divided by the standard deviation plus TRL's 1e-4."""
    mean, spread = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(reward - mean) / (spread + 1e-4) for reward in rewards]


def choices(model, prompt, said, temperature):
    """The log-probabilities of all ids at the position of each completion token, float64."""
    logits = model(torch.tensor([[*prompt, *said]])).logits[0].double() / temperature
    rows = [logits[len(prompt) + number - 1] for number in range(len(said))]
    return [row - torch.log(torch.exp(row - row.max()).sum()) - row.max() for row in rows]


def gradient(model, parameters, groups, weigh, temperature):
    """The gradient of GRPO's loss with token weights, its mean over all tokens, per parameter."""
    tokens = sum(len(said) for group in groups for said in group.completions)
    model.zero_grad()
    for group in groups:
        for said, advantage in zip(group.completions, advantages(group.rewards), strict=True):
            chances = choices(model, group.prompt_ids, said, temperature)
            weights = weigh(group, said)
            loss = -sum(
                weight * advantage * row[token]
                for weight, row, token in zip(weights, chances, said, strict=True)
            )
            (loss / tokens).backward()
    found = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    model.zero_grad()
    return [one.double().flatten().numpy() for one in found]


def cosine(one, two):
    one, two = np.concatenate(one), np.concatenate(two)
    return float(one @ two / math.sqrt(one @ one) / math.sqrt(two @ two))


def entropies(model, prompt, said, temperature):
    with torch.no_grad():
        rows = choices(model, prompt, said, temperature)
    return [-sum(math.exp(p) * p for p in row.tolist()) for row in rows]


def most_uncertain(model, temperature, top_fraction):
    """The function that returns the boosts of the scorer `entropy`."""

    def boost(group, said):
        scores = entropies(model, group.prompt_ids, said, temperature)
        return top(scores, [True] * len(said), top_fraction)

    return boost
