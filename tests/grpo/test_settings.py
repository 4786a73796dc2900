"""Every setting of GRPO: uniform credit is plain GRPO, and each token has its own weight."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

from flowtracer_plugin.grpo import FlowGRPOTrainer
from flowtracer_plugin.grpo.hooks import WEIGHTS
from tests.grpo.trained import (
    ANSWERS,
    LAYERS,
    LOSSES,
    TEXTS,
    forwards,
    logged,
    lora,
    same_parameters,
    slow_weights,
    watched,
)
from tests.grpo.worker import build, reward, scripted, word_tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")]


def sometimes(prompts, completions, completion_ids, **columns):
    """No opinion of every second completion."""
    return [None if row % 2 else float(len(ids)) for row, ids in enumerate(completion_ids)]


def never(prompts, completions, completion_ids, **columns):
    """No opinion of the first half."""
    half = len(completion_ids) // 2
    return [None if row < half else 1.0 for row, _ in enumerate(completion_ids)]


async def later(prompts, completions, completion_ids, **columns):
    await asyncio.sleep(0)
    return [float(sum(ids) % 5) for ids in completion_ids]


MASKS = [[1, 1, 0, 0, 1, 1, 1, 1], [1] * 5, [1, 0, 1], [1] * 6]
"""0 on the tokens of `TEXTS` that an environment wrote."""

CHATS = {"prompt": [[{"role": "user", "content": "3 plus 4 is"}]] * 16}

SETTINGS: dict[str, dict[str, Any]] = {
    **{f"{loss}, beta {beta}": {"loss_type": loss, "beta": beta}
       for loss in LOSSES for beta in (0.0, 0.04)},
    "two iterations, two-sided clipping, off-policy mask": {
        "num_iterations": 2, "delta": 2.0, "off_policy_mask_threshold": 0.5,
    },
    "steps per generation above accumulation": {
        "steps_per_generation": 4, "gradient_accumulation_steps": 2,
    },
    "steps per generation below accumulation": {
        "steps_per_generation": 2, "gradient_accumulation_steps": 4,
    },
    "normalise, then sum, scale by batch": {
        "reward_funcs": [reward, later], "multi_objective_aggregation": "normalize_then_sum",
        "scale_rewards": "batch",
    },
    "rewards without an opinion, scale not at all": {
        "reward_funcs": [reward, sometimes, never], "scale_rewards": "none",
    },
    "truncated completions hidden": {"mask_truncated_completions": True},
    "tokens of high entropy only, entropy bonus": {
        "top_entropy_quantile": 0.5, "entropy_coef": 0.1,
    },
    "bias correction of the KL, padding to a multiple": {
        "use_bias_correction_kl": True, "beta": 0.04, "pad_to_multiple_of": 16,
    },
    "gradient checkpointing, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "no gradient checkpointing": {"gradient_checkpointing": False},
    "bfloat16": {"bf16": True},
    "LoRA with dropout": {"peft_config": lora(lora_dropout=0.5), "beta": 0.04},
    "an environment's tokens": {"masks": MASKS},
    "an environment's tokens, scored before": {"masks": MASKS, "num_iterations": 2},
    "chats, accumulation": {"rows": CHATS, "gradient_accumulation_steps": 2},
    "vLLM, token ratios cut": {"vllm": "token_truncate"},
    "vLLM, token ratios masked": {"vllm": "token_mask", "loss_type": "grpo"},
    "vLLM, sequence ratios cut": {"vllm": "sequence_truncate"},
    "vLLM, sequence ratios masked": {"vllm": "sequence_mask", "loss_type": "bnpo", "beta": 0.04},
    "vLLM, VESPO": {"vllm": "token_truncate", "loss_type": "vespo"},
}  # fmt: skip
LONG_TAIL = {
    *(f"{loss}, beta {(0.04, 0.0)[place % 2]}" for place, loss in enumerate(LOSSES)),
    "vLLM, token ratios masked",
    "vLLM, sequence ratios cut",
    "vLLM, VESPO",
}
"""Each loss is also tested with the other beta, and vLLM's ratios with two other settings."""
SELF_CHECK = 4
"""Passes over a short text, before the first one that is read."""
EVERY = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG_TAIL)) for name in SETTINGS],
)


def made(kind, policy, folder, name, **more):
    """A trainer with these settings, whose completions are `TEXTS` in turn."""
    options = {**SETTINGS[name], **more}
    vllm, masks = options.pop("vllm", None), options.pop("masks", None)
    rollout = scripted(TEXTS, masks)
    trainer = build(kind, policy, folder, rollout_func=told(rollout, vllm), **options)
    if vllm is not None:  # it does not run here: only its log-probabilities are handed over
        trainer.use_vllm, trainer.vllm_importance_sampling_mode = True, vllm
        trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
        trainer._last_loaded_step = -1
    return trainer


def told(rollout, vllm):
    """The rollouts, of chats too, with the log-probabilities that vLLM would give."""
    tokenizer = word_tokenizer()

    def rollouts(prompts, trainer):
        texts = [p if isinstance(p, str) else p[0]["content"] for p in prompts]
        found = rollout(texts, trainer)
        found["prompt_ids"] = tokenizer(texts)["input_ids"]
        if vllm is not None:
            drawn = torch.Generator().manual_seed(4)
            found["logprobs"] = [
                (-3 + 0.3 * torch.randn(len(ids), generator=drawn)).tolist()
                for ids in found["completion_ids"]
            ]
        return found

    return rollouts


def losses(trainer):
    return [step["loss"] for step in trainer.state.log_history if "loss" in step]


@EVERY
def test_uniform_credit_is_plain_grpo_to_the_bit_without_an_additional_pass(policy, tmp_path, name):
    ended = []
    for kind, options in ((FlowGRPOTrainer, {"flow_gamma": 1.0}), (GRPOTrainer, {})):
        trainer = made(kind, policy, tmp_path, name, max_steps=3, **options)
        passes = forwards(trainer)
        trainer.train()
        modes = [module.training for module in trainer.model.modules()]
        ended.append((trainer, torch.get_rng_state(), modes, passes))
    (ours, random, modes, passes), (plain, plain_random, plain_modes, plain_passes) = ended
    assert same_parameters(ours, plain)
    assert torch.equal(random, plain_random)
    assert modes == plain_modes
    assert passes == [False] * SELF_CHECK + plain_passes
    assert sum(logged(ours, "answer_found")) > 0
    assert losses(ours) == losses(plain)


def generating(trainer):
    """The parameters at the start of each generation."""
    states, generate = [], trainer._generate_and_score_completions

    def recorded(inputs):
        states.append({key: part.clone() for key, part in trainer.model.state_dict().items()})
        return generate(inputs)

    trainer._generate_and_score_completions = recorded
    return states


@EVERY
def test_the_loss_has_the_weights_of_its_own_ids_and_training_stays_finite(policy, tmp_path, name):
    trainer = made(FlowGRPOTrainer, policy, tmp_path, name, max_steps=3)
    states, seen = generating(trainer), watched(trainer)
    trainer.train()
    after = trainer.model.state_dict()
    assert all(part.isfinite().all() for part in after.values())
    assert any(not torch.equal(part, states[0][key]) for key, part in after.items())

    model, agreed = AutoModelForCausalLM.from_pretrained(policy), []
    uses = trainer.args.steps_per_generation * trainer.num_iterations  # of one generation
    for turn, step in enumerate(seen):
        if "peft_config" not in SETTINGS[name]:
            model.load_state_dict(states[turn // uses])
        elif turn >= uses:
            break  # adapters start at 0; later, dropout decides what is read
        agreed += compared_with_slow_weights(model, step)
    assert len(agreed) >= 8
    # Rounded to 8 bits, tokens that carry about as much flow may change places.
    assert sum(agreed) >= (0.75 if name == "bfloat16" else 1) * len(agreed)


def compared_with_slow_weights(model, step):
    """For each token in the loss: whether its weight is that of the slow definition."""
    tokenizer, agreed = word_tokenizer(), []
    assert step["advantages"].shape == step[WEIGHTS].shape == step["completion_ids"].shape
    assert step["advantages"].isfinite().all()
    for row, mask in enumerate(step["completion_mask"].bool()):
        weights = step[WEIGHTS][row]
        assert weights[~mask].eq(1).all()
        if not mask.any():
            continue  # hidden
        text = tokenizer.decode(step["completion_ids"][row][mask])
        chosen = step["tool_mask"][row][mask] if "tool_mask" in step else mask[mask]
        prompt = step["prompt_ids"][row][step["prompt_mask"][row].bool()]
        wanted = slow_weights(
            model,
            text,
            tokenizer.decode(prompt),
            ANSWERS[TEXTS.index(text)],
            layers=LAYERS["middle"],
            target="answer",
            top_fraction=0.4,
            gamma=1.5,
            normalize="none",
            chosen=chosen.bool().tolist(),
        )
        wanted = [weight or 1.0 for weight in wanted]
        found = weights[mask].tolist()
        assert sorted(found) == sorted(wanted)
        agreed += [one == other for one, other in zip(found, wanted, strict=True)]
    return agreed


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(policy, tmp_path):
    shared = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_iterations": 2}
    whole = made(FlowGRPOTrainer, policy, tmp_path, "dapo, beta 0.0", **shared)
    whole.train()
    resumed = made(FlowGRPOTrainer, policy, tmp_path, "dapo, beta 0.0", **shared)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert same_parameters(whole, resumed)
    assert logged(resumed, "weight_mean")


def test_evaluation_between_steps_changes_nothing(policy, tmp_path):
    ended = []
    for kind in (FlowGRPOTrainer, GRPOTrainer):
        options = {"flow_gamma": 1.0} if kind is FlowGRPOTrainer else {}
        trainer = made(
            kind, policy, tmp_path, "dapo, beta 0.0", max_steps=3,
            eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=2,
            eval_dataset=True, **options,
        )  # fmt: skip
        trainer.train()
        ended.append(trainer)
    assert same_parameters(*ended)
    names = [name for step in ended[0].state.log_history for name in step]
    assert any(name.startswith("eval_") for name in names)
    assert not any(name.startswith("eval_flow") for name in names)
