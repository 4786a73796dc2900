"""Free memory: limits of containers and processes count, on the host and on a GPU."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from flowtracer_plugin.model import free_memory as module
from flowtracer_plugin.model.free_memory import free_memory

LIMITS = {
    2: ("", "0::/job/step\n", "memory.max", "memory.current", ""),
    1: (
        "memory/",
        "4:cpu,memory:/job/step\n",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_",
    ),
}


@pytest.mark.parametrize("version", LIMITS)
@pytest.mark.parametrize("inside", ["", "job/", "job/step/"])
def test_a_container_has_as_much_as_its_limits_leave(tmp_path, monkeypatch, version, inside):
    folder, line, limit, usage, prefix = LIMITS[version]
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9))
    host = torch.device("cpu")
    assert free_memory(host) == 10**9  # no control group
    group = tmp_path / "sys/fs/cgroup" / folder / inside
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"7:devices:/\n{line}")
    assert free_memory(host) == 10**9
    (group / usage).write_text("700\n")
    (group / limit).write_text("1000\n")
    assert free_memory(host) == 300
    # files that the system keeps at hand are given back when memory is needed
    files = f"anon 600\n{prefix}inactive_file 60\n{prefix}active_file 5\n"
    (group / "memory.stat").write_text(files)
    assert free_memory(host) == 365
    (group / limit).write_text("500\n")
    assert free_memory(host) == 0
    (group / limit).write_text("max\n")
    assert free_memory(host) == 10**9


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no ulimit")
def test_the_limits_of_the_process_count():
    code = """
import resource, psutil, torch
from flowtracer_plugin.model.free_memory import free_memory

taken = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**28, resource.RLIM_INFINITY))
print(free_memory(torch.device("cpu")))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**27 < int(ran.stdout) <= 2**28


def test_this_machine_has_some_memory():
    assert 10**6 < free_memory(torch.device("cpu")) < 10**14


@pytest.mark.cuda
def test_a_gpu_counts_what_torch_holds_in_reserve():
    device = torch.device("cuda")
    block = torch.zeros(2**28, device=device)
    before = free_memory(device)
    del block
    assert free_memory(device) - before == pytest.approx(2**30, rel=0.05)
