"""Other people's trainers with flow credit, and runs that are interrupted or changed."""

from __future__ import annotations

import gc
from functools import cache

import pytest
import torch
from trl import GRPOTrainer

from flowtracer_plugin.grpo import (
    FlowCreditMixin,
    FlowGRPOTrainer,
    UnsupportedTrainerError,
    attach_flow_credit,
)
from flowtracer_plugin.grpo.hooks import WEIGHTS
from flowtracer_plugin.reading.one_pass import ReadingSum
from tests.grpo.trained import TEXTS, answering, logged, lora, same_parameters, trained, watched
from tests.grpo.worker import build, reward, scripted, word_tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")]


def weights_of(policy, folder, kind=FlowGRPOTrainer, **options):
    _, seen = trained(policy, folder, kind, rollout_func=scripted(TEXTS), **options)
    return torch.cat([step[WEIGHTS] for step in seen])


@pytest.fixture(scope="module")
def plain_weights(policy, tmp_path_factory):
    """The weights of TRL's own trainer after so many iterations over each generation."""
    return cache(
        lambda iterations=1: weights_of(
            policy, tmp_path_factory.mktemp("plain"), num_iterations=iterations
        )
    )


# --- hosts that do more ---


class Later(FlowGRPOTrainer):
    """Sets what its loss needs after TRL's own set-up, as TRL's trainers do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.alpha = 1.0

    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs) * self.alpha


class Adding(GRPOTrainer):
    """Its loss reads what its generation adds."""

    def _generate_and_score_completions(self, inputs):
        rollouts = super()._generate_and_score_completions(inputs)
        return {**rollouts, "bonus": torch.zeros_like(rollouts["advantages"])}

    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs) + inputs["bonus"].sum()


class Running(GRPOTrainer):
    """Its loss also runs the model on other tokens."""

    def _compute_loss(self, model, inputs):
        first = inputs["prompt_ids"]
        self._get_per_token_logps_and_entropies(model, first, torch.ones_like(first), 1)
        return super()._compute_loss(model, inputs)


class Keyword(GRPOTrainer):
    """Its pass takes an option of its own."""

    def _get_per_token_logps_and_entropies(self, *args, scale=1.0, **kwargs):
        logps, *others = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return (logps * scale, *others)

    def _compute_loss(self, model, inputs):
        self._get_per_token_logps_and_entropies(
            model, inputs["prompt_ids"], inputs["prompt_mask"], 1, scale=2.0
        )
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize("host", [Adding, Running, Keyword])
@pytest.mark.parametrize("iterations", [1, 2])
def test_a_host_that_does_more_has_the_same_credit(
    policy, plain_weights, tmp_path, host, iterations
):
    mixed = type("Mixed", (FlowCreditMixin, host), {})
    wanted = plain_weights(iterations)
    assert torch.equal(weights_of(policy, tmp_path, mixed, num_iterations=iterations), wanted)
    attached = attach_flow_credit(
        build(host, policy, tmp_path, rollout_func=scripted(TEXTS), num_iterations=iterations)
    )
    attached.train()
    assert len(logged(attached, "weight_mean")) > 0


def test_a_trainer_may_set_what_its_loss_needs_after_ours(policy, plain_weights, tmp_path):
    assert torch.equal(weights_of(policy, tmp_path, Later), plain_weights())


def test_a_loss_that_was_wrapped_on_the_trainer_keeps_its_wrapper(policy, tmp_path):
    trainer = build(GRPOTrainer, policy, tmp_path, rollout_func=scripted(TEXTS))
    compute, calls = trainer._compute_loss, []

    def counted(model, inputs):
        calls.append(1)
        return compute(model, inputs)

    trainer._compute_loss = counted
    attach_flow_credit(trainer).train()
    assert len(calls) == 1 + 2  # the check, and two steps
    assert len(logged(trainer, "weight_mean")) == 2


def test_the_error_about_a_host_that_trains_on_other_tokens_names_host_and_remedy(policy, tmp_path):
    class Elsewhere(FlowCreditMixin, GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, model, ids, mask, kept, **kwargs):
            return super()._get_per_token_logps_and_entropies(
                model, ids.roll(1, 1), mask, kept, **kwargs
            )

    trainer = build(Elsewhere, policy, tmp_path, rollout_func=scripted(TEXTS))
    with pytest.raises(UnsupportedTrainerError, match="set flow_pass='extra'"):
        trainer.train()
    remedy = build(Elsewhere, policy, tmp_path, rollout_func=scripted(TEXTS), flow_pass="extra")
    remedy.train()


class Reversed(GRPOTrainer):
    """Reverses the order of its rollouts after they were scored."""

    def _generate_and_score_completions(self, inputs):
        rollouts = super()._generate_and_score_completions(inputs)
        whole = {n: v for n, v in rollouts.items() if isinstance(v, torch.Tensor) and v.ndim}
        return {**rollouts, **{name: value.flip(0) for name, value in whole.items()}}


def test_rows_that_were_reordered_after_scoring_get_their_own_credit(policy, tmp_path):
    mixed = type("Mixed", (FlowCreditMixin, Reversed), {})
    _, seen = trained(
        policy, tmp_path, mixed, rollout_func=scripted(TEXTS), num_iterations=2, learning_rate=0.0
    )
    _, plain = trained(
        policy, tmp_path, rollout_func=scripted(TEXTS), num_iterations=2, learning_rate=0.0
    )
    known = rows_by_ids(plain)
    for step in seen:
        for ids, weights in rows_by_ids([step]).items():
            assert weights == known[ids]


def rows_by_ids(steps):
    """The weights of every row, by prompt and completion."""
    found = {}
    for step in steps:
        for row, weights in enumerate(step[WEIGHTS].tolist()):
            ids = (*step["prompt_ids"][row].tolist(), -1, *step["completion_ids"][row].tolist())
            found[ids] = weights
    return found


def test_a_pass_inside_a_reward_is_not_taken_for_trls(policy, plain_weights, tmp_path):
    made = []

    def nosy(prompts, completions, completion_ids, **columns):
        trainer = made[0]
        ids = torch.full((len(prompts), 9), 5)
        with torch.no_grad():
            trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 4)
        return reward(prompts, completions, completion_ids)

    trainer = build(
        FlowGRPOTrainer, policy, tmp_path, nosy, rollout_func=scripted(TEXTS), max_steps=3
    )
    made.append(trainer)
    seen = watched(trainer)
    trainer.train()
    assert torch.equal(torch.cat([step[WEIGHTS] for step in seen]), plain_weights())


def test_when_the_loss_runs_the_base_model_first_the_policys_pass_is_read(policy, tmp_path):
    class Base(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            kept = inputs["completion_ids"].shape[1]
            with torch.no_grad(), self.model.disable_adapter():
                self._get_per_token_logps_and_entropies(model, ids, mask, kept)
            return super()._compute_loss(model, inputs)

    mixed = type("Mixed", (FlowCreditMixin, Base), {})
    found = {}
    for name, kind in (("ours", FlowGRPOTrainer), ("mixed", mixed)):
        trainer = build(
            kind, policy, tmp_path, rollout_func=scripted(TEXTS), peft_config=lora(), max_steps=1
        )
        with torch.no_grad():
            for parameter_name, parameter in trainer.model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(0, 1.0, generator=torch.Generator().manual_seed(3))
        seen = watched(trainer)
        trainer.train()
        found[name] = seen[0][WEIGHTS]
    assert torch.equal(found["ours"], found["mixed"])


# --- runs that are interrupted or changed ---


def test_an_interrupted_run_leaves_no_credit_behind(policy, tmp_path):
    calls = []

    def sometimes(prompts, completions, completion_ids, **columns):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return reward(prompts, completions, completion_ids)

    turned = [*TEXTS[1:], TEXTS[0]]
    trainer = build(
        FlowGRPOTrainer, policy, tmp_path, sometimes, num_iterations=2, max_steps=2,
        rollout_func=scripted(turned), learning_rate=0.0,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.rollout_func = scripted(TEXTS)
    seen = watched(trainer)
    trainer.train()
    _, plain = trained(
        policy, tmp_path, rollout_func=scripted(TEXTS), num_iterations=2, learning_rate=0.0
    )
    known = rows_by_ids(plain)
    assert {ids: known[ids] for ids in rows_by_ids(seen)} == rows_by_ids(seen)


def test_credit_can_be_attached_between_two_runs(policy, tmp_path):
    trainer = build(
        GRPOTrainer, policy, tmp_path, rollout_func=scripted(TEXTS), num_iterations=2, max_steps=1
    )
    trainer.train()  # its rollouts are half used
    attach_flow_credit(trainer)
    trainer.args.max_steps = 2
    seen = watched(trainer)
    trainer.train()
    assert seen
    assert all(len(step[WEIGHTS].unique()) == 2 for step in seen)


@pytest.mark.parametrize("pass_", ["scoring", "extra"])
def test_one_map_is_alive_at_a_time(policy, tmp_path, monkeypatch, pass_):
    alive, real = [], ReadingSum.reading

    def counted(self, seen):
        gc.collect()
        alive.append(sum(type(thing) is ReadingSum for thing in gc.get_objects()))
        return real(self, seen)

    monkeypatch.setattr(ReadingSum, "reading", counted)
    trainer = answering(
        policy, tmp_path, flow_pass=pass_, per_device_train_batch_size=2,
        gradient_accumulation_steps=4, max_steps=2, num_iterations=2, flow_scorer="coupled",
    )  # fmt: skip
    trainer.train()
    assert len(alive) >= 4
    assert set(alive) == {1}


def test_chats_are_generated_and_read_as_the_template_writes_them(policy, tmp_path):
    rows = {"prompt": [[{"role": "user", "content": "3 plus 4 is"}]] * 16}
    ours, seen = trained(policy, tmp_path, rows=rows, flow_gamma=1.0)
    plain, _ = trained(policy, tmp_path, GRPOTrainer, rows=rows)
    assert same_parameters(ours, plain)
    text = word_tokenizer().decode(seen[0]["prompt_ids"][0])
    assert text.endswith("so then")
