"""Credit from the pass that trains, from TRL's own scoring pass, and from one of its own."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

from flowtracer_plugin.credit.scorers import SCORERS
from flowtracer_plugin.grpo import FlowGRPOTrainer, attach_flow_credit
from flowtracer_plugin.grpo.hooks import ROWS, WEIGHTS
from tests.grpo.test_trainer import (
    ANSWERS,
    LAYERS,
    TEXTS,
    logged,
    same_parameters,
    slow_weights,
    words,
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
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": False},
]
"""Settings in which it does not."""


LONG = [f"{text} {text} {text}" for text in TEXTS]
"""FAI looks ten tokens ahead."""


def name_of(options: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in options.items()) or "default"


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    from tests.grpo.worker import save_policy

    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(autouse=True)
def _silent(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def watched(trainer):
    """Everything that the loss is given, in the order in which it looks at it."""
    seen: list[dict[str, Any]] = []
    compute = trainer._compute_loss

    def recorded(model, inputs):
        loss = compute(model, inputs)
        seen.append({name: deepcopy(value) for name, value in inputs.items()})
        return loss

    trainer._compute_loss = recorded
    return seen


def trained(policy, folder, kind=FlowGRPOTrainer, **options):
    trainer = build(kind, policy, folder, **{"max_steps": 3, **options})
    seen = watched(trainer)
    trainer.train()
    return trainer, seen


def forwards(trainer):
    """With and without gradients, in the order of the passes through the last traced layer."""
    passes: list[bool] = []
    layer = trainer.model.get_submodule(
        next(name for name, _ in trainer.model.named_modules() if name.endswith("layers.3"))
    )
    layer.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    return passes


# --- the three passes ---


@pytest.mark.parametrize("options", [*UNSCORED, *SCORED], ids=name_of)
def test_every_pass_gives_the_same_weights_and_the_same_training(policy, tmp_path, options):
    reference, wanted = trained(policy, tmp_path, flow_pass="extra", **options)
    others = ["auto", *(["scoring"] if options in SCORED else ["training"])]
    for chosen in others:
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


@pytest.mark.parametrize("options", [*UNSCORED, *SCORED], ids=name_of)
def test_weights_in_the_loss_are_those_of_the_ids_in_the_loss(policy, tmp_path, options):
    """One optimizer step: the model that trained is the one that `policy` holds."""
    model = AutoModelForCausalLM.from_pretrained(policy)
    steps = max(1, options.get("steps_per_generation", 1) // 2) if options in SCORED else 1
    trainer = build(
        FlowGRPOTrainer,
        policy,
        tmp_path,
        rollout_func=scripted(TEXTS),
        max_steps=steps,
        learning_rate=0.0,
        **options,
    )
    seen = watched(trainer)
    trainer.train()
    tokenizer, found = word_tokenizer(), 0
    for step in seen:
        advantages, weights = step["advantages"], step[WEIGHTS]
        assert advantages.shape == weights.shape == step["completion_ids"].shape
        for row, ids in enumerate(step["completion_ids"]):
            said = step["completion_mask"][row].bool()
            text = tokenizer.decode(ids[said])
            prompt = tokenizer.decode(step["prompt_ids"][row][step["prompt_mask"][row].bool()])
            place = ANSWERS[TEXTS.index(text)]
            wanted = slow_weights(
                model, text, prompt, place, layers=LAYERS["middle"], target="answer",
                top_fraction=0.4, gamma=1.5, normalize="none",
            )  # fmt: skip
            assert weights[row, said].tolist() == list(wanted)
            assert weights[row, ~said].eq(1).all()
            found += 1
    assert found >= 4


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


@pytest.mark.parametrize("options", [*UNSCORED, *SCORED], ids=name_of)
def test_no_pass_is_made_for_the_credit(policy, tmp_path, options):
    counted = {}
    for kind in (FlowGRPOTrainer, GRPOTrainer):
        trainer = build(
            kind, policy, tmp_path, max_steps=2, rollout_func=scripted(TEXTS), **options
        )
        if kind is FlowGRPOTrainer:
            trainer._flow_credit._reader.tracer.reader.verify()  # once, on a short text
        passes = counted[kind] = forwards(trainer)
        trainer.train()
        assert passes
    assert counted[FlowGRPOTrainer] == counted[GRPOTrainer]


def test_a_pass_of_its_own_ends_after_the_last_layer_that_is_read(policy, tmp_path):
    shared = {"max_steps": 2, "rollout_func": scripted(TEXTS)}
    trainer = build(FlowGRPOTrainer, policy, tmp_path, flow_pass="extra", **shared)
    plain = build(GRPOTrainer, policy, tmp_path, **shared)
    trainer._flow_credit._reader.tracer.reader.verify()
    passes, wanted = forwards(trainer), forwards(plain)
    heads: list[int] = []
    trainer.model.model.layers[4].register_forward_pre_hook(lambda *_: heads.append(1))
    others: list[int] = []
    plain.model.model.layers[4].register_forward_pre_hook(lambda *_: others.append(1))
    trainer.train()
    plain.train()
    assert len(passes) == len(wanted) + 2
    assert len(heads) == len(others)


@pytest.mark.parametrize("scorer", ["uniform", "random", "entropy"])
def test_nothing_is_read_that_is_not_looked_at(policy, tmp_path, monkeypatch, scorer):
    trainer = build(FlowGRPOTrainer, policy, tmp_path, flow_scorer=scorer)

    def fail(*_, **__):
        raise AssertionError("attention was read")

    monkeypatch.setattr(trainer._flow_credit._reader.tracer.reader, "listen", fail)
    monkeypatch.setattr(trainer._flow_credit._reader.tracer.reader, "verify", fail)
    trainer.train()
    assert len(logged(trainer, "weight_mean")) == 2


# --- which pass ---


def test_the_scoring_pass_has_to_be_there(policy, tmp_path):
    trainer = build(FlowGRPOTrainer, policy, tmp_path, flow_pass="scoring")
    with pytest.raises(ValueError, match=r"there is none .*set flow_pass='auto'"):
        trainer.train()
    trained(policy, tmp_path, flow_pass="auto")


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], **options)


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


def test_dropout_is_in_the_pass_that_trains_and_not_in_one_of_its_own(policy, tmp_path):
    options = {"peft_config": lora(lora_dropout=0.5), "max_steps": 4, "learning_rate": 0.05}
    weights = {}
    for chosen in ("training", "extra"):
        _, seen = trained(policy, tmp_path, flow_pass=chosen, **options)
        weights[chosen] = torch.cat([step[WEIGHTS].flatten() for step in seen])
    assert not torch.equal(weights["training"], weights["extra"])


@pytest.mark.parametrize("chosen", ["training", "extra"])
def test_uniform_credit_is_plain_grpo_whatever_pass_is_read(policy, tmp_path, chosen):
    shared = {"max_steps": 3, "peft_config": lora(lora_dropout=0.5), "beta": 0.04}
    ours, _ = trained(policy, tmp_path, flow_gamma=1.0, flow_pass=chosen, **shared)
    plain, _ = trained(policy, tmp_path, GRPOTrainer, **shared)
    assert same_parameters(ours, plain)
    assert sum(logged(ours, "answer_found")) > 0


def test_what_nnsight_must_read_is_read_in_the_pass_that_trains(tmp_path):
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
        assert trainer._flow_credit._reader.tracer.reader.backend.name == "nnsight"
        weights[chosen] = torch.cat([step[WEIGHTS].flatten() for step in seen])
    assert torch.equal(weights["training"], weights["extra"])
    assert len(weights["training"].unique()) == 2


# --- when, and what if not ---


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
    from flowtracer_plugin.credit import read_rollouts, scorers
    from flowtracer_plugin.grpo import scoring
    from flowtracer_plugin.reading import one_pass as reading

    place = {
        "finding": (scoring, "rollout_masks"),
        "reading": (reading, "add_head_mean"),
        "solving": (read_rollouts, "solve_rollouts"),
        "choosing": (scorers, "top_tokens"),
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
    trainer._flow_credit._reader.tracer.reader.verify()
    seen = watched(trainer)
    monkeypatch.setattr(*place, fails_once)
    trainer.train()
    assert seen[0][WEIGHTS].eq(1).all()
    assert any(len(step[WEIGHTS].unique()) == 2 for step in seen)
    assert set(logged(trainer, "errors")) == {1.0}  # so far

    calls.clear()
    strict = build(FlowGRPOTrainer, policy, tmp_path, max_steps=3, **options)
    strict._flow_credit._reader.tracer.reader.verified = True
    with pytest.raises(ArithmeticError, match="no flow today"):
        strict.train()


def test_a_failing_model_is_not_a_failing_flow(policy, tmp_path):
    trainer = build(FlowGRPOTrainer, policy, tmp_path, flow_on_error="uniform")
    trainer._flow_credit._reader.tracer.reader.verify()
    passes: list[int] = []

    def fail(*_):
        if torch.is_grad_enabled():
            passes.append(1)
            raise RuntimeError("out of memory")

    trainer.model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert len(passes) == 1


# --- scorers ---


NAMES = [name for name in SCORERS if name != "uniform"]
NAMES += ["flow:sharp", "attention:decision", "flow*entropy", "attention:sharp*surprisal"]


def told(scorer):
    return {"flow_oracle": r"\w+"} if scorer == "oracle" else {}


@pytest.mark.parametrize("scorer", NAMES)
@pytest.mark.parametrize(
    "options", [{}, {"num_iterations": 2}, {"flow_pass": "extra"}], ids=name_of
)
def test_every_scorer_trains_with_its_own_choice(policy, tmp_path, scorer, options):
    options = {**options, **told(scorer)}
    trainer, seen = trained(
        policy, tmp_path, flow_scorer=scorer, rollout_func=scripted(LONG), max_steps=2, **options
    )
    weights = torch.cat([step[WEIGHTS].flatten() for step in seen])
    assert weights.max() > 1
    assert weights.min() == 1
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


# Entropies are computed by other means in TRL's training pass, and ties may fall otherwise.
@pytest.mark.parametrize("scorer", [name for name in NAMES if "entropy" not in name])
def test_a_scorer_chooses_the_same_in_every_pass(policy, tmp_path, scorer):
    chosen = {}
    for pass_ in ("training", "extra"):
        _, seen = trained(
            policy, tmp_path, flow_scorer=scorer, flow_pass=pass_, rollout_func=scripted(LONG),
            max_steps=1, **told(scorer),
        )  # fmt: skip
        chosen[pass_] = seen[0][WEIGHTS]
    torch.testing.assert_close(chosen["training"], chosen["extra"], rtol=0, atol=1e-6)


def test_uniform_is_plain_grpo(policy, tmp_path):
    ours, _ = trained(policy, tmp_path, flow_scorer="uniform")
    plain, _ = trained(policy, tmp_path, GRPOTrainer)
    assert same_parameters(ours, plain)


# --- what one sees of it ---


@pytest.mark.parametrize(
    "options",
    [{}, {"num_iterations": 2}, {"steps_per_generation": 2, "gradient_accumulation_steps": 2}],
    ids=name_of,
)
def test_the_table_of_completions_has_the_answers_beside_their_completions(
    policy, tmp_path, options
):
    import pandas

    build(
        FlowGRPOTrainer, policy, tmp_path, rollout_func=scripted([TEXTS[0], TEXTS[1], TEXTS[3]]),
        log_completions=True, max_steps=2, **options,
    ).train()  # fmt: skip
    (*_, last) = sorted((tmp_path / "out" / "completions").glob("*.parquet"))
    table = pandas.read_parquet(last)
    tokenizer = word_tokenizer()
    for _, row in table.iterrows():
        said = words(row["completion"])
        place = ANSWERS[TEXTS.index(row["completion"])]
        assert row["flow_answer"] == tokenizer.decode([said[place]])
        share = math.ceil(0.4 * len(said)) / len(said)
        assert row["flow_weight"] == pytest.approx(1 + 0.5 * share, abs=0.51 / len(said))
        assert 0 <= row["flow_prompt_jump"] <= 1
    assert len(table) >= 4


def test_tables_in_evaluation_stay_whole(policy, tmp_path):
    trainer = build(
        FlowGRPOTrainer, policy, tmp_path, log_completions=True, max_steps=2,
        per_device_eval_batch_size=2,
    )  # fmt: skip
    trainer.eval_dataset = trainer.train_dataset.select(range(4))
    for _ in range(2):
        trainer.evaluate()
        columns = trainer._logs["extra"].values()
        assert {len(column) for column in columns} == {len(trainer._logs["prompt"])}
        trainer.train()


@pytest.mark.parametrize(
    "options",
    [{}, {"num_iterations": 2}, {"steps_per_generation": 2, "gradient_accumulation_steps": 2}],
    ids=name_of,
)
def test_a_page_shows_the_group_of_the_first_prompt(policy, tmp_path, options):
    build(
        FlowGRPOTrainer, policy, tmp_path, rollout_func=scripted(TEXTS), max_steps=4,
        flow_page_steps=2, **options,
    ).train()  # fmt: skip
    folder = tmp_path / "out" / "flow"
    names = sorted(path.name for path in folder.glob("step_*.html"))
    assert names[0] == "step_000000.html"
    assert len(names) == 2
    assert (folder / "index.html").exists()


def test_pages_can_be_left_out_and_limited(policy, tmp_path):
    build(FlowGRPOTrainer, policy, tmp_path, flow_page_steps=0).train()
    assert not (tmp_path / "out" / "flow").exists()
    build(
        FlowGRPOTrainer, policy, tmp_path, max_steps=4, flow_page_steps=1, flow_page_limit_mb=0.0
    ).train()
    assert len(list((tmp_path / "out" / "flow").glob("step_*.html"))) == 1


def test_attached_credit_reads_the_training_pass_too(policy, tmp_path):
    plain = build(GRPOTrainer, policy, tmp_path, max_steps=2, rollout_func=scripted(TEXTS))
    trainer = attach_flow_credit(plain)
    passes = forwards(trainer)
    trainer._flow_credit._reader.tracer.reader.verify()
    passes.clear()
    trainer.train()
    assert all(passes)
    assert len(logged(trainer, "weight_mean")) == 2


def test_rows_stay_with_their_completions_through_the_shuffle(policy, tmp_path):
    trainer = build(FlowGRPOTrainer, policy, tmp_path, rollout_func=scripted(TEXTS), max_steps=1)
    seen = watched(trainer)
    trainer.train()
    (step,) = seen
    for row, place in enumerate(step[ROWS].tolist()):
        ids = step["completion_ids"][row][step["completion_mask"][row].bool()]
        assert word_tokenizer().decode(ids) == TEXTS[place % len(TEXTS)]
