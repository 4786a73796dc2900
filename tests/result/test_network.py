"""The graph of a trace, in networkx and in GraphML."""

import json
import sys
from xml.etree import ElementTree

import networkx
import numpy as np
import pytest

import flowtracer_plugin as ft
from flowtracer_plugin.flow.backbone import KEPT_EDGES
from flowtracer_plugin.result.document import about
from flowtracer_plugin.text.visible import visible
from tests.made_traces import as_streamed, hostile_trace, make_trace
from tests.pages import HOSTILE
from tests.tiny import PROMPT, RESPONSE, tiny_llama, tiny_tokenizer

NAMESPACE = "{http://graphml.graphdrawing.org/xmlns}"


@pytest.fixture(scope="module")
def trace():
    return ft.wrap(tiny_llama(), tiny_tokenizer(), preset="paper").trace(PROMPT, RESPONSE)


def test_the_graph_holds_the_flow(trace):
    graph = trace.to_networkx()
    assert networkx.is_directed_acyclic_graph(graph)
    assert graph.number_of_nodes() == 28
    edges = trace.flow.edge_flow()
    assert graph.number_of_edges() == np.count_nonzero(edges)
    for earlier, later, flow in graph.edges(data="flow"):
        assert flow == edges[later, earlier] > 0
        assert earlier < later
    for token, row in enumerate(trace.to_dict()["tokens"]):
        assert {"index": token, **graph.nodes[token]} == row
        through = graph.in_degree(token, weight="flow") + row["injected"]
        assert through == pytest.approx(row["throughput"], abs=1e-6)
    assert graph.graph == about(trace)


def test_weak_edges_can_be_left_out_of_the_graph(trace):
    edges = trace.flow.edge_flow()
    few = trace.to_networkx(minimum=0.02)
    assert few.number_of_nodes() == 28
    assert 0 < few.number_of_edges() == (edges > 0.02).sum() < np.count_nonzero(edges)


@pytest.mark.parametrize("change", [lambda trace: trace, as_streamed], ids=["dense", "streamed"])
@pytest.mark.parametrize("minimum", [0.0, 0.01])
def test_graphml_read_back_is_the_graph_of_the_strongest_edges(trace, change, minimum, tmp_path):
    path = change(trace).to_graphml(tmp_path / "new" / "a.graphml", minimum=minimum)
    assert path == tmp_path / "new" / "a.graphml"
    assert [file.name for file in path.parent.iterdir()] == ["a.graphml"]
    wanted = as_streamed(trace).to_networkx(minimum=minimum)
    found = networkx.read_graphml(path, node_type=int)
    assert dict(found.nodes(data=True)) == dict(wanted.nodes(data=True))
    assert list(found.edges(data=True)) == list(wanted.edges(data=True))
    assert found.is_directed()
    for name, value in about(trace).items():
        plain = isinstance(value, str | int | float)
        assert (found.graph[name] if plain else json.loads(found.graph[name])) == value


def test_any_text_survives_in_xml(tmp_path):
    trace = hostile_trace()
    path = trace.to_graphml(tmp_path / "a.graphml")
    graph = networkx.read_graphml(path, node_type=int)
    texts = [graph.nodes[token]["text"] for token in range(len(trace.tokens))]
    assert texts == [visible(text) for text in trace.tokens]
    assert texts[3 : 3 + len(HOSTILE)] == list(map(visible, HOSTILE))
    assert graph.graph["model"] == HOSTILE[0]
    assert json.loads(graph.graph["answer"])["text"] == trace.spans.answer_text
    root = ElementTree.parse(path).getroot()
    assert {element.tag.removeprefix(NAMESPACE) for element in root.iter()} == {
        "graphml",
        "key",
        "graph",
        "node",
        "edge",
        "data",
    }


@pytest.mark.parametrize("text", ["", " ", "\n", "\ufffe", "a\uffff", "\U0001fffe", "日本", "\t"])
def test_odd_texts_survive_too(text, tmp_path):
    trace = make_trace(("<s>", text, "a", "b", "7", "."))
    graph = networkx.read_graphml(trace.to_graphml(tmp_path / "a"), node_type=int)
    assert graph.nodes[1]["text"] == (visible(text) or "∅")


def test_graphml_grows_with_the_text_and_not_with_its_square(tmp_path):
    trace = make_trace(("<s>", *("ab",) * 99, "7", "."), prompt=9)
    graph = networkx.read_graphml(trace.to_graphml(tmp_path / "a"))
    assert graph.number_of_edges() <= 2 * KEPT_EDGES * 102 < trace.to_networkx().number_of_edges()


@pytest.mark.parametrize("minimum", [-0.1, float("nan")])
def test_a_negative_minimum_is_refused(trace, minimum, tmp_path):
    for call in (trace.to_networkx, lambda **wish: trace.to_graphml(tmp_path / "a", **wish)):
        with pytest.raises(ValueError, match=f"minimum must be at least 0, got {minimum}"):
            call(minimum=minimum)


def test_the_same_trace_gives_the_same_file(trace, tmp_path):
    first, second = (trace.to_graphml(tmp_path / name) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("to_networkx", lambda trace, _: trace.to_networkx()),
        ("to_graphml", lambda trace, folder: trace.to_graphml(folder / "a.graphml")),
    ],
)
def test_without_networkx_the_extra_is_named(trace, name, call, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "flowtracer_plugin.result.network", raising=False)
    monkeypatch.setitem(sys.modules, "networkx", None)
    wanted = rf"{name} needs networkx; .*'flowtracer-plugin\[viz\]'"
    with pytest.raises(ModuleNotFoundError, match=wanted):
        call(trace, tmp_path)
    assert not list(tmp_path.iterdir())
