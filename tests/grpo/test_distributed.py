"""Several processes: replicas and shards stay one model, and every rank makes the same passes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.grpo.test_script import arguments, written
from tests.grpo.worker import METRICS

ROOT = Path(__file__).parents[2]
PASSES = ("training", "extra")
TRAINED = {"gradient_accumulation_steps": 2, "log_completions": True}
FAILING = {
    "flow": True,
    "fails": True,
    "flow_on_error": "uniform",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
}
RUNS = {
    **{name: {"flow": True, **TRAINED, "flow_pass": name} for name in PASSES},
    **{
        f"uniform {name}": {"flow": True, **TRAINED, "flow_pass": name, "flow_gamma": 1.0}
        for name in PASSES
    },
    "plain": {"flow": False, **TRAINED},
    "scoring": {"flow": True, **TRAINED, "num_iterations": 2},
    **{f"failing {name}": {**FAILING, "flow_pass": name} for name in PASSES},
}
SHARDINGS = pytest.mark.parametrize(
    "sharded",
    ["DDP", "FSDP2", pytest.param("ZeRO-3", marks=[pytest.mark.deepspeed, pytest.mark.slow])],
)


@pytest.fixture(scope="module")
def launched(policy, tmp_path_factory):
    """Launches two processes once for replicas and FSDP2, which share them, and once for ZeRO-3.

    It returns their output and, for each run by its name, each rank's report and parameters.
    """

    @cache
    def launch(zero):
        folder = tmp_path_factory.mktemp("ZeRO-3" if zero else "replicas")
        runs = {
            f"{sharded} {name}": {**options, "sharded": sharded}
            for sharded in (("ZeRO-3",) if zero else ("DDP", "FSDP2"))
            for name, options in RUNS.items()
        }
        rows = written(folder / "data.jsonl")
        script = {"script": arguments(policy, rows, folder, rewards=("flow",))}
        output = in_two_processes(
            policy, folder, runs if zero else {**runs, "script": script}, zero
        )
        return output, {
            name: [
                (
                    json.loads((folder / f"{name}-{rank}.json").read_text()),
                    torch.load(folder / f"{name}-{rank}.pt"),
                )
                for rank in (0, 1)
            ]
            for name in runs
        }

    return launch


def in_two_processes(policy, folder, runs, zero):
    """What the worker prints. `accelerate launch --cpu` would start one process silently."""
    python, chosen = sys.executable, {"ACCELERATE_USE_CPU": "true"}
    if zero:
        python = os.environ["FLOWTRACER_DEEPSPEED"]
        chosen = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {
        **os.environ,
        **chosen,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'adapters'}",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [*launch, str(ROOT / "tests/grpo/worker.py"), policy, str(folder), json.dumps(runs)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@SHARDINGS
def test_two_processes_train_one_model(launched, sharded):
    _, found = launched(sharded == "ZeRO-3")
    found = {name: found[f"{sharded} {name}"] for name in RUNS}
    for name, ((first, ours), (second, theirs)) in found.items():
        assert first["processes"] == second["processes"] == 2
        assert first["ZeRO-3"] is (sharded == "ZeRO-3")
        assert same(ours, theirs), name
        assert first["passes"] == second["passes"], name
        assert first["training"]
        assert second["training"]
    for name in PASSES:
        (first, _), (second, _) = found[name]
        for one, other in zip(first["log"], second["log"], strict=True):
            assert one["flow/answer_found"] == 0.5
            assert all(one[f"flow/{metric}"] == other[f"flow/{metric}"] for metric in METRICS)
    plain, parameters = found["plain"][0]
    for name in PASSES:
        uniform, ended = found[f"uniform {name}"][0]
        assert same(ended, parameters)
        assert uniform["random"] == plain["random"]
    assert not same(found["training"][0][1], parameters)
    # The training pass is read, so that only the self-check makes passes of its own.
    check = 4
    assert len(found["training"][0][0]["passes"]) == len(plain["passes"]) + check
    assert len(found["extra"][0][0]["passes"]) > len(found["training"][0][0]["passes"])
    for one, other in pairwise(found[name][0][1] for name in PASSES):
        for name, part in one.items():
            torch.testing.assert_close(part, other[name], rtol=1e-4, atol=1e-5)


@SHARDINGS
def test_a_rank_that_fails_makes_the_passes_of_the_others(launched, sharded):
    _, found = launched(sharded == "ZeRO-3")
    for name in PASSES:
        for said, _ in found[f"{sharded} failing {name}"]:
            assert [step["flow/errors"] for step in said["log"]] == [1.0, 1.0]


def test_the_script_trains_one_model_in_two_processes(launched):
    output, _ = launched(False)
    (line,) = [line for line in output.splitlines() if line.startswith("wrote ")]
    saved = json.loads((Path(line.removeprefix("wrote ")) / "trainer_state.json").read_text())
    # Two processes of four completions each, two prompts in each.
    assert saved["log_history"][0]["num_tokens"] > 8 * 3
    assert "flow/seconds" in saved["log_history"][0]
