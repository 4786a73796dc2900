"""A trace as plain values, and the JSON Schema that says what each of them means."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import numpy as np

from flowtracer_plugin import __version__
from flowtracer_plugin.flow.backbone import StepGraph, strongest_edges
from flowtracer_plugin.options import Heads
from flowtracer_plugin.result.trace_data import TraceData

JSON_SCHEMA_VERSION = 1
"""Fields may be added to a version. Where one goes, or means something else, a new one begins."""

ALL_STEPS = 256
"""Steps up to which a document holds all flows between them; of more, the strongest into each."""

STEP_EDGES = 16


def json_schema() -> dict[str, Any]:
    """What `FlowTrace.to_dict` and `to_json` give, as a JSON Schema (draft 2020-12).

    It says what every field means and in which unit, and is exact: documents of this version of
    the package hold the fields that it names and no others.

    Example:
        >>> json_schema()["properties"]["tokens"]["items"]
        {'$ref': '#/$defs/token'}
    """
    path = files("flowtracer_plugin.result") / "trace.schema.json"
    schema: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return schema


def document(trace: TraceData) -> dict[str, Any]:
    """Everything but the attention; it grows with the length of the text, not with its square."""
    return {
        **about(trace),
        "text": trace.text,
        "tokens": token_rows(trace),
        "edges": [
            {"source": earlier, "target": later, "flow": flow}
            for earlier, later, flow in strongest_edges(trace.backbone)
        ],
        "hubs": [asdict(token) for token in trace.hubs()],
        "checkpoints": [asdict(token) for token in trace.checkpoints()],
        "paths": [
            {"tokens": list(path.tokens), "probability": path.probability} for path in trace.paths()
        ],
        "steps": _steps(trace.steps()),
    }


def about(trace: TraceData) -> dict[str, Any]:
    """What a document says about the trace as a whole."""
    return {
        "schema": JSON_SCHEMA_VERSION,
        "package_version": __version__,
        "model": trace.model,
        "layers": list(trace.layers),
        "heads": [list(pair) for pair in trace.heads],
        "options": {
            **asdict(trace.options),
            "layers": _listed(trace.options.layers),
            "heads": _listed_pairs(trace.options.heads),
        },
        "prompt_length": trace.spans.prompt_length,
        "answer": {
            "text": trace.spans.answer_text,
            "rule": trace.spans.rule,
            "tokens": np.flatnonzero(trace.spans.answer).tolist(),
        },
        "reasoning_share": trace.reasoning_share,
        "question_reached": trace.backbone.question_reached,
    }


def _listed(layers: str | tuple[int, ...]) -> str | list[int]:
    return layers if isinstance(layers, str) else list(layers)


def _listed_pairs(heads: Heads) -> str | float | list[list[int]]:
    return [list(pair) for pair in heads] if isinstance(heads, tuple) else heads


def token_columns(trace: TraceData) -> dict[str, list[Any]]:
    """What a document says about each token, by field."""
    spans, backbone = trace.spans, trace.backbone
    bounds = trace.outline.bounds
    steps = np.repeat(np.arange(len(bounds)), [stop - start for start, stop in bounds])
    return {
        "index": list(range(len(trace.tokens))),
        "id": trace.token_ids.tolist(),
        "text": list(trace.tokens),
        "region": list(spans.regions),
        "step": steps.tolist(),
        "question": spans.question.tolist(),
        "answer": spans.answer.tolist(),
        "target": spans.target.tolist(),
        "throughput": trace.throughput.tolist(),
        "reach": trace.reach.tolist(),
        "injected": backbone.source.tolist(),
        "absorbed": backbone.sink.tolist(),
        "hub": backbone.hubs.tolist(),
        "checkpoint": backbone.checkpoints.tolist(),
    }


def token_rows(trace: TraceData) -> list[dict[str, Any]]:
    """The same, token by token."""
    columns = token_columns(trace)
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def token_fields() -> dict[str, tuple[str, str]]:
    """JSON's type, and the description, of each of these fields."""
    parts = json_schema()["$defs"]
    return {
        name: (
            field.get("type") or parts[field["$ref"].rpartition("/")[2]]["type"],
            field["description"],
        )
        for name, field in parts["token"]["properties"].items()
    }


def _steps(graph: StepGraph) -> dict[str, Any]:
    edges = graph.edges
    if len(edges) > ALL_STEPS:
        kept = np.argpartition(-edges, STEP_EDGES, axis=1)[:, :STEP_EDGES]
        few = np.zeros_like(edges)
        np.put_along_axis(few, kept, np.take_along_axis(edges, kept, 1), 1)
        edges = few
    flows: Sequence[Sequence[int]] = np.argwhere(edges > 0).tolist()
    return {
        "steps": [
            {**asdict(step), "absorbed": float(absorbed)}
            for step, absorbed in zip(graph.steps, graph.sink, strict=True)
        ],
        "edges": [
            {"source": earlier, "target": later, "flow": float(edges[later, earlier])}
            for later, earlier in flows
        ],
    }
