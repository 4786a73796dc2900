"""The heads that pay the edges into one token of a trace, read from its model once more."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flowtracer_plugin.flow.solve import passing_tokens
from flowtracer_plugin.model.causal_lm import check_input, input_device, model_name
from flowtracer_plugin.options import FlowOptions
from flowtracer_plugin.reading.edges import EdgeChoice, up_to_answer
from flowtracer_plugin.reading.reader import AttentionReader
from flowtracer_plugin.result.token_heads import TokenHeads
from flowtracer_plugin.result.trace_data import TraceData
from flowtracer_plugin.trace.memory import Budget

_SAME = 0.05
"""The part of a token's strongest edge by which an edge may differ from the trace's: a model in
half precision rounds differently in batches."""


def token_heads(reader: AttentionReader, trace: TraceData, token: int) -> TokenHeads:
    """What each head pays into a token of a trace, by a pass of the model that made the trace.

    Raises:
        TooLittleMemoryError: The queries and keys of the text do not fit in the free memory.
        UnsupportedArchitectureError: The model is tensor parallel: no process has all heads.
        ValueError: The trace has no such token, nothing leads into it, the trace's edges are
            `"causal"`, or another model made the trace.
    """
    options, token = trace.options, _checked(trace, token)
    ids = torch.tensor(trace.token_ids, device=input_device(reader.model))[None]
    visible = check_input(reader.model, ids, None)
    reader.verify()
    gradients = options.edges == "influence"
    Budget(reader, trace.layers, copies=0, keeps=True, gradients=gradients).choose(
        "auto", ids.shape[1]
    )
    target, response, answer = (
        torch.from_numpy(mask)[None].to(ids.device)
        for mask in (trace.spans.target, trace.spans.response, trace.spans.answer)
    )
    choice = EdgeChoice(
        heads=trace.heads or "all",
        edges=options.edges,
        target=target,
        reasoning=torch.zeros_like(response),
        decided=up_to_answer(response, answer),
    )
    rows, _ = reader.read_rows(ids, visible, trace.layers, choice=choice, maps=True)
    paid = rows.by_head(token - 1 if options.rows == "decision" else token)
    layers = [site.layer for site in reader.sites if site.layer in set(trace.layers)]
    edges = _as_asked(_stacked(paid), options)[..., :token]
    found = TokenHeads(
        token=token, layers=tuple(layers), edges=edges, flow=edges * _flow_by_edge(trace, token)
    )
    _check_same(found, trace, reader)
    return found


def _checked(trace: TraceData, token: int) -> int:
    """The number of the token, if edges of single heads lead into it."""
    options, last = trace.options, len(trace.tokens) - 1
    if options.edges == "causal":
        raise ValueError(
            "edges='causal' say what the answer loses without an edge in all heads, so that no "
            "single head has a part of them; trace the text with another preset, such as "
            "'derivation'"
        )
    first = trace.spans.prompt_length if options.rows == "decision" else 1
    if not first <= token <= last:
        given = ", since the prompt was given" if options.rows == "decision" else ""
        raise ValueError(
            f"wanted a token that edges lead into, from {first} to {last}{given}, found {token}"
        )
    return int(token)


def _stacked(paid: tuple[Float[Tensor, "_ key"], ...]) -> Float[np.ndarray, "layer head key"]:
    most = max(len(heads) for heads in paid)
    found = np.zeros((len(paid), most, paid[0].shape[1]))
    for layer, heads in enumerate(paid):
        found[layer, : len(heads)] = heads.double().cpu()
    return found


def _as_asked(
    paid: Float[np.ndarray, "layer head key"], options: FlowOptions
) -> Float[np.ndarray, "layer head key"]:
    """What heads pay, with the options `first_token` and `damping`, as for the edges of a trace."""
    if options.first_token == "drop":
        before = paid.sum()
        paid[..., 0] = 0
        after = paid.sum()
        paid *= before / after if after > 0 else 0
    return paid * options.damping


def _flow_by_edge(trace: TraceData, token: int) -> Float[np.ndarray, " source"]:
    """The flow on an edge of weight 1 into the token from each earlier one: `f(i) h(k) / h(i)`."""
    passing = passing_tokens(trace.spans.answer, trace.options.boundary)
    reach = trace.reach.astype(np.float64)
    from_each = np.divide(trace.throughput, reach, where=reach > 0, out=np.zeros_like(reach))
    return (from_each * reach[token] * (True if passing is None else passing))[:token]


def _check_same(found: TokenHeads, trace: TraceData, reader: AttentionReader) -> None:
    """Compare with the strongest edges of the trace.

    Raises:
        ValueError: They differ by more than rounding.
    """
    known = trace.backbone.sources
    flow, sources = known.flow[found.token], known.token[found.token]
    kept = flow > 0
    paid = found.flow.sum((0, 1))[sources[kept]]
    if not np.allclose(paid, flow[kept], rtol=0, atol=_SAME * flow.max(initial=0)):
        raise ValueError(
            f"the heads of {model_name(reader.model)} do not pay the edges of this trace of "
            f"{trace.model}: another model, or other weights, made it. Trace the text with this "
            "tracer, and ask it for the heads of that trace"
        )
