"""Credit from the training pass, from TRL's scoring pass, and from an extra pass."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from trl import GRPOTrainer

from flowtracer_plugin.credit import choosing, read_rollouts
from flowtracer_plugin.grpo import FlowGRPOTrainer, attach_flow_credit, scoring
from flowtracer_plugin.grpo.hooks import ROWS, WEIGHTS
from flowtracer_plugin.reading import one_pass as reading
from flowtracer_plugin.reading.one_pass import ReadingSum
from tests.grpo.trained import (
    TEXTS,
    answering,
    forwards,
    logged,
    lora,
    name_of,
    same_parameters,
    trained,
    watched,
)
from tests.grpo.worker import WORDS, build, scripted, word_tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")]

SCORED: list[dict[str, Any]] = [
    {"num_iterations": 2},
    {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
    {"num_iterations": 2, "beta": 0.04},
]
"""Settings in which TRL scores the rollouts before it trains."""

UNSCORED: list[dict[str, Any]] = [
    {},
    {"beta": 0.04},
    {"gradient_accumulation_steps": 2},
    {"steps_per_generation": 2, "gradient_accumulation_steps": 4},
    {"gradient_checkpointing": False},
]
"""Settings in which TRL scores nothing before it trains."""


BEHIND = LoraConfig(r=4, target_modules=["o_proj"])
"""Adapters behind the attention, which without checkpoints leave the first layer's out of the
graph."""


# --- the three passes ---


@pytest.mark.parametrize("options", [*UNSCORED, *SCORED], ids=name_of)
def test_every_pass_gives_the_same_weights_and_the_same_training(policy, tmp_path, options):
    reference, wanted = trained(policy, tmp_path, flow_pass="extra", **options)
    named = {name_of(UNSCORED[0]): ["training"], name_of(SCORED[0]): ["scoring"]}
    for chosen in ("auto", *named.get(name_of(options), [])):
        trainer, seen = trained(policy, tmp_path, flow_pass=chosen, **options)
        assert len(seen) == len(wanted)
        for ours, theirs in zip(seen, wanted, strict=True):
            torch.testing.assert_close(ours[WEIGHTS], theirs[WEIGHTS], rtol=0, atol=1e-6)
        parameters = zip(trainer.model.parameters(), reference.model.parameters(), strict=True)
        for ours, theirs in parameters:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(
            logged(trainer, "answer_found"), logged(reference, "answer_found"), strict=True
        ):
            assert ours == pytest.approx(theirs)
    assert any(len(step[WEIGHTS].unique()) > 1 for step in wanted)


def test_the_weights_of_the_sampling_policy_are_kept_for_later_iterations(policy, tmp_path):
    _, seen = trained(
        policy, tmp_path, num_iterations=2, gradient_accumulation_steps=2, max_steps=4,
        flow_pass="training",
    )  # fmt: skip
    assert len(seen) == 8
    for first in (0, 1, 4, 5):
        assert torch.equal(seen[first]["completion_ids"], seen[first + 2]["completion_ids"])
        assert torch.equal(seen[first][WEIGHTS], seen[first + 2][WEIGHTS])
        assert torch.equal(seen[first]["advantages"], seen[first + 2]["advantages"])


# --- what it costs ---


def test_an_extra_pass_ends_after_the_last_layer_that_is_read(policy, tmp_path):
    shared = {"max_steps": 2, "rollout_func": scripted(TEXTS)}
    trainer = build(FlowGRPOTrainer, policy, tmp_path, flow_pass="extra", **shared)
    plain = build(GRPOTrainer, policy, tmp_path, **shared)
    trainer._flow_credit._scoring.tracer.reader.verify()
    passes, wanted = forwards(trainer), forwards(plain)
    heads: list[int] = []
    trainer.model.model.layers[4].register_forward_pre_hook(lambda *_: heads.append(1))
    others: list[int] = []
    plain.model.model.layers[4].register_forward_pre_hook(lambda *_: others.append(1))
    trainer.train()
    plain.train()
    assert len(passes) == len(wanted) + 2
    assert len(heads) == len(others)


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({"peft_config": lora(lora_dropout=0.5)}, ["graph"]),  # with checkpoints
        ({"gradient_checkpointing": False}, ["graph"]),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, ["own"]),
        ({"peft_config": BEHIND, "gradient_checkpointing": False}, ["own"]),
        ({"num_iterations": 2}, ["own"]),
    ],
    ids=["checkpoints, dropout", "no checkpoints", "reentrant", "frozen", "scored before"],
)
def test_influence_costs_a_backward_pass_and_changes_no_gradient(
    policy, tmp_path, monkeypatch, options, calls
):
    shared = {"rollout_func": scripted(TEXTS), "max_steps": 1, **options}
    ours = build(
        FlowGRPOTrainer, policy, tmp_path, flow_gamma=1.0, flow_scorer="flow:derivation", **shared
    )
    plain = build(GRPOTrainer, policy, tmp_path, **shared)
    ours._flow_credit._begin()  # the self-check
    passes, wanted = forwards(ours), forwards(plain)
    grad, made = torch.autograd.grad, []

    def counted(*given, **more):
        made.append("graph" if more.get("retain_graph") else "own")
        return grad(*given, **more)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    for trainer in (ours, plain):
        torch.manual_seed(0)
        trainer.train()
    assert made == calls
    assert len(passes) == len(wanted) + calls.count("own")
    assert same_parameters(ours, plain)
    assert logged(ours, "answer_found") == [1.0]
    assert logged(ours, "top_share")[0] > 0


@pytest.mark.parametrize("scorer", ["flow:decided", "reach:derivation"])
def test_weighed_edges_of_all_heads_keep_no_call(policy, tmp_path, monkeypatch, scorer):
    kept, real = [], ReadingSum.reading

    def counted(self, seen):
        found = real(self, seen)
        kept.append((len(found.calls), any(call.value is not None for call in found.calls)))
        return found

    monkeypatch.setattr(ReadingSum, "reading", counted)
    trained(policy, tmp_path, max_steps=1, flow_scorer=scorer, flow_pass="extra")
    trained(policy, tmp_path, max_steps=1, flow_scorer=scorer)
    # Influence is known only after the training pass, and heads are chosen after any pass.
    layers = {"flow:decided": (0, 0), "reach:derivation": (0, 6), "flow:sharp": (2, 2)}[scorer]
    assert [count for count, _ in kept] == list(layers)
    assert not any(values for _, values in kept)


# --- which pass ---


def test_the_error_about_a_missing_scoring_pass_names_the_remedy(policy, tmp_path):
    trainer = build(FlowGRPOTrainer, policy, tmp_path, flow_pass="scoring")
    with pytest.raises(ValueError, match=r"there is none .*set flow_pass='auto'"):
        trainer.train()
    trained(policy, tmp_path, flow_pass="auto")


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2}], ids=name_of)
def test_the_reference_adapters_pass_is_not_taken_for_the_policys(policy, tmp_path, options):
    """With PEFT both run the same model, one with its adapters and one without."""
    weights = {}
    for chosen in ("auto", "extra"):
        trainer = build(
            FlowGRPOTrainer, policy, tmp_path, peft_config=lora(), beta=0.04, flow_pass=chosen,
            max_steps=2, learning_rate=0.05, **options,
        )  # fmt: skip
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:  # starts at 0, where policy and reference are one
                    parameter.normal_(0, 1.0, generator=torch.Generator().manual_seed(3))
        seen = watched(trainer)
        trainer.train()
        weights[chosen] = [step[WEIGHTS] for step in seen]
    for ours, theirs in zip(*weights.values(), strict=True):
        assert torch.equal(ours, theirs)


def test_dropout_is_in_the_training_pass_and_not_in_an_extra_one(policy, tmp_path):
    options = {"peft_config": lora(lora_dropout=0.5), "max_steps": 4, "learning_rate": 0.05}
    weights = {}
    for chosen in ("training", "extra"):
        _, seen = trained(policy, tmp_path, flow_pass=chosen, **options)
        weights[chosen] = torch.cat([step[WEIGHTS].flatten() for step in seen])
    assert not torch.equal(weights["training"], weights["extra"])


def test_uniform_credit_is_plain_grpo_whatever_pass_is_read(policy, tmp_path):
    shared = {"peft_config": lora(lora_dropout=0.5), "beta": 0.04}
    plain, _ = trained(policy, tmp_path, GRPOTrainer, **shared)
    for chosen in ("training", "extra"):
        ours, _ = trained(policy, tmp_path, flow_gamma=1.0, flow_pass=chosen, **shared)
        assert same_parameters(ours, plain)
        assert sum(logged(ours, "answer_found")) > 0


def test_nnsight_reads_the_training_pass_too(tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(vocab_size=len(WORDS), hidden_size=64, n_layer=4, n_head=4)
    model = BloomForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    weights = {}
    for chosen in ("training", "extra"):
        trainer, seen = trained(deepcopy(model), tmp_path, flow_pass=chosen, max_steps=2)
        assert trainer._flow_credit._scoring.tracer.reader.backend.name == "nnsight"
        weights[chosen] = torch.cat([step[WEIGHTS].flatten() for step in seen])
    assert torch.equal(weights["training"], weights["extra"])
    assert len(weights["training"].unique()) == 2


# --- schedule and failures ---


def test_credit_starts_at_its_step_and_grows(policy, tmp_path):
    trainer, seen = trained(
        policy, tmp_path, max_steps=5, flow_start_step=2, flow_warmup_steps=2, flow_gamma=2.0,
        rollout_func=scripted(TEXTS),
    )  # fmt: skip
    largest = [float(step[WEIGHTS].max()) for step in seen]
    assert largest == [1.0, 1.0, 1.5, 2.0, 2.0]
    assert [step["advantages"].ndim for step in seen] == [1, 1, 2, 2, 2]
    assert len(logged(trainer, "weight_mean")) == 3


@pytest.mark.parametrize("peft", [None, lora()], ids=["whole model", "LoRA"])
@pytest.mark.parametrize("chosen", ["auto", "training"])
def test_all_rollouts_of_a_generation_have_one_factor(policy, tmp_path, chosen, peft):
    _, seen = trained(
        policy, tmp_path, flow_pass=chosen, peft_config=peft, max_steps=4, flow_warmup_steps=4,
        flow_gamma=2.0, steps_per_generation=2, gradient_accumulation_steps=1,
        rollout_func=scripted(TEXTS),
    )  # fmt: skip
    assert [float(step[WEIGHTS].max()) for step in seen] == [1.25, 1.25, 1.75, 1.75]


def test_before_its_step_training_is_plain_grpo(policy, tmp_path):
    ours, _ = trained(policy, tmp_path, flow_start_step=3)
    plain, _ = trained(policy, tmp_path, GRPOTrainer)
    assert same_parameters(ours, plain)


@pytest.mark.parametrize("where", ["finding", "reading", "solving", "choosing"])
@pytest.mark.parametrize(
    "options", [{}, {"num_iterations": 2}, {"flow_pass": "extra"}], ids=name_of
)
def test_a_failure_can_cost_one_batch_only(policy, tmp_path, monkeypatch, where, options):
    place = {
        "finding": (scoring, "rollout_masks"),
        "reading": (reading, "add_head_mean"),
        "solving": (read_rollouts, "solve_rollouts"),
        "choosing": (choosing, "highest"),
    }[where]
    real, calls = getattr(*place), []

    def fails_once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise ArithmeticError("no flow today")
        return real(*args, **kwargs)

    trainer = build(
        FlowGRPOTrainer, policy, tmp_path, max_steps=3, flow_on_error="uniform", **options
    )
    trainer._flow_credit._scoring.tracer.reader.verify()
    seen = watched(trainer)
    monkeypatch.setattr(*place, fails_once)
    trainer.train()
    assert seen[0][WEIGHTS].eq(1).all()
    assert any(len(step[WEIGHTS].unique()) == 2 for step in seen)
    assert set(logged(trainer, "errors")) == {1.0}  # so far

    calls.clear()
    credit = trainer._flow_credit
    credit.options = replace(credit.options, on_error="raise")
    with pytest.raises(ArithmeticError, match="no flow today"):
        trainer.train()


def test_a_failing_model_is_not_a_failing_flow(policy, tmp_path):
    trainer = build(FlowGRPOTrainer, policy, tmp_path, flow_on_error="uniform")
    trainer._flow_credit._scoring.tracer.reader.verify()
    passes: list[int] = []

    def fail(*_):
        if torch.is_grad_enabled():
            passes.append(1)
            raise RuntimeError("out of memory")

    trainer.model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert len(passes) == 1


def test_attached_credit_reads_the_training_pass_too(policy, tmp_path):
    plain = build(GRPOTrainer, policy, tmp_path, max_steps=2, rollout_func=scripted(TEXTS))
    trainer = attach_flow_credit(plain)
    passes = forwards(trainer)
    trainer._flow_credit._scoring.tracer.reader.verify()
    passes.clear()
    trainer.train()
    assert all(passes)
    assert len(logged(trainer, "weight_mean")) == 2


def test_rows_stay_with_their_completions_through_the_shuffle(policy, tmp_path):
    trainer = answering(policy, tmp_path, max_steps=1)
    seen = watched(trainer)
    trainer.train()
    (step,) = seen
    for row, place in enumerate(step[ROWS].tolist()):
        ids = step["completion_ids"][row][step["completion_mask"][row].bool()]
        assert word_tokenizer().decode(ids) == TEXTS[place % len(TEXTS)]
