"""From token ids to flow, by either mode: dense, or streamed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowtracer_plugin._substitution import Rows
from flowtracer_plugin.backbone import outline
from flowtracer_plugin.flow import solve_flow
from flowtracer_plugin.reader import AttentionReader
from flowtracer_plugin.rollouts import (
    FlowBatch,
    RolloutMasks,
    drop_first_token,
    solve_rollouts,
    stream_rollouts,
)
from flowtracer_plugin.spans import Spans
from flowtracer_plugin.streamed import stream_flow
from flowtracer_plugin.trace import FlowOptions

Ids = Int[Tensor, "batch token"]
Mask = Bool[Tensor, "batch token"]


def solve_text(
    reader: AttentionReader,
    layers: Sequence[int],
    ids: Int[Tensor, "1 token"],
    spans: Spans,
    pieces: Sequence[str],
    options: FlowOptions,
    mode: str,
) -> dict[str, Any]:
    """Those fields of a trace that come of the attention of its text."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    weights, boundary = options.question_weights, options.boundary
    if mode == "dense":
        attention = _edges(reader, layers, ids, mask, options)[0].cpu().numpy()
        flow = solve_flow(
            attention,
            spans.question,
            spans.target,
            question_weights=weights,
            boundary=boundary,
        )
        return {"attention": attention, "reach": flow.reach, "throughput": flow.throughput}
    rows, _ = _rows(reader, layers, ids, mask, options)
    nodes, backbone = stream_flow(
        lambda start, stop: rows(start, stop)[0],
        torch.from_numpy(spans.question).to(ids.device),
        torch.from_numpy(spans.target).to(ids.device),
        outline(pieces, spans.prompt_length),
        question_weights=weights,
        boundary=boundary,
    )
    found = {"reach": nodes.reach, "throughput": nodes.throughput}
    return {"attention": None, "streamed": backbone, **found}


def solve_batch(
    reader: AttentionReader,
    layers: Sequence[int],
    ids: Ids,
    mask: Mask,
    masks: RolloutMasks,
    prompt_length: int,
    options: FlowOptions,
    mode: str,
) -> FlowBatch:
    """The flow of padded rollouts that run through the model at once."""
    if mode == "dense":
        attention = _edges(reader, layers, ids, mask, options)
        return solve_rollouts(attention, masks, prompt_length, options)
    rows, ordered = _rows(reader, layers, ids, mask, options)
    visible = mask.to(ordered.device)
    return stream_rollouts(rows, ordered, visible, masks, prompt_length, options)


def _edges(
    reader: AttentionReader, layers: Sequence[int], ids: Ids, mask: Mask, options: FlowOptions
) -> Float[Tensor, "batch query key"]:
    attention = reader.read(ids, mask, layers)
    return drop_first_token(attention, mask) if options.first_token == "drop" else attention


def _rows(
    reader: AttentionReader, layers: Sequence[int], ids: Ids, mask: Mask, options: FlowOptions
) -> tuple[Rows, Bool[Tensor, "batch most"]]:
    """The attention by rows, with padding behind the text, and the mask of that."""
    rows, ordered = reader.read_rows(ids, mask, layers)
    if options.first_token == "keep":
        return rows, ordered
    return lambda start, stop: drop_first_token(rows(start, stop), ordered[:, :stop]), ordered
