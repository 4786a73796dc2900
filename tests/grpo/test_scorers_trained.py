"""Every scorer in training: what it boosts, whichever pass is read."""

from __future__ import annotations

import pytest
import torch
from trl import GRPOTrainer

from flowtracer_plugin.credit import ScorerError, needs
from flowtracer_plugin.credit.scorers import SCORERS
from flowtracer_plugin.grpo import CreditOptions, FlowGRPOConfig, FlowGRPOTrainer
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


@needs("flow", "entropy", "tokens")
def unsure_flow(rollouts):
    """The product `flow*entropy`, written as one function."""
    start = rollouts.prompt_length
    shown = torch.tensor([[bool(piece) for piece in row[start:]] for row in rollouts.tokens])
    assert torch.equal(shown, rollouts.visible[:, start:])
    assert rollouts.reach is not None
    return rollouts.throughput[:, start:] * rollouts.entropies.clamp_min(0)


OWN = f"{__name__}:unsure_flow"


@pytest.mark.parametrize("options", [PASSES["training"], PASSES["extra"]], ids=["own", "extra"])
def test_an_own_function_trains_as_the_built_in_product(policy, tmp_path, options):
    own, product = (
        trained(
            policy, tmp_path, flow_scorer=name, rollout_func=scripted(LONG), max_steps=1, **options
        )[1][0][WEIGHTS]
        for name in (OWN, "flow*entropy")
    )
    assert own.max() > 1
    assert torch.equal(own, product)


def test_options_take_the_function_and_arguments_of_a_run_its_name(tmp_path, unchecked):
    assert CreditOptions(scorer=unsure_flow).chosen_scorer.name == OWN
    assert CreditOptions(scorer=unsure_flow, side="bottom").chosen_scorer.needs >= {"tokens"}
    with pytest.raises(ScorerError, match="flow credit: cannot import the scorer 'none:such'"):
        CreditOptions(scorer="none:such")
    with pytest.raises(TypeError, match=f"flow_scorer must be a name, such as '{OWN}'; or pass"):
        FlowGRPOConfig(str(tmp_path), flow_scorer=unsure_flow, use_cpu=True, bf16=False)
