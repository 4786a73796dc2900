import io
import json
import math
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import rich
import torch
from hypothesis import given, settings, strategies as st
from rich.cells import cell_len
from rich.console import Console

import flowtracer_plugin as ft
from flowtracer_plugin.flow.solve import solve_flow
from flowtracer_plugin.options import FlowOptions
from flowtracer_plugin.result.trace_data import RankedToken
from flowtracer_plugin.text.spans import Spans
from flowtracer_plugin.trace.flow_trace import FlowTrace
from flowtracer_plugin.trace.rollouts import RolloutMasks, solve_rollouts
from tests.flow import reference, reference_backbone
from tests.flow.strategies import problems
from tests.tiny import PROMPT, RESPONSE, tiny_llama, tiny_tokenizer

LONE = "\ud83d"  # half of a surrogate pair


def made(problem, prompt_length, **changes):
    """The trace that `FlowTracer` would make if it had read this graph."""
    length = len(problem.question)
    options = changes.pop("options", FlowOptions())
    flow = solve_flow(
        *problem.parts, question_weights=options.question_weights, boundary=options.boundary
    )
    fields = {
        "token_ids": np.arange(length),
        "tokens": tuple(f" {token}" for token in range(length)),
        "spans": Spans(
            prompt_length=prompt_length,
            question=problem.question,
            answer=problem.answer,
            target=problem.answer,
            rule="rule",
            answer_text="answer",
        ),
        "attention": problem.attention,
        "reach": flow.reach,
        "throughput": flow.throughput,
        "model": "model",
        "options": options,
        "layers": (0, 2),
    }
    return FlowTrace(**{**fields, **changes})


@st.composite
def parted(draw):
    """A graph, and the length of its prompt, which ends after the question."""
    problem = draw(problems(max_tokens=8))
    last = np.flatnonzero(problem.question).max()
    return problem, draw(st.integers(last + 1, np.flatnonzero(problem.answer).min()))


def to_batch(array):
    return torch.tensor(array)[None]


@pytest.fixture(scope="module")
def trace():
    return ft.wrap(tiny_llama(), tiny_tokenizer(), preset="paper").trace(PROMPT, RESPONSE)


@settings(deadline=None, max_examples=60)
@given(parted(), st.sampled_from(["uniform", "reach"]), st.sampled_from(["literal", "absorbing"]))
def test_the_reasoning_share_is_that_of_all_paths(parts, weights, boundary):
    problem, length = parts
    options = FlowOptions(question_weights=weights, boundary=boundary)
    paths = reference_backbone.all_paths(*problem.parts, weights, boundary)
    wanted = reference_backbone.reasoning_share(paths, length, problem.answer)
    walked = reference_backbone.reasoning_share_by_walk(
        reference.flow(*problem.parts, weights, boundary), length, problem.answer
    )
    assert walked == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    trace = made(problem, length, options=options)
    assert trace.reasoning_share == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert 0 <= trace.reasoning_share <= 1 + 1e-9
    masks = RolloutMasks(
        question=to_batch(problem.question),
        target=to_batch(problem.answer),
        answer=to_batch(problem.answer),
        answers=(None,),
    )
    batch = solve_rollouts(to_batch(problem.attention).float(), masks, length, options)
    assert batch.reasoning_share.item() == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_regions_are_the_most_specific_ones(trace):
    regions = trace.spans.regions
    assert regions[0] == "prompt"  # the first token is no question
    assert regions[1:12] == ("question",) * 11
    assert [i for i, region in enumerate(regions) if region == "answer"] == [26]
    assert set(regions[12:26]) == {"response"}
    assert trace.spans.response.tolist() == [False] * 12 + [True] * 16


def test_a_trace_cannot_be_changed(trace):
    for name in ("throughput", "flow", "note"):
        with pytest.raises(FrozenInstanceError):
            setattr(trace, name, 1)


def test_solving_again_gives_the_stored_numbers(trace):
    np.testing.assert_array_equal(trace.flow.throughput, trace.throughput)
    np.testing.assert_array_equal(trace.flow.reach, trace.reach)
    assert trace.flow.sink_flow().sum() == pytest.approx(1)


@pytest.mark.parametrize("within", ["reasoning", "all"])
@pytest.mark.parametrize("rank", ["hubs", "checkpoints"])
def test_the_strongest_tokens_come_first(trace, rank, within):
    wanted = getattr(trace.backbone, rank)
    regions = enumerate(trace.spans.regions)
    ranked = [token for token, region in regions if within == "all" or region == "response"]
    even = sum(wanted[token] for token in ranked) / len(ranked)
    eligible = [token for token in ranked if wanted[token] > even]
    best = sorted(eligible, key=lambda token: (-wanted[token], token))
    found = getattr(trace, rank)(99, within=within, skip="")
    assert [token.index for token in found] == best
    assert found[0] == RankedToken(
        index=best[0],
        text=trace.tokens[best[0]],
        region=trace.spans.regions[best[0]],
        throughput=float(trace.throughput[best[0]]),
        score=float(wanted[best[0]]),
    )
    assert getattr(trace, rank)(2, within=within, skip="") == found[:2]
    assert 0 < len(found) < len(ranked)


@pytest.mark.parametrize("rank", ["hubs", "checkpoints"])
def test_the_question_and_the_answer_are_no_reasoning(trace, rank):
    assert getattr(trace, rank)(99) == getattr(trace, rank)(99, within="reasoning")
    assert {token.region for token in getattr(trace, rank)(99)} == {"response"}
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        getattr(trace, rank)(0)
    with pytest.raises(ValueError, match="within must be 'reasoning' or 'all', got 'answer'"):
        getattr(trace, rank)(within="answer")


def test_paths_lead_from_question_to_answer(trace):
    paths = trace.paths(3)
    assert paths == trace.backbone.paths[:3]
    assert len(trace.backbone.paths) == 10
    more = trace.paths(25)
    assert len(more) == 25
    assert more[:10] == trace.backbone.paths
    assert more[10].probability <= more[9].probability
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        trace.paths(0)
    assert all(trace.spans.regions[path.tokens[0]] == "question" for path in paths)
    assert all(path.tokens[-1] == 26 for path in paths)


def test_steps_are_sentences_with_their_regions(trace):
    steps = trace.steps().steps
    assert [step.text for step in steps] == [
        "Tom had 3 apples.",
        " He ate one.",
        " How many?",
        " He had 3.",
        " 3 - 1 = 2.\n",
        "The answer is 2.",
    ]
    assert [step.region for step in steps] == ["question"] * 3 + ["response"] * 3


def numbers(value):
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)
    elif isinstance(value, float):
        yield value


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def test_the_document_holds_the_numbers_of_the_trace(trace):
    text = trace.to_json()
    document = json.loads(text, parse_constant=refuse)
    assert document == json.loads(json.dumps(trace.to_dict()))
    assert all(math.isfinite(number) for number in numbers(document))
    assert document["schema"] == 1
    assert document["text"] == PROMPT + RESPONSE
    assert document["layers"] == [2, 3]
    assert document["prompt_length"] == 12
    assert document["answer"] == {"text": "2", "rule": "phrase", "tokens": [26]}
    assert document["question_reached"] == 11
    assert document["reasoning_share"] == trace.reasoning_share
    assert [token["index"] for token in document["tokens"]] == list(range(28))
    assert [token["id"] for token in document["tokens"]] == trace.token_ids.tolist()
    assert [token["throughput"] for token in document["tokens"]] == trace.throughput.tolist()
    assert [token["reach"] for token in document["tokens"]] == trace.reach.tolist()
    assert "".join(token["text"] for token in document["tokens"]) == trace.text
    assert document["hubs"][0]["index"] == trace.hubs()[0].index
    assert document["checkpoints"][0]["score"] == trace.checkpoints()[0].score
    assert document["paths"][0]["tokens"] == list(trace.paths()[0].tokens)
    assert len(document["steps"]["steps"]) == 6
    edges = trace.steps().edges
    for edge in document["steps"]["edges"]:
        assert edge["flow"] == edges[edge["target"], edge["source"]] > 0
    assert len(document["steps"]["edges"]) == np.count_nonzero(edges)


def test_the_document_of_many_steps_holds_the_strongest_flows(trace, monkeypatch):
    whole = trace.to_dict()["steps"]["edges"]
    monkeypatch.setattr("flowtracer_plugin.result.document.ALL_STEPS", 2)
    monkeypatch.setattr("flowtracer_plugin.result.document.STEP_EDGES", 2)
    few = trace.to_dict()["steps"]["edges"]
    into = {}
    for edge in sorted(whole, key=lambda edge: -edge["flow"]):
        into.setdefault(edge["target"], []).append(edge)
    wanted = [edge for edges in into.values() for edge in edges[:2]]
    assert sorted(map(str, few)) == sorted(map(str, wanted))
    assert len(few) < len(whole)


@pytest.mark.parametrize("text", ["日本", "€", '"\\', "\u2028", "\0", LONE, f"a{LONE}b"])
def test_any_text_can_be_written_as_json(trace, text):
    odd = replace(trace, model=text, tokens=(text, *trace.tokens[1:]))
    written = odd.to_json().encode()  # as a file or a terminal does
    assert json.loads(written)["model"] == text
    assert json.loads(written)["tokens"][0]["text"] == text


def test_text_that_can_be_read_is_not_escaped(trace):
    assert "日本" in replace(trace, model="日本").to_json()


def test_repr_says_what_was_traced(trace):
    assert repr(trace) == (
        "FlowTrace(28 tokens, answer '2' by 'phrase', layers [2, 3] of LlamaForCausalLM)"
    )


def test_rich_shows_the_answer_and_the_tokens(trace):
    console = Console(file=io.StringIO(), width=100)
    console.print(trace)
    shown = console.file.getvalue()
    assert "apples" in shown
    assert "2" in shown


def test_a_notebook_shows_the_trace(trace):
    assert "apples" in trace._repr_html_()


def test_a_page_is_written(trace, tmp_path):
    path = trace.to_html(tmp_path / "new" / "a.html")
    assert path == tmp_path / "new" / "a.html"
    assert "apples" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["question", "target", "question_weights", "boundary"])
def test_options_have_choices(name):
    with pytest.raises(ValueError, match=f"{name} must be one of .* got 'else'"):
        FlowOptions(**{name: "else"})


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "gbk", "utf-8"])
def test_a_trace_is_shown_in_the_characters_of_its_stream(encoding, monkeypatch):
    trace = ft.wrap(tiny_llama(), tiny_tokenizer(), preset="paper").trace(PROMPT, RESPONSE)
    tokens = ("北京", "→", "\u0301", *trace.tokens[3:])
    spans = replace(trace.spans, answer_text="北京→é")
    trace = replace(trace, tokens=tokens, spans=spans)
    views = []
    for name in (encoding, "utf-8"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=name, newline="")
        Console(file=stream, width=100, force_terminal=False).print(trace)
        monkeypatch.setattr("sys.stdout", stream)
        print(trace)  # noqa: T201
        rich.print(trace)
        stream.flush()
        views.append(stream.buffer.getvalue().decode(name))
        monkeypatch.undo()
    shown, whole = (view.splitlines() for view in views)
    assert len(shown) == len(whole)
    # as wide as before, but for characters without width that are left out
    assert [cell_len(line) for line in shown] == [cell_len(line) for line in whole]
    if encoding == "utf-8":
        assert shown == whole
    if encoding in ("cp1252", "latin-1"):
        assert "answer '????>é' found by rule 'phrase'" in shown[0]
        assert any(set(line) <= set("_.:-=+*#") and "#" in line for line in shown)


def test_an_estimate_is_shown_in_the_characters_of_its_stream(monkeypatch):
    estimate = ft.wrap(tiny_llama(), preset="paper").estimate(100)
    assert "free → dense" in str(estimate)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr("sys.stdout", stream)
    assert "free > dense" in str(estimate)
