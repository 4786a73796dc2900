"""A trace as a JSON document, and the JSON Schema that describes each of its fields."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import numpy as np

from flowtracer_plugin import __version__
from flowtracer_plugin.flow.backbone import StepGraph, strongest_edges
from flowtracer_plugin.result.trace_data import TraceData

JSON_SCHEMA_VERSION = 1
"""A new field keeps the version. Removing a field or changing its meaning raises it."""

ALL_STEPS = 256
"""With more steps than this, a document holds only the strongest flows into each step."""

STEP_EDGES = 16
"""The number of these strongest flows into each step."""


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the document from `FlowTrace.to_dict` and `to_json`.

    It gives the meaning and the unit of every field. Documents of this version of the package hold
    exactly the fields that it names.

    Example:
        >>> json_schema()["properties"]["tokens"]["items"]
        {'$ref': '#/$defs/token'}
    """
    path = files("flowtracer_plugin.result") / "trace.schema.json"
    schema: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return schema


def document(trace: TraceData) -> dict[str, Any]:
    """The trace without its attention; its size grows with the length of the text."""
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
    """The fields of a document that describe the trace as a whole."""
    return {
        "schema": JSON_SCHEMA_VERSION,
        "package_version": __version__,
        "model": trace.model,
        "layers": _listed(trace.layers),
        "heads": _listed(trace.heads),
        "chosen": _listed(trace.chosen),
        "options": {name: _listed(value) for name, value in asdict(trace.options).items()},
        "prompt_length": trace.spans.prompt_length,
        "answer": {
            "text": trace.spans.answer_text,
            "rule": trace.spans.rule,
            "tokens": np.flatnonzero(trace.spans.answer).tolist(),
        },
        "reasoning_share": trace.reasoning_share,
        "question_reached": trace.backbone.question_reached,
    }


def _listed(value: Any) -> Any:
    """The value, with lists in place of tuples."""
    return [_listed(one) for one in value] if isinstance(value, tuple) else value


def token_columns(trace: TraceData) -> dict[str, list[Any]]:
    """The fields of all tokens: for each field, the values in reading order."""
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
    """The fields of each token in reading order."""
    columns = token_columns(trace)
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def token_fields() -> dict[str, tuple[str, str]]:
    """The JSON type and the description of each field of a token."""
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
