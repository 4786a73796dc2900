"""Slow definitions of a backbone and of a trace's reasoning share."""

from itertools import combinations

import numpy as np

from tests.flow import reference


def all_paths(attention, question, answer, question_weights="uniform", boundary="literal"):
    """All paths from the question into the sink, with their probabilities."""
    weight = np.triu(np.asarray(attention, dtype=np.float64).T, 1)
    shares = reference.conditioned(weight, answer, boundary)
    mu = reference.source(weight, question, answer, question_weights, boundary)
    size, found = len(weight), {}

    def walk(path, probability):
        if shares[path[-1], size] > 0:
            found[path] = probability * shares[path[-1], size]
        for later in range(path[-1] + 1, size):
            if shares[path[-1], later] > 0:
                walk((*path, later), probability * shares[path[-1], later])

    for start in range(size):
        if mu[start] > 0:
            walk((start,), mu[start])
    return found


def reasoning_share(paths, prompt_length, target):
    """The probability that the first response token of a path is not a target."""
    share = 0.0
    for path, probability in paths.items():
        entered = [token for token in path if token >= prompt_length]
        if entered and not target[entered[0]]:
            share += probability
    return share


def effective_number(parts):
    """The exponential of the entropy of the parts' shares."""
    total = sum(parts)
    shares = [part / total for part in parts if part > 0]
    return np.prod([share**-share for share in shares]) if shares else 1.0


def hub_and_checkpoint_scores(flow):
    """The hub and checkpoint scores, from the result of `reference.flow`."""
    hubs, checkpoints = [], []
    for token, through in enumerate(flow["throughput"]):
        leaving = [*flow["edge_flow"][:, token], flow["sink_flow"][token]]
        entering = [*flow["edge_flow"][token], flow["source"][token]]
        hubs.append(through * effective_number(leaving))
        checkpoints.append(through * effective_number(entering))
    return np.array(hubs), np.array(checkpoints)


def step_sums(flow, bounds):
    """Flow between steps, inflow and flow into the sink, summed edge by edge."""
    step_of = {token: s for s, (start, stop) in enumerate(bounds) for token in range(start, stop)}
    edges, inflow, sink = np.zeros((len(bounds),) * 2), np.zeros(len(bounds)), np.zeros(len(bounds))
    for later, row in enumerate(flow["edge_flow"]):
        for earlier, amount in enumerate(row):
            if step_of[later] != step_of[earlier]:
                edges[step_of[later], step_of[earlier]] += amount
                inflow[step_of[later]] += amount
    for token, step in step_of.items():
        inflow[step] += flow["source"][token]
        sink[step] += flow["sink_flow"][token]
    return edges, inflow, sink


def drop_first(attention, first=0):
    """Attention without that to the first token; rows keep their sum if anything is left."""
    dropped = np.array(attention, dtype=np.float64)
    for row in dropped:
        before, row[first] = row.sum(), 0.0
        if row.sum() > 0:
            row *= before / row.sum()
    return dropped


def reasoning_share_by_walk(flow, prompt_length, target):
    """`reasoning_share` for long texts: flow moves on through the prompt token by token."""
    size, share = len(flow["throughput"]), 0.0
    waiting = np.array(flow["source"])
    for earlier in range(prompt_length):
        for later in range(earlier + 1, size):
            part = flow["edge_flow"][later, earlier] / max(flow["throughput"][earlier], 1e-300)
            if later < prompt_length:
                waiting[later] += waiting[earlier] * part
            elif not target[later]:
                share += waiting[earlier] * part
    return share


def crossing(flow, cut):
    """Flow of each earlier token across a cut before the token `cut`, flow injected after the cut,
    and flow that has arrived in the sink before it.
    """
    size = len(flow["throughput"])
    edges = [
        sum(flow["edge_flow"][later, earlier] for later in range(cut, size)) if earlier < cut else 0
        for earlier in range(size)
    ]
    return edges, sum(flow["source"][cut:]), sum(flow["sink_flow"][:cut])


def passing_over(flow, start, stop):
    """Flow on edges from before the tokens `start` to `stop` to after them."""
    size = len(flow["throughput"])
    return sum(
        flow["edge_flow"][later, earlier] for earlier in range(start) for later in range(stop, size)
    )


def smallest_flow_set(edges, share):
    """The least number of flows that hold a share of their sum, by trying every subset."""
    flows = [flow for flow in np.ravel(edges) if flow > 0]
    for count in range(len(flows) + 1):
        best = max((sum(part) for part in combinations(flows, count)), default=0)
        if best >= share * sum(flows):
            return count
    raise AssertionError("all flows hold all flow")
