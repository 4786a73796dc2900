"""Every scorer in training: what it boosts, whichever pass is read."""

from __future__ import annotations

import pytest
import torch
from trl import GRPOTrainer

from flowtracer_plugin.credit.scorers import SCORERS
from flowtracer_plugin.grpo import FlowGRPOTrainer
from flowtracer_plugin.grpo.hooks import WEIGHTS
from tests.grpo.trained import TEXTS, logged, same_parameters, trained
from tests.grpo.worker import build, scripted

pytestmark = [pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")]

LONG = [f"{text} {text} {text}" for text in TEXTS]
"""FAI looks ten tokens ahead."""

NAMES = [name for name in SCORERS if name != "uniform"]
NAMES += ["flow:sharp", "flow:decided", "reach:derivation", "attention:decision", "flow*entropy"]
NAMES += ["attention:sharp*surprisal"]
PASSES = {"training": {}, "scoring": {"num_iterations": 2}, "extra": {"flow_pass": "extra"}}


@pytest.mark.parametrize("scorer", NAMES)
def test_every_scorer_boosts_some_tokens_and_the_same_in_every_pass(policy, tmp_path, scorer):
    oracle = {"flow_oracle": r"\w+"} if scorer == "oracle" else {}
    chosen = {}
    for name, options in PASSES.items():
        trainer, seen = trained(
            policy, tmp_path, flow_scorer=scorer, rollout_func=scripted(LONG), max_steps=1,
            **options, **oracle,
        )  # fmt: skip
        weights = chosen[name] = seen[0][WEIGHTS]
        assert weights.max() > 1
        assert weights.min() < 1 if scorer == "oar" else weights.min() == 1
        assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    # TRL's training pass computes entropies by other means, and ties may fall otherwise.
    for name in () if "entropy" in scorer else ("scoring", "extra"):
        torch.testing.assert_close(chosen[name], chosen["training"], rtol=0, atol=1e-6)


def test_uniform_is_plain_grpo(policy, tmp_path):
    ours, _ = trained(policy, tmp_path, flow_scorer="uniform")
    plain, _ = trained(policy, tmp_path, GRPOTrainer)
    assert same_parameters(ours, plain)


@pytest.mark.parametrize("scorer", ["uniform", "random", "entropy"])
def test_scorers_that_use_no_attention_read_none(policy, tmp_path, monkeypatch, scorer):
    trainer = build(FlowGRPOTrainer, policy, tmp_path, flow_scorer=scorer)

    def fail(*_, **__):
        raise AssertionError("attention was read")

    monkeypatch.setattr(trainer._flow_credit._scoring.tracer.reader, "listen", fail)
    monkeypatch.setattr(trainer._flow_credit._scoring.tracer.reader, "verify", fail)
    trainer.train()
    assert len(logged(trainer, "weight_mean")) == 2
