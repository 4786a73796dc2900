"""The two backends: what each of them can read and the other cannot, and how they share models."""

from __future__ import annotations

import compileall
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import flowtracer_adapters
import flowtracer_plugin
from flowtracer_plugin.attention import AdapterMismatchError, UnsupportedArchitectureError
from flowtracer_plugin.reading.reader import AttentionReader
from tests.attention.reference_attention import eager_head_mean
from tests.families import redrawn, tiny_model
from tests.reading.comparison import SOME_LAYERS, Misreader, assert_close, eager_twin, prompt

ROOT = Path(__file__).parents[2]
BLOOM = {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 128}


@pytest.fixture(autouse=True)
def _table_as_it_was():
    before = dict(ALL_ATTENTION_FUNCTIONS)
    yield
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


def test_the_interface_backend_leaves_no_nnsight_in_the_model():
    model = tiny_model("llama")
    AttentionReader(model, backend="interface").verify()
    assert model.config._attn_implementation == "sdpa"
    assert not any("__nnsight__" in vars(module) for module in model.modules())


def test_models_of_two_implementations_are_read_side_by_side():
    ids, mask = prompt("left")
    wanted = AttentionReader(tiny_model("llama")).read(ids, mask, SOME_LAYERS)
    for model in (tiny_model("llama"), eager_twin("llama")):
        found = AttentionReader(model, backend="interface").read(ids, mask, SOME_LAYERS)
        assert_close(found, wanted)


def test_threads_read_one_model_at_the_same_time_while_others_run_it():
    model = tiny_model("gpt_oss").train()
    reader = AttentionReader(model, backend="interface")
    (ids, mask), errors = prompt("left"), []
    wanted = reader.read(ids, mask, SOME_LAYERS)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask.long()).logits

    def work(number: int) -> None:
        for _ in range(8):
            if number % 2:
                found = reader.read(ids, mask, SOME_LAYERS)
                errors.extend([] if torch.equal(found, wanted) else [number])
            else:
                with torch.no_grad():
                    plain = model(input_ids=ids, attention_mask=mask.long()).logits
                errors.extend([] if torch.equal(plain, logits) else [number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(module.training for module in model.modules())


def test_an_error_in_an_adapter_puts_the_table_back():
    def fail(call):
        raise ZeroDivisionError

    model, adapter = tiny_model("llama"), Misreader(fail)
    with pytest.raises(ZeroDivisionError):
        AttentionReader(model, adapter, backend="interface").read(*prompt(), SOME_LAYERS)


def test_a_users_own_entry_in_the_table_is_called_and_kept():
    called = []

    def mine(*args, **kwargs):
        called.append(args[0].layer_idx)
        return original(*args, **kwargs)

    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = mine
    try:
        AttentionReader(tiny_model("llama"), backend="interface").read(*prompt(), SOME_LAYERS)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine
        assert called == [0, 1, 2, 3]
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_a_module_that_makes_no_call_is_named():
    model = tiny_model("llama")
    reader = AttentionReader(model, backend="interface")
    model.model.layers[3].self_attn.forward = lambda *_, **__: (torch.zeros(2, 24, 64), None)
    with pytest.raises(AdapterMismatchError, match=r"layers\.3\.self_attn, visit 0, which makes"):
        reader.read(*prompt(), range(6))


def test_models_that_attend_in_their_own_code_need_nnsight():
    model = redrawn(AutoConfig.for_model("bloom", **BLOOM))
    with pytest.raises(UnsupportedArchitectureError, match="leave backend= out"):
        AttentionReader(model, backend="interface")
    AttentionReader(model, backend="nnsight").verify()


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend must be one of nnsight, interface, got 'vllm'"):
        AttentionReader(tiny_model("llama"), backend="vllm")


def test_wrap_selects_the_backend_and_pickling_keeps_it():
    tracer = flowtracer_plugin.wrap(tiny_model("llama"), backend="interface", preset="paper")
    rebuild, parts = tracer.__reduce__()
    assert rebuild(*parts).reader.backend.name == "interface"


SOURCELESS = """
import torch
import flowtracer_plugin as ft
from tests.families import tiny_model

model, ids = tiny_model("llama"), torch.arange(9)[None]
print(ft.__file__, float(ft.wrap(model, backend="interface").attention(ids).sum()))
try:
    ft.wrap(model).attention(ids)
except ft.UnsupportedArchitectureError as error:
    print(error)
"""


def test_a_build_without_source_is_read_through_the_interface(tmp_path):
    for package in (flowtracer_plugin, flowtracer_adapters):
        folder = Path(package.__file__).parent
        compiled = tmp_path / folder.name
        shutil.copytree(folder, compiled)
        compileall.compile_dir(compiled, quiet=1, legacy=True)
        for source in compiled.rglob("*.py"):
            source.unlink()
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-P", "-c", SOURCELESS],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(tmp_path) in run.stdout
    assert "9.0" in run.stdout
    assert 'wrap(..., backend="interface") needs none' in run.stdout


@pytest.mark.slow
def test_tensor_parallel_models_give_the_mean_over_all_heads(tmp_path):
    for family in ("llama", "qwen3"):
        tiny_model(family).save_pretrained(tmp_path / family)
    worker = str(Path(__file__).with_name("tensor_parallel_worker.py"))
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         worker, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    ids, mask = prompt("left")
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for family in ("llama", "qwen3"):
            wanted = eager_head_mean(eager_twin(family), ids, mask, SOME_LAYERS)
            assert_close(found[family], wanted)
        assert "nnsight cannot read a tensor parallel model" in found["refused"]
