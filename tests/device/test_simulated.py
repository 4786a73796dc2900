"""The simulated device keeps CUDA's rules, and finds the faults that are planted in the package."""

import re
from functools import partial

import numpy as np
import pytest
import torch

from flowtracer_plugin.attention import head_mean
from flowtracer_plugin.credit import weights
from flowtracer_plugin.flow import streamed, torch_arrays
from flowtracer_plugin.model import padding
from flowtracer_plugin.trace import rollouts, solver
from tests.device import paths
from tests.device.simulated import DEVICE, NAME, on_host, placed, simulated

pytestmark = pytest.mark.usefixtures("unchecked")  # as all other tests are checked, this takes long

HERE = torch.arange(6.0).view(2, 3)


# --- the rules of a device ---


def test_operations_stay_on_the_device_and_give_the_numbers_of_the_host():
    with simulated() as waits:
        there = placed(HERE)
        for found, wanted in (
            (there * 2 + 1, HERE * 2 + 1),
            (there @ there.mT, HERE @ HERE.mT),
            (there[:, 1:].sum(0), HERE[:, 1:].sum(0)),
            (torch.zeros(2, device=DEVICE), torch.zeros(2)),
            (there.new_ones(2), torch.ones(2)),
            (there.where(there > 2, 0.0), HERE.where(HERE > 2, 0.0)),
        ):
            assert found.device == DEVICE
            assert torch.equal(on_host(found), wanted)
        there[:, 0] = 7  # also through a view
        assert on_host(there)[:, 0].tolist() == [7, 7]
    assert waits == []


def test_gradients_run_on_the_device():
    with simulated():
        there = placed(HERE).requires_grad_()
        (gradient,) = torch.autograd.grad((there**2).sum(), there)
        assert gradient.device == DEVICE
    assert torch.equal(on_host(gradient), 2 * HERE)


@pytest.mark.parametrize(
    "work",
    [
        lambda there: there + HERE,
        lambda there: HERE.add_(there),
        lambda there: torch.cat([there, HERE]),
        lambda there: there.masked_fill(HERE > 2, 0.0),
        lambda there: HERE @ there.mT,
    ],
)
def test_tensors_of_two_devices_do_not_mix(work):
    with simulated(), pytest.raises(RuntimeError, match="at least two devices, sim:0 and cpu"):
        work(placed(HERE))


def test_an_index_on_the_device_is_refused_by_the_host():
    with simulated(), pytest.raises(RuntimeError, match="indices should be either on cpu"):
        HERE[placed(torch.tensor([0]))]


def test_numpy_does_not_read_the_device():
    there = placed(HERE)
    with pytest.raises(TypeError, match=re.escape("Use Tensor.cpu()")):
        np.asarray(there)


@pytest.mark.parametrize(
    ("why", "work"),
    [
        ("reads a number", lambda there: float(there.sum())),
        ("reads a number", lambda there: bool((there > 0).any())),
        ("tolist", lambda there: there.tolist()),
        ("nonzero", lambda there: there.nonzero()),
        ("equal", lambda there: torch.equal(there, there)),
        ("masked_select", lambda there: there.masked_select(there > 2)),
        ("unique", lambda there: torch.unique(there)),
        ("bincount", lambda there: torch.bincount(there.long().flatten())),
        ("index of booleans", lambda there: there[there > 2]),
        ("index from the host", lambda there: there[:, torch.tensor([0, 2])]),
        ("copy to the device", lambda there: there[:, [0, 2]]),
        ("repeat_interleave", lambda there: there[0].repeat_interleave(there[0].long())),
        ("copy to the host", lambda there: there.cpu()),
        ("copy to the host", lambda there: torch.zeros(2, 3).copy_(there)),
        ("copy to the device", lambda _: torch.tensor([1.0, 2.0], device=DEVICE)),
        ("copy to the device", lambda _: HERE.to(DEVICE)),
    ],
)
def test_what_the_host_waits_for_is_logged(why, work):
    there = placed(HERE)
    with simulated() as waits:
        work(there)
    assert why in [wait.why for wait in waits]


@pytest.mark.parametrize(
    "work",
    [
        lambda there: there.sum() * 2,
        lambda there: there * torch.tensor(2.0),  # a number without an axis
        lambda there: there[:, placed(torch.tensor([0, 2]))],
        lambda there: there[0].repeat_interleave(there[0].long(), output_size=3),
        lambda there: there.topk(2),
        lambda there: there.sort(stable=True),
        lambda _: HERE.to(DEVICE, non_blocking=True),
        lambda _: torch.arange(3, device=DEVICE),
    ],
)
def test_what_needs_no_wait_is_not_logged(work):
    there = placed(HERE)
    with simulated() as waits:
        work(there)
    assert waits == []


def test_a_wait_has_the_line_that_asked_for_it():
    attention = placed(paths.graph("dense")[0])
    with simulated() as waits:
        torch_arrays.extremes(attention)[0].item()  # asked for by this test, not by the package
        rollouts.to_host(
            placed(torch.ones(1, 3, dtype=torch.long)), placed(torch.ones(1, 3).bool())
        )
    theirs, ours = waits
    assert theirs.place == ""
    assert re.fullmatch(r"trace/rollouts\.py:\d+", ours.place)


def test_nobody_else_sees_the_device():
    assert not torch.accelerator.is_available()
    assert not getattr(torch, NAME).is_available()
    with pytest.raises(RuntimeError):
        torch.zeros(1, device=NAME)  # outside the context


# --- planted faults ---


def on_the_host(real, *given, **more):
    """What a function returns, made on the host by mistake."""
    return on_host(real(*given, **more))


FAULTS = [
    (head_mean, "_later", "trace paper"),
    (rollouts, "moved_back", "rollouts streamed"),
    (rollouts, "sent", "rollouts paper"),
    (streamed, "_numbers", "streamed paper"),
    (streamed, "into_sink", "streamed paper"),
    (weights, "_beside", "token credit"),
]
"""Functions whose results a mistake could leave on the host, and a path that calls each."""


@pytest.mark.parametrize(("module", "name", "path"), FAULTS)
def test_a_tensor_that_was_left_on_the_host_is_found(monkeypatch, module, name, path):
    monkeypatch.setattr(module, name, partial(on_the_host, getattr(module, name)))
    with simulated(), pytest.raises((RuntimeError, ValueError), match=r"device|on cpu"):
        paths.PATHS[path](placed)


def blocking(_real, values, device):
    """A copy to the device for which the host waits."""
    return torch.as_tensor(values).to(device)


@pytest.mark.parametrize(
    ("module", "name", "fault", "path"),
    [
        (solver, "sent", blocking, "trace paper"),
        (padding, "_places", on_the_host, "rollouts streamed"),  # CUDA takes such an index
    ],
)
def test_a_fault_that_only_waits_is_found(monkeypatch, module, name, fault, path):
    with simulated():
        paths.PATHS[path](placed)  # the first run also checks the model
    found = []
    for changed in (getattr(module, name), partial(fault, getattr(module, name))):
        monkeypatch.setattr(module, name, changed)
        with simulated() as waits:
            paths.PATHS[path](placed)
        found.append(len(waits))
    assert found[1] > found[0]
