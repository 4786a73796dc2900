"""The JSON document, and the schema that describes it."""

import json
import re
from copy import deepcopy
from dataclasses import replace
from typing import get_args

import jsonschema
import numpy as np
import pytest
from hatchling.builders.wheel import WheelBuilder
from transformers import AutoModelForCausalLM, AutoTokenizer

import flowtracer_plugin as ft
from flowtracer_plugin.flow import backbone
from flowtracer_plugin.options import CHOICES, FlowOptions
from flowtracer_plugin.result import document
from flowtracer_plugin.text.spans import Region
from tests.made_traces import as_streamed, hostile_trace, make_trace
from tests.test_layout import ROOT
from tests.tiny import PROMPT, RESPONSE, tiny_llama, tiny_tokenizer

SCHEMA = ft.json_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


@pytest.fixture(scope="module")
def trace():
    return ft.wrap(tiny_llama(), tiny_tokenizer(), preset="paper").trace(PROMPT, RESPONSE)


def reasoner_trace():
    path = ROOT / "examples" / "reasoner" / "model"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
    )
    return ft.wrap(model, tokenizer, preset="paper").generate(
        "Ann has 4 apples. Ann buys 1. How many apples?\n"
    )


TRACES = {
    "dense": lambda trace: trace,
    "streamed": lambda _: ft.wrap(
        tiny_llama(), tiny_tokenizer(), mode="streamed", preset="paper"
    ).trace(PROMPT, RESPONSE),
    "other options": lambda trace: replace(
        trace,
        options=FlowOptions(
            layers=(2, 3), question="mask", target="decision", question_weights="reach"
        ),
    ),
    "hostile": lambda _: hostile_trace(),
    "hostile, streamed": lambda _: as_streamed(hostile_trace()),
    "smallest": lambda _: make_trace(("<s>", "a", "7"), prompt=2, answer=(-1,)),
    "reasoner": lambda _: reasoner_trace(),
}


@pytest.mark.parametrize("name", TRACES)
def test_documents_are_as_the_schema_says(trace, name):
    made = TRACES[name](trace)
    VALIDATOR.validate(made.to_dict())
    VALIDATOR.validate(json.loads(made.to_json()))


def test_the_schema_is_valid():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == VALIDATOR.META_SCHEMA["$id"]
    assert SCHEMA["$id"].endswith(f":{document.JSON_SCHEMA_VERSION}")
    ft.json_schema()["properties"].clear()
    assert ft.json_schema() == SCHEMA  # nobody can change another one's


def test_the_wheel_contains_the_schema():
    files = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert "flowtracer_plugin/result/trace.schema.json" in files


def places(value, path=()):
    """The path of each field, and of the first item of each list."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield (*path, name)
            yield from places(inner, (*path, name))
    elif isinstance(value, list) and value:
        yield (*path, 0)
        yield from places(value[0], (*path, 0))


def at(value, path):
    for key in path:
        value = value[key]
    return value


def test_every_field_is_required_and_has_a_type():
    whole = make_trace(("<s>", "a", "b\n", "c", "d", "7", "."), prompt=3).to_dict()
    fields = list(places(whole))
    assert len(fields) > 70
    for path in fields:
        *before, last = path
        found = at(whole, path)
        wrong = [None, -1, [[]], {"other": 1}, 7 if isinstance(found, str) else "7"]
        for value in wrong:
            changed = deepcopy(whole)
            at(changed, before)[last] = value
            assert not VALIDATOR.is_valid(changed), (path, value)
        if isinstance(last, str):
            changed = deepcopy(whole)
            del at(changed, before)[last]
            assert not VALIDATOR.is_valid(changed), path
        if isinstance(found, dict):
            changed = deepcopy(whole)
            at(changed, path)["unheard_of"] = 1
            assert not VALIDATOR.is_valid(changed), path


def properties(schema, path=()):
    for name, inner in schema.get("properties", {}).items():
        yield (*path, name), inner
        yield from properties(inner, (*path, name))
    for name, inner in schema.get("$defs", {}).items():
        yield from properties(inner, (*path, name))


UNIT = r"\b(units?|tokens|edges|visits|share|[Nn]umbers?|[Vv]ersion)\b"


def test_every_field_says_what_it_means_and_in_which_unit():
    found = dict(properties(SCHEMA))
    assert len(found) > 50
    for path, field in found.items():
        assert field["description"].endswith("."), path
        if field.get("type") in ("integer", "number"):
            assert re.search(UNIT, field["description"]), path


def test_the_schema_knows_the_choices_and_limits_of_the_code():
    options = SCHEMA["properties"]["options"]["properties"]
    assert list(options) == list(FlowOptions.__dataclass_fields__)
    for name, choices in CHOICES.items():
        assert tuple(options[name]["enum"]) == choices
    assert tuple(SCHEMA["$defs"]["region"]["enum"]) == get_args(Region)
    assert f"at most {backbone.KEPT_EDGES} into" in SCHEMA["properties"]["edges"]["description"]
    steps = SCHEMA["properties"]["steps"]["properties"]
    assert f"more than {backbone.MAX_STEPS}" in steps["steps"]["description"]
    assert (
        f"than {document.ALL_STEPS} steps, the {document.STEP_EDGES} strongest"
        in (steps["edges"]["description"])
    )


def test_the_fields_of_tokens_agree_with_the_flow(trace):
    found = trace.to_dict()
    edges, tokens = trace.flow.edge_flow(), found["tokens"]
    for name in ("injected", "absorbed"):
        assert sum(token[name] for token in tokens) == pytest.approx(1)
    for index, token in enumerate(tokens):
        inflow = edges[index].sum() + token["injected"]
        outflow = edges[:, index].sum() + token["absorbed"]
        assert token["throughput"] == pytest.approx(inflow, abs=1e-6)
        assert token["throughput"] == pytest.approx(outflow, abs=1e-6)
        step = found["steps"]["steps"][token["step"]]
        assert step["start"] <= index < step["stop"]
        for name in ("question", "answer", "target"):
            assert token[name] == getattr(trace.spans, name)[index]
        assert (token["answer"], token["question"]) == (
            token["region"] == "answer",
            token["region"] == "question",
        )
    for name in ("hub", "checkpoint"):
        for ranked in found[f"{name}s"]:
            assert tokens[ranked["index"]][name] == ranked["score"]
    assert sum(step["absorbed"] for step in found["steps"]["steps"]) == pytest.approx(1)
    assert found["package_version"] == ft.__version__


def test_its_edges_are_the_strongest_of_each_token():
    trace = make_trace(("<s>", *"abcdefghijklmnopqrstuvwxyz", "7", "."), prompt=13)
    flow = trace.flow.edge_flow()
    into = np.argsort(-flow, axis=1)[:, : backbone.KEPT_EDGES]
    out_of = np.argsort(-flow, axis=0)[: backbone.KEPT_EDGES]
    wanted = {(int(i), later) for later, row in enumerate(into) for i in row}
    wanted |= {(earlier, int(k)) for earlier, column in enumerate(out_of.T) for k in column}
    wanted = {(earlier, later) for earlier, later in wanted if flow[later, earlier] > 0}
    edges = trace.to_dict()["edges"]
    assert [(edge["source"], edge["target"]) for edge in edges] == sorted(wanted)
    for edge in edges:
        assert edge["flow"] == pytest.approx(flow[edge["target"], edge["source"]])


def test_documents_grow_with_the_text_and_not_with_its_square():
    texts = (("<s>", *("ab",) * count, "7", ".") for count in (99, 198))
    sizes = [len(make_trace(text, prompt=9).to_json()) for text in texts]
    assert sizes[1] < 2.5 * sizes[0]
