"""Several processes: replicas and shards stay one model, and every rank makes the same passes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.grpo.test_trainer import METRICS
from tests.grpo.worker import save_policy

ROOT = Path(__file__).parents[2]
FLOW, PLAIN = {"flow": True}, {"flow": False}
PASSES = ("training", "extra")
SHARDINGS = ["DDP", "FSDP2", pytest.param("ZeRO-3", marks=pytest.mark.deepspeed)]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


def launched(policy, folder, runs, sharded):
    """What each run says on each of two ranks, and the parameters it ends with.

    `accelerate launch --cpu` would start one process and say nothing.
    """
    python, chosen = sys.executable, {"ACCELERATE_USE_CPU": "true"}
    if sharded == "ZeRO-3":
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
    return [
        [
            (
                json.loads((folder / f"{run}-{rank}.json").read_text()),
                torch.load(folder / f"{run}-{rank}.pt"),
            )
            for rank in (0, 1)
        ]
        for run in range(len(runs))
    ]


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", SHARDINGS)
def test_two_processes_train_one_model(policy, tmp_path, sharded):
    shared = {"sharded": sharded, "gradient_accumulation_steps": 2, "log_completions": True}
    flows = [{**FLOW, **shared, "flow_pass": name} for name in PASSES]
    uniform = [{**run, "flow_gamma": 1.0} for run in flows]
    scoring = {**FLOW, **shared, "num_iterations": 2}
    runs = [*flows, *uniform, {**PLAIN, **shared}, scoring]
    found = launched(policy, tmp_path, runs, sharded)
    for (first, ours), (second, theirs) in found:
        assert first["processes"] == second["processes"] == 2
        assert first["ZeRO-3"] is (sharded == "ZeRO-3")
        assert same(ours, theirs)
        assert first["passes"] == second["passes"]
        assert first["training"]
        assert second["training"]
    flow = found[: len(flows)]
    for (first, _), (second, _) in flow:
        for one, other in zip(first["log"], second["log"], strict=True):
            assert one["flow/answer_found"] == 0.5
            assert {name: one[f"flow/{name}"] for name in METRICS} == {
                name: other[f"flow/{name}"] for name in METRICS
            }
    (*_, plain, _) = found
    for run in found[len(flows) : len(flows) * 2]:
        assert same(run[0][1], plain[0][1])
        assert run[0][0]["random"] == plain[0][0]["random"]
    assert not same(flow[0][0][1], plain[0][1])
    # The pass that trains is read, so there is none more: but for those of the self-check.
    check = 4
    counts = [len(run[0][0]["passes"]) for run in (*flow, plain)]
    assert counts[0] == counts[2] + check
    assert counts[1] > counts[0]
    for one, other in pairwise(run[0][1] for run in flow):
        for name, part in one.items():
            torch.testing.assert_close(part, other[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", SHARDINGS)
def test_a_rank_that_fails_makes_the_passes_of_the_others(policy, tmp_path, sharded):
    shared = {
        **FLOW,
        "sharded": sharded,
        "fails": True,
        "flow_on_error": "uniform",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    runs = [{**shared, "flow_pass": name} for name in PASSES]
    for (first, ours), (second, theirs) in launched(policy, tmp_path, runs, sharded):
        assert same(ours, theirs)
        assert first["passes"] == second["passes"]
        assert [step["flow/errors"] for step in first["log"]] == [1.0, 1.0]
        assert [step["flow/errors"] for step in second["log"]] == [1.0, 1.0]
