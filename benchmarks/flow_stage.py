"""What does the flow stage cost, next to other ways through the same graph?

Random float32 attention with rows that sum to one; the question has a quarter of the tokens, the
answer four. `flow` and `flow_numpy` start from the plain matrix each time, and include all checks.

* `numpy_sweep`: reach and throughput token by token, one vector operation each. It checks nothing,
  and reads half of the matrix twice, near the memory bandwidth. No method that also checks every
  number once can be five times as fast.
* `conditioned_sweep`: the formulas as the paper states them, with the answer-conditioned matrix.
* `rollout`: attention rollout of four layers, (A + I) / 2 each: another quantity, which needs each
  layer. It is left out at 8192 tokens, where its three matrix products take half a minute.
* `scipy_max_flow`, `networkx_max_flow`: a maximum flow from the question to the answer, with
  attention as capacity (in whole millionths for scipy), on a graph made before the clock starts.
  This is another quantity, too; it is left out beyond 2048 and 512 tokens (seconds and minutes).
"""

from __future__ import annotations

from functools import reduce

import networkx as nx
import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

import flowtracer_plugin as ft
from benchmarks.graphs import Attention, Mask, ends, random_attention
from benchmarks.harness import Target, Ways
from benchmarks.models import device

OURS = "flow"
CASES = [{"tokens": tokens} for tokens in (128, 512, 2048, 8192)]
TARGETS = [
    Target(other=other, measure="seconds", ratio=1 / 5, where={"tokens": 8192})
    for other in ("conditioned_sweep", "numpy_sweep")
]

ROLLOUT_LAYERS = 4
MILLION = 10**6

Throughput = Float[np.ndarray, " token"]


def ways(*, tokens: int) -> Ways:
    attention, (question, answer) = random_attention(tokens), ends(tokens)
    tensor, *masks = (
        torch.from_numpy(array).to(device()) for array in (attention, question, answer)
    )
    found: dict[str, object] = {
        "flow": lambda: ft.solve_flow(tensor, *masks).throughput,
        "flow_numpy": lambda: ft.solve_flow(attention, question, answer).throughput,
        "numpy_sweep": lambda: sweep(attention, question, answer),
        "conditioned_sweep": lambda: conditioned_sweep(attention, question, answer),
    }
    if tokens <= 2048:
        layers = [random_attention(tokens, seed=seed) for seed in range(ROLLOUT_LAYERS)]
        found["rollout"] = lambda: rollout(layers)
        capacities = whole_capacities(attention, question, answer)
        found["scipy_max_flow"] = lambda: maximum_flow(capacities, tokens, tokens + 1)
    if tokens <= 512:
        graph = capacity_graph(attention, question, answer)
        found["networkx_max_flow"] = lambda: nx.maximum_flow(graph, "source", "sink")
    return found


def sweep(attention: Attention, question: Mask, answer: Mask) -> Throughput:
    """Throughput by a sweep back for reach, which must not be 0, and one forwards for flow."""
    reach = answer.astype(attention.dtype)
    for token in range(len(reach) - 1, 0, -1):
        reach[:token] += attention[token, :token] * reach[token]
    source = question / question.sum(dtype=attention.dtype)
    throughput, potential = np.zeros_like(reach), np.zeros_like(reach)
    for token in range(len(reach)):
        arriving = attention[token, :token] @ potential[:token]
        throughput[token] = source[token] + reach[token] * arriving
        potential[token] = throughput[token] / reach[token]
    return throughput


def conditioned_sweep(attention: Attention, question: Mask, answer: Mask) -> Throughput:
    """Throughput from `P[i, k] = W[i, k] h(k) / h(i)`, as the sum of `f(i) P[i, k]` over `i`."""
    weight = np.triu(attention.T, 1)
    reach = answer.astype(attention.dtype)
    for token in range(len(reach) - 1, -1, -1):
        reach[token] += weight[token, token + 1 :] @ reach[token + 1 :]
    conditioned = weight * reach / reach[:, None]
    throughput = question / question.sum(dtype=attention.dtype)
    for token in range(1, len(reach)):
        throughput[token] += throughput[:token] @ conditioned[:token, token]
    return throughput


def rollout(layers: list[Attention]) -> Attention:
    """Abnar and Zuidema's attention rollout: residual connections count for half of each layer."""
    identity = np.eye(len(layers[0]), dtype=layers[0].dtype)
    return reduce(lambda below, layer: layer @ below, [(one + identity) / 2 for one in layers])


def whole_capacities(attention: Attention, question: Mask, answer: Mask) -> csr_array:
    """Capacities of edges from earlier to later tokens, with source and sink after the tokens."""
    tokens = len(attention)
    capacities = np.zeros((tokens + 2, tokens + 2), np.int32)
    capacities[:tokens, :tokens] = np.triu(attention.T * MILLION, 1)
    capacities[tokens, :tokens] = question * MILLION
    capacities[:tokens, tokens + 1] = answer * MILLION
    return csr_array(capacities)


def capacity_graph(attention: Attention, question: Mask, answer: Mask) -> nx.DiGraph:
    """The same graph for networkx, with fractional capacities."""
    graph = nx.from_numpy_array(np.triu(attention.T, 1), create_using=nx.DiGraph)
    nx.set_edge_attributes(graph, nx.get_edge_attributes(graph, "weight"), "capacity")
    graph.add_edges_from(("source", int(token)) for token in np.flatnonzero(question))
    graph.add_edges_from((int(token), "sink") for token in np.flatnonzero(answer))
    return graph
