"""Every path gives the same numbers on a device as on the host."""

import pytest
import torch

from tests.device.paths import PATHS, same
from tests.device.simulated import DEVICE, on_host, placed, simulated
from tests.device.training import Steps

pytestmark = [
    pytest.mark.usefixtures("unchecked"),  # what is checked in all other tests takes long here
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]


def unmoved(value):
    return value


@pytest.mark.parametrize("name", PATHS)
def test_a_path_gives_the_numbers_of_the_host(name):
    wanted = PATHS[name](unmoved)
    with simulated():
        found = PATHS[name](placed)
    # The noise of `oar` moves answers so little that rounding shows.
    same(on_host(found), wanted, 1e-2 if name == "every scorer" else 1e-4)


def test_results_stay_on_the_device():
    with simulated():
        found = PATHS["rollouts paper"](placed)
        assert {one.device for one in found} == {DEVICE}
        assert PATHS["solve dense"](placed)[0].device == DEVICE
        assert PATHS["credit by flow"](placed).device == DEVICE


@pytest.mark.parametrize(
    "options",
    [
        {"flow_pass": "training"},
        {"flow_pass": "scoring", "num_iterations": 2},
        {"flow_pass": "extra"},
        {"flow_pass": "training", "flow_scorer": "flow:derivation"},
    ],
)
def test_a_step_of_grpo_gives_the_numbers_of_the_host(options, tmp_path, monkeypatch):
    wanted = Steps(tmp_path, unmoved, **options)()
    assert len(wanted["weights"].unique()) == 2
    with simulated():
        steps = Steps(tmp_path, placed, **options)
        monkeypatch.setattr(type(steps.trainer.accelerator), "device", DEVICE)
        found = steps()
    for name, value in wanted.items():
        same(on_host(found[name]), value)
        assert torch.isfinite(value).all()
