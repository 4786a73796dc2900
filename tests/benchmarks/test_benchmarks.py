"""The benchmarks: the page matches the results, ways give the same results, the harness measures.

These tests measure no speed.
"""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import (
    flow_stage,
    growth,
    harness,
    plots,
    rollout_batches,
    sparse_against_dense as sparse,
    tables,
)
from benchmarks.__main__ import ALL, PRETRAINED, _measurable, main as benchmarks_main
from benchmarks.graphs import ends, random_attention
from benchmarks.harness import MIB, Target, interleaved, peak_of
from examples.reasoner.problems import make_problems
from flowtracer_plugin.flow.scipy_arrays import SCIPY
from flowtracer_plugin.flow.torch_arrays import TORCH_CSR
from tests.flow import reference

MODULES = {name: tables.module_of(name) for name in ALL}
SMALLEST = {
    "trace_against_forward": [{"tokens": 24}],
    "flow_stage": [{"tokens": 48}],
    "sparse_against_dense": [
        {"library": "numpy", "tokens": 64, "density": 1.0},
        {"library": "numpy", "tokens": 64, "density": 0.03},
        {"library": "torch", "tokens": 64, "density": 0.1},
    ],
    "rollout_batches": [
        {"model": "random", "tokens": 16, "rollouts": 3},
        {"model": "tiny", "tokens": 16, "rollouts": 3},
        {"model": "reasoner", "tokens": 80, "rollouts": 3},
    ],
    "presets": [{"tokens": 32, "mode": "dense"}, {"tokens": 32, "mode": "streamed"}],
    "long_sequences": [{"model": "stories15M's shape", "tokens": 40}],
    "growth": [{"axis": "tokens", "tokens": 24, "batch": 2, "layers": 3, "hidden": 128}],
}
NEED_MODELS = set(PRETRAINED)  # see test_training.py
SMALL_CASES = [(name, case) for name, cases in SMALLEST.items() for case in cases]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder for results, plots and page."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(plots, "FOLDER", tmp_path / "plots")
    monkeypatch.setattr(tables, "PAGE", tmp_path / "README.md")
    return tmp_path


def row(case, ours, other, ratio, *, ours_name="sparse", other_name="dense"):
    """A row as the harness writes it, with the same ratio for both measures."""
    values = {ours_name: ours, other_name: other}
    ratios = {measure: {other_name: ratio} for measure in ("seconds", "peak_mb")}
    measures = {"seconds": dict(values), "peak_mb": dict(values)}
    return {"case": case, **measures, "samples": {}, "ratios": ratios}


def report(rows, ours="sparse"):
    machine = {"processor": "P", "cores": 2, "memory_gb": 8, "system": "Linux", "gpu": None}
    return {
        "question": "Which?",
        "ours": ours,
        "command": "python -m benchmarks some",
        "machine": machine,
        "versions": {"torch": "2"},
        "rounds": 5,
        "rows": rows,
    }


# The page


def test_the_page_is_what_the_results_say():
    page = tables.PAGE.read_text(encoding="utf-8")
    assert page == tables.page(ALL), "run `python -m benchmarks --tables`"


def test_the_plots_are_what_the_results_say(tmp_path):
    found = {}
    for name, module in MODULES.items():
        measured = tables.read(name)
        if measured is not None and hasattr(module, "plots"):
            found |= module.plots(measured)
    kept = Path(plots.__file__).parent / "plots"
    assert {path.stem for path in kept.glob("*")} == set(found)
    for title, figure in found.items():
        drawn = plots.write(figure, title, tmp_path).read_bytes()
        assert drawn == (kept / f"{title}.svg").read_bytes(), title
        assert len(drawn) < 60_000


def test_every_result_is_on_the_page():
    page = tables.PAGE.read_text(encoding="utf-8")
    for path in harness.RESULTS.glob("*.json"):
        assert f"## {path.stem}\n" in page or f"](results/{path.name})" in page


def test_a_table_has_a_row_per_case_and_empty_cells_for_ways_left_out():
    rows = [row({"tokens": 8}, 0.01234, 0.5, 0.025), row({"tokens": 16}, 2.0, 40.0, 0.05)]
    rows[1]["seconds"]["slow"], rows[1]["peak_mb"]["slow"] = 1.0, 0.2
    rows[1]["ratios"]["seconds"]["slow"] = 2.0
    assert tables.table(report(rows)).splitlines() == [
        "| tokens | sparse | dense | slow | sparse : dense | sparse : slow |",
        "| --: | --: | --: | --: | --: | --: |",
        "| 8 | 12.3 ms, 0.0 MB | 500 ms, 0.5 MB |  | 0.025, 0.025 |  |",
        "| 16 | 2 s, 2.0 MB | 40 s, 40 MB | 1 s, 0.2 MB | 0.050, 0.050 | 2.0, – |",
    ]


@pytest.mark.parametrize(
    ("ratio", "where", "said"),
    [
        (0.5, {"tokens": 8}, "sparse : dense, seconds, 8 tokens: target ≤ 0.50: reached 0.21"),
        (0.5, None, "sparse : dense, seconds: target ≤ 0.50: **not reached**: 0.70"),
        (0.7, None, "sparse : dense, seconds: target ≤ 0.70: reached 0.70"),
        (0.5, {"tokens": 9}, "sparse : dense, seconds, 9 tokens: target ≤ 0.50: not measured"),
    ],
)
def test_a_target_is_reached_or_not_in_its_worst_case(ratio, where, said):
    rows = [row({"tokens": 8}, 1, 1, 0.21), row({"tokens": 16}, 1, 1, 0.7)]
    target = Target(other="dense", measure="seconds", ratio=ratio, where=where)
    assert tables.verdict(target, report(rows)) == said


def test_the_page_says_what_was_not_measured(elsewhere):
    page = tables.page(ALL)
    assert page.count("Not measured yet.") == len(ALL)
    assert "## Elsewhere" not in page


def test_other_results_are_named(elsewhere):
    (elsewhere / "other.json").write_text(json.dumps({"question": "Who else?", "runs": {}}))
    assert "- Who else?: [other.json](results/other.json)\n" in tables.page(ALL)


def test_the_method_says_what_the_knock_outs_with_causal_say():
    """The second table of `docs/method.md`, and README's range over one hop."""
    root = Path(harness.__file__).parents[1]
    text = (root / "docs/method.md").read_text(encoding="utf-8")
    record = json.loads((harness.RESULTS / "knock_outs_held_out.json").read_text())
    named = record["with_causal"]["settings"]
    settings = list(named.values())

    def cell(one, score):
        drop, over = one["scores"][score]["drop"], one["scores"][score].get("over_flow")
        differs = f", {over['mean']:+.2f} ± {over['error']:.2f}" if over else ""
        return f"{drop['mean']:.2f}{differs}".replace("-", "−")

    for score in ("causal", "flow:causal", "reach:derivation", "reach:decided", "flow"):
        assert f"| `{score}` | {' | '.join(cell(one, score) for one in settings)} |\n" in text
    assert [one["measured"] for one in settings] == [
        int(count) for count in re.findall(r"\((\d+)\)", text.partition("has `causal`")[2][:300])
    ]
    later = record["with_causal_more"]["settings"]
    last, pooled = (
        later[name]["scores"]["causal"]["over_one_hop"]
        for name in ("smol-cut-last", "smol-cut-all")
    )
    for one in (last, pooled, *(one["scores"]["causal"]["over_one_hop"] for one in settings)):
        assert f"{one['mean']:+.2f} ± {one['error']:.2f}" in text
    assert f"by {settings[1]['scores']['causal']['over_one_hop']['median']:.2f} nats" in text
    ahead = [
        pooled["mean"] if name == "smol-cut" else one["scores"]["causal"]["over_one_hop"]["mean"]
        for name, one in named.items()
    ]
    said = f"is {min(ahead):.1f} to {max(ahead):.1f} nats ahead"
    assert said in (root / "README.md").read_text(encoding="utf-8")


def test_readme_says_what_a_trace_costs_next_to_a_forward_pass():
    text = (Path(harness.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    seconds = [one["seconds"] for one in tables.read("presets")["rows"]]
    ratios = [one["derivation"] / one["forward"] for one in seconds]
    assert f"takes {min(ratios):.1f} to {max(ratios):.1f} times as long as a plain" in text
    early = [one["paper"] / one["forward"] for one in seconds]
    assert f"which reads no late layers, {min(early):.1f} to {max(early):.1f} times" in text


# The protocol


def test_every_benchmark_has_a_smallest_case():
    counted = {"host_waits"}  # tests/device holds its budget
    assert set(SMALLEST) == set(ALL) - NEED_MODELS - counted


def test_without_models_those_that_need_them_are_left_out(monkeypatch, capsys):
    monkeypatch.delenv("FLOWTRACER_MODELS", raising=False)
    assert set(_measurable()) == set(ALL) - NEED_MODELS
    assert "data_sets, flashtrace, grpo_step: set FLOWTRACER_MODELS" in capsys.readouterr().out
    monkeypatch.setenv("FLOWTRACER_MODELS", "folder")
    assert _measurable() == list(ALL)


@pytest.mark.parametrize("name", ALL)
def test_a_benchmark_follows_the_protocol(name):
    module = MODULES[name]
    assert harness.question_of(module).endswith("?")
    assert module.CASES
    assert len({tuple(case.items()) for case in module.CASES}) == len(module.CASES)
    assert {target.measure for target in module.TARGETS} <= {"seconds", "peak_mb", "credit"}
    for target in module.TARGETS:
        assert any(target.concerns(case) for case in module.CASES), target


@pytest.mark.parametrize(("name", "case"), SMALL_CASES, ids=str)
def test_ways_run_agree_and_change_nothing(name, case):
    gradients, threads = torch.is_grad_enabled(), torch.get_num_threads()
    module = MODULES[name]
    ways = module.ways(**case)
    assert module.OURS in ways
    assert {target.other for target in module.TARGETS} <= set(ways)
    found = {way: call() for way, call in ways.items()}
    assert (torch.is_grad_enabled(), torch.get_num_threads()) == (gradients, threads)
    if name in AGREEMENTS:
        AGREEMENTS[name](found)


def sparse_and_dense_agree(found):
    dense = np.asarray(found["dense"])
    np.testing.assert_allclose(np.asarray(found["sparse"]), dense, atol=1e-5)
    assert dense.any()


def rollouts_agree_in_a_batch_and_alone(found):
    batch, alone = found["batch"], found["one_by_one"]
    assert batch.found.all()
    torch.testing.assert_close(batch.throughput, alone.throughput, atol=1e-5, rtol=0)


AGREEMENTS = {
    "sparse_against_dense": sparse_and_dense_agree,
    "rollout_batches": rollouts_agree_in_a_batch_and_alone,
}


def test_ways_through_the_flow_agree():
    ways = flow_stage.ways(tokens=48)
    wanted = reference.flow(random_attention(48), *ends(48))["throughput"]
    for name in ("flow", "flow_numpy", "numpy_sweep", "conditioned_sweep"):
        np.testing.assert_allclose(ways[name](), wanted, atol=1e-5, err_msg=name)
    scipy, networkx = ways["scipy_max_flow"]().flow_value, ways["networkx_max_flow"]()[0]
    assert scipy / flow_stage.MILLION == pytest.approx(networkx, abs=1e-3)
    assert ways["rollout"]().sum(1) == pytest.approx(np.ones(48), abs=1e-5)


def test_longer_texts_leave_out_slow_ways(monkeypatch):
    monkeypatch.setattr(flow_stage, "random_attention", lambda *_, **__: np.zeros((1, 1), "f4"))
    assert not {"rollout", "scipy_max_flow", "networkx_max_flow"} & set(
        flow_stage.ways(tokens=8192)
    )


def test_the_reasoner_gets_its_own_stories_padded_as_in_training():
    _, tokenizer, rows = rollout_batches._reasoner(80, 3)
    prompts, completions, *masks = (part.cpu() for part in rows)
    assert {part.shape for part in (prompts, completions, *masks)} == {(3, 40)}
    for row, problem in enumerate(make_problems(3, seed=0)):
        asked, said = prompts[row][masks[0][row] > 0], completions[row][masks[1][row] > 0]
        assert asked.tolist() == tokenizer(problem.prompt)["input_ids"]
        assert tokenizer.decode(said) == problem.response
        assert masks[0][row].diff().min() == 0  # padded left
        assert masks[1][row].diff().max() == 0


def test_random_attention_is_causal_and_has_the_density():
    for density in (1.0, 0.1):
        attention = random_attention(200, density=density)
        assert attention.dtype == np.float32
        assert attention.sum(1) == pytest.approx(np.ones(200), abs=1e-5)
        assert not np.triu(attention, 1).any()
        edges = np.count_nonzero(np.tril(attention, -1))
        assert edges / (200 * 199 / 2) == pytest.approx(density, abs=0.01)


@pytest.mark.parametrize(
    ("ratios", "found"),
    [
        ({1.0: 10.0, 0.1: 1.0, 0.01: 0.1}, 0.1),
        ({1.0: 100.0, 0.01: 0.01}, 0.1),
        ({1.0: 10.0, 0.1: 0.5, 0.01: 1.5, 0.001: 0.5}, 0.001 * 10 ** (np.log(2) / np.log(3))),
        ({1.0: 3.0, 0.1: 2.0}, None),
        ({1.0: 0.5, 0.1: 0.2}, 1.0),
    ],
)
def test_the_crossover_lies_where_the_ratio_is_one(ratios, found):
    assert sparse.crossover(ratios) == (found if found is None else pytest.approx(found))


def test_remarks_name_every_crossover():
    rows = [
        row(
            {"library": library, "tokens": tokens, "density": density},
            1,
            1,
            ratio,
            other_name="made_dense",
        )
        for library, tokens, ratios in (
            ("torch", 64, (4.0, 2.0)),
            ("numpy", 64, (10.0, 0.1)),
            ("numpy", 8, (0.5, 0.1)),
        )
        for density, ratio in zip((1.0, 0.01), ratios, strict=True)
    ]
    assert sparse.remarks(rows) == [
        "numpy, 8 tokens: crossover at 1: sparse is faster at every density",
        "numpy, 64 tokens: crossover at a density of 0.1",
        "torch, 64 tokens: crossover below 0.01, the sparsest graph measured",
    ]


def test_the_crossover_of_backends_is_within_the_measured_ones():
    rows = json.loads((harness.RESULTS / "sparse_against_dense.json").read_text())["rows"]
    for library, backend in (("numpy", SCIPY), ("torch", TORCH_CSR)):
        curves = [curve for name, _, curve in sparse.curves(rows) if name == library]
        found = [crossing for crossing in map(sparse.crossover, curves) if crossing is not None]
        assert min(found) <= backend.crossover <= max(found)


# Growth


def grown(power, axis="tokens"):
    return [
        row(
            {"axis": axis, axis: size},
            size**power,
            3.0,
            1.0,
            ours_name="trace",
            other_name="forward",
        )
        for size in (1, 2, 4, 8, 16)
    ]


@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_the_exponent_is_that_of_the_power(power):
    found = growth.exponents([*grown(power), *grown(3, "batch")])
    assert found["tokens"]["seconds"] == {"trace": power, "forward": 0.0}
    assert found["batch"]["peak_mb"]["trace"] == 3


def test_the_exponent_is_that_of_the_larger_half():
    assert growth.exponent({1: 9.0, 2: 9.0, 4: 4.0, 8: 8.0, 16: 16.0, 32: 32.0}) == 1
    assert growth.exponent({1: 1.0, 2: 2.0}) is None
    assert growth.exponent({1: 0.0, 2: 0.0, 4: 1.0}) is None


def test_growth_varies_one_axis_at_a_time():
    for case in growth.CASES:
        given = {name for name in growth.BASE if case[name] != growth.BASE[name]}
        assert given <= {case["axis"], "tokens"}


@pytest.mark.parametrize("hidden", [128, 256, 512, 768])
def test_models_of_other_widths_keep_their_proportions(hidden):
    config = growth.sized(hidden)
    assert config.hidden_size == hidden
    assert hidden / config.num_attention_heads == config.head_dim == 64
    assert config.num_attention_heads == 2 * config.num_key_value_heads


# The harness


def test_ways_take_turns():
    seen = []
    samples = interleaved({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 3)
    assert seen == ["a", "b"] * 4
    assert {name: len(times) for name, times in samples.items()} == {"a": 3, "b": 3}
    assert all(time >= 0 for times in samples.values() for time in times)


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is read from /proc")
def test_a_peak_is_what_was_allocated():
    assert 60 < peak_of(lambda: np.ones(64 * MIB, np.uint8)) < 80
    assert peak_of(lambda: None) < 10


def test_a_target_concerns_some_cases():
    everywhere = Target(other="b", measure="seconds", ratio=1)
    long = Target(other="b", measure="seconds", ratio=1, where={"tokens": 2})
    assert everywhere.concerns({"tokens": 1})
    assert [long.concerns({"tokens": tokens, "batch": 1}) for tokens in (1, 2)] == [False, True]
    assert not long.concerns({"batch": 1})


SLEEPER = """
import os, time

OURS, CASES = "long", [{"size": 1}, {"size": 64}]

def ways(*, size):
    assert os.environ["OMP_NUM_THREADS"] == "1"
    found = {"long": lambda: (time.sleep(0.02), b"1" * (size << 20)), "short": lambda: None}
    return found | ({"other": lambda: None} if size == 1 else {})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is read from /proc")
def test_a_run_measures_in_children_and_writes_what_it_found(elsewhere, monkeypatch):
    (elsewhere / "sleeper.py").write_text(SLEEPER)
    monkeypatch.syspath_prepend(elsewhere)
    monkeypatch.setenv("PYTHONPATH", str(elsewhere))
    path = harness.run(importlib.import_module("sleeper"), rounds=2)
    written = json.loads(path.read_text(encoding="utf-8"))
    assert path == elsewhere / "sleeper.json"
    assert written["command"] == "python -m benchmarks sleeper"
    assert written["machine"]["cores"]
    assert written["versions"]["torch"] == torch.__version__
    assert [row["case"] for row in written["rows"]] == [{"size": 1}, {"size": 64}]
    assert [list(row["seconds"]) for row in written["rows"]] == [
        ["long", "short", "other"],
        ["long", "short"],
    ]
    for row in written["rows"]:
        assert all(len(times) == 2 for times in row["samples"].values())
        assert row["seconds"]["long"] == pytest.approx(np.median(row["samples"]["long"]))
        ratio = row["seconds"]["long"] / row["seconds"]["short"]
        assert row["ratios"]["seconds"]["short"] == pytest.approx(ratio, abs=1e-3)
        assert row["ratios"]["peak_mb"] == {}
    assert 60 < written["rows"][1]["peak_mb"]["long"] < 80


def test_ratios_leave_out_memory_too_small_to_measure():
    case, samples = {"tokens": 1}, {"ours": [2.0], "other": [4.0], "third": [1.0]}
    found = harness._row("ours", case, samples, {"ours": 9.0, "other": 0.1, "third": 3.0})
    assert found["ratios"] == {"seconds": {"other": 0.5, "third": 2.0}, "peak_mb": {"third": 3.0}}
    absent = harness._row("ours", case, {"other": [4.0]}, {"other": 9.0})
    assert absent["ratios"] == {"seconds": {}, "peak_mb": {}}


def test_an_unknown_name_is_refused_with_the_known_ones(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "flow_stage", "nothing"])
    with pytest.raises(SystemExit) as raised:
        benchmarks_main()
    assert raised.value.code == 2
    assert f"no benchmark nothing; there are {', '.join(ALL)}" in capsys.readouterr().err


def test_tables_alone_measure_nothing(elsewhere, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--tables"])
    monkeypatch.setattr(subprocess, "run", None)
    benchmarks_main()
    assert [path.name for path in elsewhere.iterdir()] == ["README.md"]
