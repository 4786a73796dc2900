"""The command for a first GPU: it goes on where it stopped, and its steps run on a CPU as well."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import first_gpu, found_torch, gpu_parts
from benchmarks.first_gpu import run, table
from benchmarks.gpu_parts import FULL, PARTS, REHEARSAL
from benchmarks.harness import ROOT
from tests.conformance.test_dozen import DOZEN
from tests.families import CONFIGS

LONG = 3600


def counting(results):
    """Steps that return, or raise, what is given, and the names of those that ran."""
    ran = []

    def step(name, result):
        def work(left):
            assert 0 < left() <= LONG
            ran.append(name)
            if isinstance(result, BaseException):
                raise result
            return result

        return work

    return {"part": {name: step(name, result) for name, result in results.items()}}, ran


def test_it_goes_on_with_what_is_missing(tmp_path):
    out = tmp_path / "deep" / "first_gpu.json"
    end = subprocess.TimeoutExpired("pytest", 1)
    parts, ran = counting({"a": {"said": "one"}, "b": RuntimeError("two"), "c": end, "d": {}})
    run(parts, out, LONG)
    assert ran == ["a", "b", "c"]  # the time limit ended c
    kept = json.loads(out.read_text())["part"]
    assert kept["a"]["said"] == "one"
    assert kept["b"]["failed"] == "RuntimeError: two"
    assert set(kept) == {"a", "b"}

    parts, ran = counting({"a": {}, "b": {"said": "mended"}, "c": {"said": "three"}, "d": {}})
    run(parts, out, LONG)
    assert ran == ["c", "d"]
    found = run(parts, out, LONG, again=True)
    assert ran == ["c", "d", "b"]
    assert found == json.loads(out.read_text())
    assert found["part"]["b"]["said"] == "mended"
    assert found["part"]["a"]["said"] == "one"


def test_no_step_begins_at_the_end_of_the_time(tmp_path):
    parts, ran = counting({"a": {}})
    run(parts, tmp_path / "out.json", first_gpu.SHORTEST - 1)
    assert ran == []


def test_a_file_of_another_gpu_is_kept_as_it_is(tmp_path):
    out = tmp_path / "out.json"
    out.write_text('{"machine": {"gpu": "another"}}')
    parts, ran = counting({"a": {}})
    with pytest.raises(ValueError, match="holds results of another, and this machine has"):
        run(parts, out, LONG)
    assert ran == []
    assert out.read_text() == '{"machine": {"gpu": "another"}}'


def test_the_table_counts_steps_and_says_what_is_missing(tmp_path):
    parts, _ = counting({"a": {"said": "x | y"}, "b": ValueError("no\nmore"), "c": {}})
    waits = subprocess.TimeoutExpired("it", 1)
    parts["part"] |= counting({"d": waits})[0]["part"]
    lines = table(run(parts, tmp_path / "out.json", LONG), parts).splitlines()
    assert lines[0].startswith("missing here: ")
    assert "| part | 3 of 4 | 1 |" in lines
    assert "| part | a | said: x / y; seconds: 0.0 |" in lines
    assert "| part | b | failed: ValueError: no; seconds: 0.0 |" in lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["first_gpu"])
    with pytest.raises(SystemExit) as ended:
        first_gpu.main()
    assert ended.value.code == 1
    assert "wanted a CUDA device, found none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        ("2.6.0+cu124", True),
        ("2.7.0a0+7c8ec84dab.nv25.03", True),  # NVIDIA's containers hold such builds
        ("2.15.9", True),
        ("2.5.1+cu121", False),
        ("2.6.0a0+df5bbc09d1.nv24.12", False),
        ("2.16.0", False),
    ],
)
def test_a_cuda_torch_that_pip_would_replace_is_refused(found, kept):
    refusal = found_torch.refused(found, "12.4", ">=2.6,<2.16")
    assert (refusal is None) == kept
    if not kept:
        assert refusal.startswith(f"found torch {found} for CUDA 12.4, wanted torch>=2.6,<2.16, ")
        assert "run `make gpu PYTHON=" in refusal


def test_a_cuda_torch_is_looked_at_before_anything_is_installed(monkeypatch, capsys):
    monkeypatch.setattr(found_torch, "installed", lambda: ("2.7.1+cu128", "12.8"))
    found_torch.main()
    assert capsys.readouterr().out == "torch==2.7.1+cu128\n"
    monkeypatch.setattr(found_torch, "installed", lambda: ("1.13.1", "11.7"))
    with pytest.raises(SystemExit, match=r"^found torch 1\.13\.1 for CUDA 11\.7, wanted torch[<>]"):
        found_torch.main()
    monkeypatch.setattr(found_torch, "installed", lambda: ("1.13.1+cpu", None))
    found_torch.main()
    assert not capsys.readouterr().out
    steps = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\ngpu:")[2]
    assert -1 < steps.find("benchmarks.found_torch") < steps.find("pip install")


def test_the_torch_of_this_machine_is_found():
    assert found_torch.installed() == (torch.__version__, torch.version.cuda)
    assert found_torch.refused(torch.__version__, "any", found_torch.wanted()) is None


def test_the_full_size_asks_everything():
    steps = {name: part(FULL) for name, part in PARTS.items()}
    for type_ in {*DOZEN, *CONFIGS}:
        assert f"{type_}, default, nnsight" in steps["models"]
        assert f"{type_}, flash kernel, interface" in steps["models"]
    assert "131072 tokens, derivation" in steps["lengths"]
    assert any(name.startswith("growth, axis tokens") for name in steps["questions"])
    assert set(steps["training"]) == {"demo"}
    assert set(steps["tests"]) == {"gpu"}


@pytest.mark.parametrize("name", ["models", "lengths"])
def test_steps_run_where_there_is_no_gpu(name):
    steps = PARTS[name](REHEARSAL)
    found = {
        name: step(lambda: LONG)
        for name, step in steps.items()
        if "128" not in name and not name.endswith(("decided", "derivation"))
    }
    assert len(found) >= 2
    if name == "models":
        assert found["llama, flash kernel, nnsight"]["difference"] < 0.02
        assert found["bloom, flash kernel, nnsight"]["said"] == "refused: the type has no sdpa"
    else:
        assert all(one["run"] > 0 for one in found.values())


def test_what_a_command_says_is_kept_and_its_failure_too(tmp_path):
    said = gpu_parts._command([sys.executable, "-c", "print('fine')"], {}, lambda: LONG)
    assert said == {"said": "fine", "tail": ["fine"]}
    with pytest.raises(RuntimeError, match="wrong"):
        gpu_parts._command([sys.executable, "-c", "raise SystemExit('wrong')"], {}, lambda: LONG)
    with pytest.raises(subprocess.TimeoutExpired):
        gpu_parts._command([sys.executable, "-c", "import time; time.sleep(9)"], {}, lambda: 0.1)
