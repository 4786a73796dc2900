"""A trace as a graph of its tokens, for networkx and as a GraphML file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import networkx
import numpy as np

from flowtracer_plugin.files import write_atomically
from flowtracer_plugin.flow.backbone import strongest_edges
from flowtracer_plugin.result.document import about, token_rows
from flowtracer_plugin.result.trace_data import TraceData
from flowtracer_plugin.text.visible import visible


def token_graph(trace: TraceData, *, minimum: float) -> networkx.DiGraph[int]:
    """The graph of all tokens, with the edges whose flow is above `minimum`.

    A streamed trace has only the strongest edges of each token.

    Raises:
        ValueError: `minimum` is below 0.
    """
    _check(minimum)
    graph = _graph(trace, _edges(trace, minimum))
    graph.graph.update(about(trace))
    return graph


def write_graphml(trace: TraceData, path: Path, *, minimum: float) -> Path:
    """Write all tokens and their strongest edges to `path`, whole or not at all; return `path`.

    XML cannot hold every character, so invisible characters are spelled out.

    Raises:
        ValueError: `minimum` is below 0.
    """
    _check(minimum)
    graph = _graph(trace, strongest_edges(trace.backbone, minimum))
    for node in graph.nodes.values():
        node["text"] = visible(node["text"]) or "∅"
    graph.graph.update({name: _scalar(value) for name, value in about(trace).items()})
    content = BytesIO()
    # Not write_graphml: with lxml installed, it would write a different file.
    networkx.write_graphml_xml(graph, content)
    write_atomically(path, content.getvalue())
    return path


def _check(minimum: float) -> None:
    if not minimum >= 0:
        raise ValueError(f"minimum must be at least 0, got {minimum!r}")


def _graph(trace: TraceData, edges: Iterable[tuple[int, int, float]]) -> networkx.DiGraph[int]:
    graph: networkx.DiGraph[int] = networkx.DiGraph()
    graph.add_nodes_from((row.pop("index"), row) for row in token_rows(trace))
    graph.add_weighted_edges_from(edges, weight="flow")
    return graph


def _edges(trace: TraceData, minimum: float) -> Iterator[tuple[int, int, float]]:
    if trace.streamed is not None:
        yield from strongest_edges(trace.streamed, minimum)
        return
    edges = trace.flow.edge_flow()
    for later, earlier in np.argwhere(edges > minimum).tolist():
        yield earlier, later, float(edges[later, earlier])


def _scalar(value: Any) -> str | int | float:
    """A value that GraphML can hold: lists become JSON, which escapes what XML cannot hold."""
    if isinstance(value, str):
        return visible(value)
    return value if isinstance(value, int | float) else json.dumps(value)
