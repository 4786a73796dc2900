"""TRL: token-level credit in real trainers."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

import flowtracer_plugin as ft
from flowtracer_plugin.credit import read_rollouts
from flowtracer_plugin.grpo import (
    CreditOptions,
    FlowCreditMixin,
    FlowGRPOConfig,
    FlowGRPOTrainer,
    FlowReward,
    attach_flow_credit,
)
from tests.credit import reference_scorers as slow_scorers
from tests.credit.test_weights import slow_credit
from tests.flow import reference
from tests.grpo.trained import (
    ANSWERS,
    LAYERS,
    TEXTS,
    answering,
    logged,
    lora,
    same_parameters,
    slow_flow,
    slow_weights,
    words,
)
from tests.grpo.worker import METRICS, PROMPTS, build, reward, scripted, word_tokenizer
from tests.tiny import eager_attention

pytestmark = [pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")]


def score(trainer, rows=4):
    """One generation batch with credit from an extra pass, and its plain advantages."""
    trainer.model.train()
    credit = trainer._flow_credit
    credit.options = replace(credit.options, pass_="extra")
    inputs = [{"prompt": PROMPTS[row // 2]} for row in range(rows)]
    plain = GRPOTrainer._generate_and_score_completions(trainer, inputs)["advantages"]
    return trainer._generate_and_score_completions(inputs), plain


def weights(trainer, rows=4):
    rollouts, plain = score(trainer, rows)
    return quotient(rollouts["advantages"], plain)


def quotient(advantages, plain):
    """The weights, without the rounding of a product that is divided again."""
    assert plain.all()
    return (advantages / plain[:, None]).round(decimals=5)


def spread(trainer, rollouts, plain):
    """The same rollouts, given their credit again."""
    kept = {name: value for name, value in rollouts.items() if not name.startswith("flow_")}
    given = {**kept, "advantages": plain}
    return trainer._flow_credit.generation(lambda _: given, None)


# credit


def test_it_trains_and_logs(policy, tmp_path):
    trainer = build(FlowGRPOTrainer, policy, tmp_path, max_steps=3)
    before = {name: part.clone() for name, part in trainer.model.named_parameters()}
    trainer.train()
    for name, part in trainer.model.named_parameters():
        assert not torch.equal(part, before[name]), name
    assert all(len(logged(trainer, name)) == 3 for name in METRICS)
    assert sum(logged(trainer, "answer_found")) > 0
    assert 1 < max(logged(trainer, "weight_mean")) < 1.5
    assert all(0 <= share <= 1 for share in logged(trainer, "top_share") if share is not None)
    assert min(logged(trainer, "seconds")) > 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"flow_layers": "all", "flow_gamma": 3.0, "flow_top_fraction": 0.2},
        {"flow_layers": "late:1", "flow_target": "decision", "flow_normalize": "mean_one"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
def test_weights_are_those_of_the_slow_definitions(policy, tmp_path, options):
    trainer = answering(policy, tmp_path, bf16=False, **options)
    found = weights(trainer)
    for row, text in enumerate(TEXTS):
        wanted = slow_weights(
            trainer.model,
            text,
            PROMPTS[row // 2],
            ANSWERS[row],
            layers=LAYERS[options.get("flow_layers", "middle")],
            target=options.get("flow_target", "answer"),
            top_fraction=options.get("flow_top_fraction", 0.4),
            gamma=options.get("flow_gamma", 1.5),
            normalize=options.get("flow_normalize", "none"),
        )
        padding = [1.0] * (found.shape[1] - len(wanted))
        np.testing.assert_allclose(found[row], [*wanted, *padding], atol=1e-5)
    assert len(found.unique()) > 1
    metrics = trainer._metrics["train"]
    assert metrics["flow/answer_found"] == [1.0]
    lengths = [len(words(text)) for text in TEXTS]
    mean = sum(found[row, :length].sum() for row, length in enumerate(lengths)) / sum(lengths)
    assert metrics["flow/weight_mean"] == pytest.approx([float(mean)])


def test_top_share_is_the_flow_of_the_top_tokens(policy, tmp_path):
    trainer = answering(policy, tmp_path, flow_gamma=1.0)
    score(trainer)
    shares, jumps, entropies = [], [], []
    for row, text in enumerate(TEXTS):
        asked, said = words(PROMPTS[row // 2]), words(text)
        attention = eager_attention(trainer.model, asked + said, LAYERS["middle"]).numpy()
        tokens = np.arange(len(asked) + len(said))
        answer = tokens == len(asked) + ANSWERS[row]
        solved = reference.flow(attention, (tokens > 0) & (tokens < len(asked)), answer)
        flow = np.sort(solved["throughput"][len(asked) :])[::-1]
        shares.append(flow[: math.ceil(0.4 * len(said))].sum() / flow.sum())
        each = flow / flow.sum()
        entropies.append(-sum(p * math.log(p) for p in each if p > 0) / math.log(len(said)))
        landing = solved["edge_flow"][len(asked) :, : len(asked)].sum(-1)
        jumps.append(1 - landing[~answer[len(asked) :]].sum())
    metrics = trainer._metrics["train"]
    assert metrics["flow/top_share"] == pytest.approx([np.mean(shares)], rel=1e-5)
    assert metrics["flow/prompt_jump"] == pytest.approx([np.mean(jumps)], rel=1e-5)
    assert metrics["flow/entropy"] == pytest.approx([np.mean(entropies)], rel=1e-5)


def train_both(policy, folder, ours, theirs=None, **options):
    """The same training with flow credit and without it."""
    plain = {name: value for name, value in options.items() if not name.startswith("flow_")}
    pair = []
    for kind, chosen in ((FlowGRPOTrainer, {**options, **ours}), (GRPOTrainer, plain)):
        trainer = build(kind, policy, folder, **chosen)
        trainer.train()
        pair.append(trainer)
    return pair


def test_uniform_credit_of_mean_one_trains_bit_identically_to_plain_grpo(policy, tmp_path):
    options = {"loss_type": "bnpo", "num_iterations": 2, "flow_normalize": "mean_one"}
    ours, plain = train_both(policy, tmp_path, {"flow_gamma": 1.0}, max_steps=4, **options)
    assert same_parameters(ours, plain)
    assert sum(logged(ours, "answer_found")) > 0
    start = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    assert not torch.equal(ours.model.state_dict()["lm_head.weight"], start["lm_head.weight"])


def test_unequal_credit_changes_the_training(policy, tmp_path):
    ours, plain = train_both(policy, tmp_path, {"flow_gamma": 1.5}, max_steps=4)
    assert not same_parameters(ours, plain)


def test_the_pass_draws_no_random_number_and_leaves_every_mode(policy, tmp_path):
    adapters = lora(lora_dropout=0.5)
    trainer = answering(policy, tmp_path, peft_config=adapters)
    rollouts, plain = score(trainer)
    trainer.model.get_submodule("base_model.model.model.layers.1").eval()
    modes = [module.training for module in trainer.model.modules()]
    before = torch.get_rng_state()
    spread(trainer, rollouts, plain)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in trainer.model.modules()] == modes
    assert all(part.grad is None for part in trainer.model.parameters())


def test_modes_are_restored_when_the_model_fails(policy, tmp_path):
    trainer = answering(policy, tmp_path)
    rollouts, plain = score(trainer)

    def fail(*_):
        raise RuntimeError("out of memory")

    trainer.model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        spread(trainer, rollouts, plain)
    assert all(module.training for module in trainer.model.modules())


def test_the_number_of_forward_passes_does_not_depend_on_the_rollouts(policy, tmp_path):
    passes = []
    for texts in (TEXTS, ["so then", "so"], ["so 1", "so then", "then"]):
        trainer = answering(
            policy, tmp_path, texts, per_device_train_batch_size=2, gradient_accumulation_steps=3
        )
        counted = []
        trainer.model.model.embed_tokens.register_forward_hook(
            lambda *_, counted=counted: counted.append(torch.is_grad_enabled())
        )
        rollouts, plain = score(trainer, rows=6)
        counted.clear()
        spread(trainer, rollouts, plain)
        passes.append(counted)
    assert passes == [[False] * 3] * 3


# rollouts with something missing or hidden


def test_a_completion_without_an_answer_gets_plain_credit(policy, tmp_path):
    texts = [TEXTS[0], "so then is plus"]
    trainer = answering(policy, tmp_path, texts)
    found = weights(trainer)
    assert found[0].unique().tolist() == [1.0, 1.5]
    assert found[1].tolist() == [1.0] * 8
    assert trainer._metrics["train"]["flow/answer_found"] == [0.5]


def test_a_batch_without_any_answer_has_plain_credit(policy, tmp_path):
    texts = ["so then is plus", "so"]
    trainer = answering(policy, tmp_path, texts)
    assert weights(trainer).unique().tolist() == [1.0]
    metrics = trainer._metrics["train"]
    assert metrics["flow/answer_found"] == [0.0]
    assert metrics["flow/weight_mean"] == [1.0]
    assert math.isnan(metrics["flow/top_share"][0])
    assert math.isnan(metrics["flow/prompt_jump"][0])


def test_the_last_token_can_stand_in_for_the_answer(policy, tmp_path):
    texts = [TEXTS[0], "so then is plus <eos>"]
    trainer = answering(policy, tmp_path, texts, flow_no_answer="last")
    found = weights(trainer)
    options = {"top_fraction": 0.4, "gamma": 1.5, "normalize": "none"}
    for row, place in ((0, ANSWERS[0]), (1, 3)):
        wanted = slow_weights(
            trainer.model,
            texts[row],
            PROMPTS[0],
            place,
            layers=LAYERS["middle"],
            target="answer",
            **options,
        )
        assert found[row, : len(wanted)].tolist() == wanted
    assert trainer._metrics["train"]["flow/answer_found"] == [0.5]


def test_a_missing_answer_can_be_an_error_and_its_remedies_work(policy, tmp_path):
    texts = [TEXTS[0], "so then is plus"]
    trainer = answering(policy, tmp_path, texts, flow_no_answer="raise")
    message = r"no answer found in 2 of 4 completions; set flow_answer .* flow_no_answer='uniform'"
    with pytest.raises(ft.AnswerNotFoundError, match=message):
        score(trainer)
    hidden = answering(
        policy,
        tmp_path,
        [TEXTS[2], "so then"],
        flow_no_answer="raise",
        mask_truncated_completions=True,
    )
    assert score(hidden)[0]["advantages"].isfinite().all()


def test_a_truncated_completion_that_is_hidden_gets_weight_one(policy, tmp_path):
    texts = ["so 3 then 7 <eos>", "so 3 then 7 is"]
    trainer = answering(policy, tmp_path, texts, mask_truncated_completions=True)
    rollouts, plain = score(trainer)
    assert rollouts["completion_mask"].sum(-1).tolist() == [5, 0, 5, 0]
    found = quotient(rollouts["advantages"], plain)
    assert found[1].tolist() == [1.0] * 5
    assert found[0].unique().tolist() == [1.0, 1.5]
    assert trainer._metrics["train"]["flow/answer_found"] == [1.0]


def test_a_batch_that_is_all_hidden_stays_finite(policy, tmp_path):
    trainer = answering(
        policy, tmp_path, ["so 3", "so 3 is"], mask_truncated_completions=True, max_steps=1
    )
    assert weights(trainer).unique().tolist() == [1.0]
    assert math.isnan(trainer._metrics["train"]["flow/weight_mean"][0])
    trainer.train()
    assert all(part.isfinite().all() for part in trainer.model.parameters())


def test_a_tools_tokens_are_read_but_do_not_compete(policy, tmp_path):
    asked, said = words(PROMPTS[0]), words(TEXTS[0])
    model = AutoModelForCausalLM.from_pretrained(policy)
    attention = eager_attention(model, asked + said, LAYERS["middle"]).numpy()
    tokens = np.arange(len(asked) + len(said))
    question, answer = (tokens > 0) & (tokens < len(asked)), tokens == len(asked) + ANSWERS[0]
    throughput = reference.flow(attention, question, answer)["throughput"][len(asked) :]
    tool = np.argsort(-throughput)[1]  # it would have been chosen
    mask = [int(place != tool) for place in range(len(said))]
    trainer = build(
        FlowGRPOTrainer,
        policy,
        tmp_path,
        rollout_func=scripted(TEXTS, [mask, [1] * 5, [1] * 3, [1] * 6]),
        flow_gamma=3.0,
    )
    wanted = slow_credit(throughput, mask, 0.4, 3.0, "none")
    assert weights(trainer)[0].tolist() == [weight or 1.0 for weight in wanted]


@pytest.mark.parametrize("sign", ["positive", "negative"])
def test_only_advantages_of_the_chosen_sign_are_reweighted(policy, tmp_path, sign):
    options = {"rollout_func": scripted(TEXTS)}
    rollouts, plain = score(build(FlowGRPOTrainer, policy, tmp_path, flow_sign=sign, **options))
    both = weights(build(FlowGRPOTrainer, policy, tmp_path, **options))
    chosen = plain > 0 if sign == "positive" else plain < 0
    assert chosen.any()
    assert not chosen.all()
    found = quotient(rollouts["advantages"], plain)
    assert torch.equal(found[chosen], both[chosen])
    assert found[~chosen].unique().tolist() == [1.0]


def test_mean_one_keeps_the_mean_weight_of_every_completion(policy, tmp_path):
    trainer = answering(policy, tmp_path, flow_normalize="mean_one")
    rollouts, plain = score(trainer)
    found, mask = quotient(rollouts["advantages"], plain), rollouts["completion_mask"]
    torch.testing.assert_close((found * mask).sum(-1) / mask.sum(-1), torch.ones(4))
    assert len(found.unique()) > 2
    assert trainer._metrics["train"]["flow/weight_mean"] == pytest.approx([1.0])


def test_advantages_that_are_per_token_already_are_multiplied(policy, tmp_path):
    class PerToken(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            rollouts = super()._generate_and_score_completions(inputs)
            steps = torch.arange(1.0, rollouts["completion_ids"].shape[1] + 1)
            return {**rollouts, "advantages": rollouts["advantages"][:, None] * steps}

    class Both(FlowCreditMixin, PerToken):
        pass

    trainer = build(Both, policy, tmp_path, rollout_func=scripted(TEXTS))
    plain = answering(policy, tmp_path)
    wanted = weights(plain) * torch.arange(1.0, 9.0)
    torch.testing.assert_close(weights(trainer), wanted)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_flow_that_is_not_finite_never_becomes_credit(policy, tmp_path, monkeypatch, wrong):
    trainer = answering(policy, tmp_path)
    solve = read_rollouts.solve_rollouts

    def broken(*arguments, **options):
        batch = solve(*arguments, **options)
        batch.throughput[1, batch.prompt_length] = wrong
        return batch

    monkeypatch.setattr(read_rollouts, "solve_rollouts", broken)
    with pytest.raises(ValueError, match=r"scores of 'flow' must be finite .*, got (nan|inf)"):
        score(trainer)


def test_the_bottom_is_that_of_the_slow_definition(policy, tmp_path):
    trainer = answering(policy, tmp_path, flow_side="bottom")
    found = weights(trainer)
    for row, text in enumerate(TEXTS):
        flow = slow_flow(
            trainer.model, text, PROMPTS[row // 2], ANSWERS[row],
            layers=LAYERS["middle"], target="answer",
        ).tolist()  # fmt: skip
        wanted = [1 + 0.5 * boost for boost in slow_scorers.bottom(flow, [1] * len(flow), 0.4)]
        assert found[row].tolist() == wanted + [1.0] * (found.shape[1] - len(wanted))


@pytest.mark.parametrize("pattern", [r"then (\S+)", re.compile(r"then (\S+)"), "function"])
def test_an_oracle_chooses_all_that_it_finds(policy, tmp_path, pattern):
    def after(text):
        return [found.span(1) for found in re.finditer(r"then (\S+)", text)]

    trainer = build(GRPOTrainer, policy, tmp_path, rollout_func=scripted(TEXTS))
    oracle = after if pattern == "function" else pattern
    attach_flow_credit(trainer, CreditOptions(scorer="oracle", oracle=oracle, top_fraction=0.1))
    found = weights(trainer)
    chosen = [np.flatnonzero(row).tolist() for row in (found == 1.5).numpy()]
    assert chosen == [[1], [3], [], [3]]
    assert ((found == 1.5) | (found == 1)).all()


# trainers


def test_evaluation_is_that_of_plain_grpo(policy, tmp_path):
    def evaluate(kind):
        trainer = build(kind, policy, tmp_path, per_device_eval_batch_size=4)
        trainer.eval_dataset = trainer.train_dataset.select(range(4))
        torch.manual_seed(0)
        result = trainer.evaluate()
        timed = ("runtime", "per_second", "preparation_time")
        return {name: value for name, value in result.items() if not name.endswith(timed)}

    ours = evaluate(FlowGRPOTrainer)
    assert ours == evaluate(GRPOTrainer)
    assert not any("flow" in name for name in ours)


def test_attached_credit_is_that_of_the_trainer(policy, tmp_path):
    ours = build(FlowGRPOTrainer, policy, tmp_path, max_steps=4)
    ours.train()
    attached = build(GRPOTrainer, policy, tmp_path, max_steps=4)
    assert attach_flow_credit(attached) is attached
    attached.train()
    assert same_parameters(ours, attached)
    for name in METRICS[:-1]:
        assert logged(ours, name) == logged(attached, name)


def test_every_option_can_be_attached(policy, tmp_path):
    trainer = attach_flow_credit(
        build(GRPOTrainer, policy, tmp_path, rollout_func=scripted(TEXTS)),
        CreditOptions(
            top_fraction=0.2,
            gamma=2.0,
            layers=[0, 5],
            answer=re.compile(r"so (\d)"),
            target="decision",
            sign="positive",
        ),
    )
    rollouts, plain = score(trainer)
    assert trainer._metrics["train"]["flow/answer_found"] == [0.5]
    assert sorted(quotient(rollouts["advantages"], plain).unique().tolist()) in ([1, 2], [1])
    assert trainer._flow_credit._scoring.tracer.layers == (0, 5)
    assert trainer._flow_credit._scoring.tracer.options.target == "decision"


def test_attaching_twice_is_an_error(policy, tmp_path):
    for kind in (FlowGRPOTrainer, GRPOTrainer):
        trainer = build(kind, policy, tmp_path)
        if kind is GRPOTrainer:
            attach_flow_credit(trainer)
        with pytest.raises(ValueError, match="has flow credit already; attach it once"):
            attach_flow_credit(trainer)


def test_a_model_that_was_wrapped_anew_is_traced(policy, tmp_path):
    trainer = answering(policy, tmp_path)
    before = weights(trainer)
    trainer.model = AutoModelForCausalLM.from_pretrained(policy)
    torch.nn.init.normal_(trainer.model.model.embed_tokens.weight)
    after = weights(trainer)
    assert trainer._flow_credit._scoring.tracer.model is trainer.model
    assert not torch.equal(before, after)


def test_args_have_a_default(policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: True)
    for model in (policy, AutoModelForCausalLM.from_pretrained(policy)):
        trainer = FlowGRPOTrainer(
            model,
            reward,
            processing_class=word_tokenizer(),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        )
        assert isinstance(trainer.args, FlowGRPOConfig)
        assert trainer.args.output_dir == f"{Path(policy).name}-FlowGRPO"
        assert trainer._flow_credit.options.gamma == 1.5


def test_the_model_card_names_the_paper(policy, tmp_path):
    trainer = build(FlowGRPOTrainer, policy, tmp_path)
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "How Does Reasoning Flow?" in card
    assert "2606.10646" in card
    assert "flowtracer" in card


def test_credit_and_reward_trace_one_model_together(policy, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(policy)
    flow_reward = FlowReward(ft.wrap(model, word_tokenizer(), preset="paper"))
    trainer = build(
        FlowGRPOTrainer, model, tmp_path, [reward, flow_reward], rollout_func=scripted(TEXTS)
    )
    alone = answering(policy, tmp_path)
    assert torch.equal(weights(trainer), weights(alone))
    trainer.train()
    assert logged(trainer, "answer_found") == [1.0, 1.0]
