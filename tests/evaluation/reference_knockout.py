"""A Llama in plain numpy, float64, one query at a time, in which edges can be left out."""

import math
from fractions import Fraction

import numpy as np


def llama_logits(model, ids, removed):
    """Logits [token, word] where query q does not see key k if `removed[q][k]` and q != k."""
    config = model.config
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    heads, groups, width = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    theta = config.rope_parameters["rope_theta"]
    frequency = theta ** -(np.arange(0, width, 2) / width)

    def normed(x, name):
        return x / np.sqrt((x**2).mean() + config.rms_norm_eps) * weights[name]

    def rotated(x, place):
        angle = np.concatenate([frequency, frequency]) * place
        half = np.concatenate([-x[width // 2 :], x[: width // 2]])
        return x * np.cos(angle) + half * np.sin(angle)

    states = [weights["model.embed_tokens.weight"][token] for token in ids]
    for layer in range(config.num_hidden_layers):
        here = f"model.layers.{layer}."
        inputs = [normed(x, here + "input_layernorm.weight") for x in states]
        parts = {
            name: [
                (weights[f"{here}self_attn.{name}_proj.weight"] @ x).reshape(-1, width)
                for x in inputs
            ]
            for name in ("q", "k", "v")
        }
        for q, x in enumerate(list(states)):
            seen = [k for k in range(q + 1) if k == q or not removed[q][k]]
            mixed = []
            for head in range(heads):
                group = head * groups // heads
                query = rotated(parts["q"][q][head], q)
                scores = np.array([query @ rotated(parts["k"][k][group], k) for k in seen])
                share = np.exp((scores - scores.max()) / np.sqrt(width))
                share /= share.sum()
                mixed.append(
                    sum(s * parts["v"][k][group] for s, k in zip(share, seen, strict=True))
                )
            x = x + weights[here + "self_attn.o_proj.weight"] @ np.concatenate(mixed)
            inner = normed(x, here + "post_attention_layernorm.weight")
            gate = weights[here + "mlp.gate_proj.weight"] @ inner
            up = weights[here + "mlp.up_proj.weight"] @ inner
            states[q] = x + weights[here + "mlp.down_proj.weight"] @ (
                gate / (1 + np.exp(-gate)) * up
            )
    return np.stack([weights["lm_head.weight"] @ normed(x, "model.norm.weight") for x in states])


def removed_edges(tokens, answer, rows):
    """`knock_out`'s cut, edge by edge."""
    size = len(answer)
    return [
        [
            bool(tokens[k])
            and k < q
            and (rows == "future" or (q + 1 < size and bool(answer[q + 1])))
            for k in range(size)
        ]
        for q in range(size)
    ]


def log_probs(logits):
    """Natural logarithms of the softmax of each row."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def effect(model, ids, answer, removed):
    """Drop of the answer's mean log-probability, flip of its greedy choice, KL divergence."""
    places = [p for p, wanted in enumerate(answer) if wanted]
    nothing = [[False] * len(ids)] * len(ids)
    before, after = (log_probs(llama_logits(model, ids, cut)) for cut in (nothing, removed))
    drop = np.mean([before[p - 1][ids[p]] - after[p - 1][ids[p]] for p in places])
    flip = any(before[p - 1].argmax() != after[p - 1].argmax() for p in places)
    kl = np.mean([np.exp(before[p - 1]) @ (before[p - 1] - after[p - 1]) for p in places])
    return drop, flip, kl


def top(scores, among, percent):
    """Places of the highest `percent` of the candidates, rounded up; of equal ones the earlier."""
    places = sorted((k for k, here in enumerate(among) if here), key=lambda k: (-scores[k], k))
    return set(places[: math.ceil(Fraction(percent) * len(places) / 100)])


def bottom(scores, among, percent):
    """Those that rank last in the same order."""
    places = sorted((k for k, here in enumerate(among) if here), key=lambda k: (-scores[k], k))
    return set(places[len(places) - math.ceil(Fraction(percent) * len(places) / 100) :])


def interval(values, resamples):
    """Percentiles of the means of resamples, each a list of places in `values`."""
    means = sorted(sum(values[k] for k in chosen) / len(values) for chosen in resamples)

    def quantile(share):
        at = share * (len(means) - 1)
        low = math.floor(at)
        high = min(low + 1, len(means) - 1)
        return means[low] + (at - low) * (means[high] - means[low])

    return quantile(0.025), quantile(0.975)
