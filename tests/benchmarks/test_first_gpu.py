"""The command for a first GPU: it goes on where it stopped, and its steps run on a CPU as well."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import first_gpu, gpu_parts
from benchmarks.first_gpu import run, table
from benchmarks.gpu_parts import FULL, PARTS, REHEARSAL
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
