"""Options, models and trainers that flow credit refuses."""

import importlib
import math
import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import MambaConfig, MambaForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOTrainer

import flowtracer_plugin.grpo
from flowtracer_plugin.attention import NoAttentionError
from flowtracer_plugin.grpo import (
    CreditOptions,
    FlowCreditMixin,
    FlowGRPOConfig,
    FlowGRPOTrainer,
    UnsupportedTrainerError,
    attach_flow_credit,
    checks,
    trl_version,
)
from tests.grpo.trained import LOSSES
from tests.grpo.worker import PROMPTS, WORDS, build, build_rloo, config, reward, word_tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("top_fraction", 1.5, "flow credit: top_fraction must be between 0 and 1, got 1.5"),
        ("gamma", -1.0, "flow credit: gamma must be at least 0, got -1.0"),
        ("gamma", math.nan, "flow credit: gamma must be at least 0, got nan"),
        ("target", "last", "target must be one of answer, decision, got 'last'"),
        ("sign", "plus", "sign must be one of both, positive, negative, got 'plus'"),
        ("normalize", "mean", "normalize must be one of none, mean_one, got 'mean'"),
        ("answer", "boxd", "name of an answer finder.*found 'boxd'"),
        ("no_answer", "skip", "no_answer must be one of uniform, raise, last, got 'skip'"),
        ("scorer", "flw", "flow credit: scorer must be one of flow, reach, .*got 'flw'"),
        ("scorer", "flow:blunt", "flow credit: preset must be one of paper, .*got 'blunt'"),
        ("scorer", "entropy:sharp", "flow credit: .*'entropy' reads none; leave out ':sharp'"),
        ("scorer", "flow*fai", "flow credit: .*choose ones that read the same"),
        ("scorer", "oracle", "'oracle' needs oracle.*got scorer 'oracle' and oracle None"),
        ("oracle", r"\d", "no other scorer does; got scorer 'flow' and oracle"),
        ("side", "middle", "side must be one of top, bottom, got 'middle'"),
        ("pass", "both", "pass must be one of auto, training, scoring, extra, got 'both'"),
        ("on_error", "skip", "on_error must be one of raise, uniform, got 'skip'"),
        ("start_step", -1, "start_step must be at least 0, got -1"),
        ("warmup_steps", -1, "warmup_steps must be at least 0, got -1"),
        ("page_steps", -1, "page_steps must be at least 0, got -1"),
        ("page_limit_mb", -1.0, "page_limit_mb must be at least 0, got -1.0"),
    ],
)
def test_options_out_of_range(policy, tmp_path, option, value, message):
    with pytest.raises(ValueError, match=message):
        config(FlowGRPOConfig, tmp_path, **{f"flow_{option}": value})
    with pytest.raises(ValueError, match=message):
        CreditOptions(**{{"pass": "pass_"}.get(option, option): value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scorer": "oracle", "oracle": "("}, r"oracle '\(' is no pattern: missing \)"),
        ({"scorer": "coupled", "side": "bottom"}, "'coupled' does not choose by the highest"),
        ({"scorer": "oracle", "oracle": "a", "side": "bottom"}, "'oracle' does not choose by the"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, message):
    with pytest.raises(ValueError, match=f"flow credit: .*{message}"):
        config(FlowGRPOConfig, tmp_path, **{f"flow_{name}": one for name, one in options.items()})
    with pytest.raises(ValueError, match=f"flow credit: .*{message}"):
        CreditOptions(**options)


def test_construction_refuses_layers_and_finders_that_do_not_exist(policy, tmp_path):
    with pytest.raises(ValueError, match="layers must be one of"):
        build(FlowGRPOTrainer, policy, tmp_path, flow_layers="upper")


def test_help_has_no_bare_percent_sign_and_options_parse():
    from trl import TrlParser

    parser = TrlParser((FlowGRPOConfig,))
    parser.format_help()
    (parsed,) = parser.parse_args_and_config(
        ["--output_dir", "x", "--flow_gamma", "2", "--flow_sign", "positive", "--use_cpu", "true"]
    )
    assert (parsed.flow_gamma, parsed.flow_sign) == (2.0, "positive")


def test_sequence_level_importance_sampling_is_refused(policy, tmp_path):
    message = "no effect with importance_sampling_level='sequence'.* Set importance_sampling_level"
    with pytest.raises(ValueError, match=message):
        config(FlowGRPOConfig, tmp_path, importance_sampling_level="sequence")
    trainer = build(GRPOTrainer, policy, tmp_path, importance_sampling_level="sequence")
    with pytest.raises(ValueError, match=message):
        attach_flow_credit(trainer)


def test_the_loss_check_alone_sees_sequence_level_importance_sampling(policy, tmp_path):
    trainer = build(GRPOTrainer, policy, tmp_path)
    checks.check_loss(trainer)
    trainer.importance_sampling_level = "sequence"
    with pytest.raises(UnsupportedTrainerError, match="one advantage per token"):
        checks.check_loss(trainer)


@pytest.mark.parametrize(
    "options",
    [
        *({"loss_type": loss, "beta": 0.04} for loss in LOSSES),
        {"top_entropy_quantile": 0.2},
        {"entropy_coef": 0.1},
        {"delta": 2.0},
        {"off_policy_mask_threshold": 0.5},
        {"use_bias_correction_kl": True, "beta": 0.04},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_the_loss_check_accepts_every_token_level_loss_and_leaves_no_trace(
    policy, tmp_path, options
):
    trainer = build(GRPOTrainer, policy, tmp_path, **options)
    before = {name: repr(value) for name, value in vars(trainer).items()}
    checks.check_loss(trainer)
    assert {name: repr(value) for name, value in vars(trainer).items()} == before


@pytest.mark.parametrize("broken", ["mean", "unsqueeze", "missing"])
def test_a_loss_that_does_not_read_advantages_per_token_is_refused(policy, tmp_path, broken):
    class Host(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            if broken == "missing":
                return super()._compute_loss(model, {**inputs, "advantages": inputs["weights"]})
            advantages = inputs["advantages"]
            advantages = advantages.mean(-1) if broken == "mean" else advantages.unsqueeze(1)
            return super()._compute_loss(model, {**inputs, "advantages": advantages})

    if broken == "missing":  # as if its own generation added it: checked with the first loss
        trainer = attach_flow_credit(build(Host, policy, tmp_path))
        with pytest.raises(UnsupportedTrainerError, match=r"loss of Host fails.*'weights'"):
            trainer.train()
        return
    with pytest.raises(UnsupportedTrainerError, match="that of Host does not"):
        attach_flow_credit(build(Host, policy, tmp_path))


@pytest.mark.filterwarnings("ignore:.*experimental")
def test_gmpo_is_refused(policy, tmp_path):
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    trainer = GMPOTrainer(
        policy,
        reward,
        args=config(GMPOConfig, tmp_path),
        processing_class=word_tokenizer(),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
    )
    with pytest.raises(UnsupportedTrainerError, match=r"that of GMPOTrainer does not .*FlowReward"):
        attach_flow_credit(trainer)

    class Mixed(FlowCreditMixin, GMPOTrainer):
        pass

    with pytest.raises(UnsupportedTrainerError, match="that of Mixed does not"):
        build(Mixed, policy, tmp_path)


def test_hosts_that_are_no_grpo_trainer_are_refused(policy, tmp_path):
    class Mixed(FlowCreditMixin, RLOOTrainer):
        pass

    with pytest.raises(UnsupportedTrainerError, match=r"Mixed is none.*FlowReward"):
        Mixed(policy, reward)
    with pytest.raises(UnsupportedTrainerError, match=r"RLOOTrainer is none.*FlowReward"):
        attach_flow_credit(build_rloo(policy, tmp_path, reward))
    with pytest.raises(UnsupportedTrainerError, match="str is none"):
        attach_flow_credit("GRPOTrainer")


def test_unsloths_trainer_is_refused(policy, tmp_path):
    generated = type("UnslothGRPOTrainer", (GRPOTrainer,), {})
    with pytest.raises(UnsupportedTrainerError, match=r"Unsloth's.* from trl before.* FlowReward"):
        attach_flow_credit(build(generated, policy, tmp_path))

    class Mixed(FlowCreditMixin, generated):
        pass

    with pytest.raises(UnsupportedTrainerError, match="Mixed is Unsloth's"):
        Mixed(policy, reward)


@pytest.mark.usefixtures("unchecked")
def test_a_plain_config_is_refused(policy, tmp_path):
    with pytest.raises(TypeError, match=r"needs args=FlowGRPOConfig\(...\), got GRPOConfig"):
        FlowGRPOTrainer(
            policy,
            reward,
            args=config(GRPOConfig, tmp_path),
            processing_class=word_tokenizer(),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        )


def import_again(monkeypatch, installed):
    """`grpo.trainer`, imported where TRL has this version; None where it is missing."""

    def version(name):
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(trl_version, "version", version)
    monkeypatch.delitem(sys.modules, "flowtracer_plugin.grpo.trainer")
    return importlib.import_module("flowtracer_plugin.grpo.trainer")


@pytest.mark.parametrize("installed", ["0.20.0", "1.15.2", "1.17.0", "2.1"])
def test_other_releases_of_trl_are_refused_before_they_are_imported(installed, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=rf"needs trl>=1.16,<1.17, and {installed} is installed"):
        import_again(monkeypatch, installed)
    assert "trl" not in sys.modules


@pytest.mark.parametrize("installed", ["1.16.0", "1.16.3"])
def test_known_releases_of_trl_are_accepted(installed, monkeypatch):
    assert import_again(monkeypatch, installed).FlowGRPOTrainer


def test_without_trl_the_message_says_what_to_install(monkeypatch):
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'flowtracer-plugin\[trl\]'"):
        import_again(monkeypatch, None)
    monkeypatch.delattr(flowtracer_plugin.grpo, "UnsupportedTrainerError", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"^flowtracer_plugin.grpo needs TRL"):
        flowtracer_plugin.grpo.UnsupportedTrainerError  # noqa: B018


def test_a_tokenizer_is_found_in_a_processor_and_missed_elsewhere(policy, tmp_path):
    tokenizer = word_tokenizer()
    assert checks.find_tokenizer(SimpleNamespace(tokenizer=tokenizer)) is tokenizer
    trainer = build(GRPOTrainer, policy, tmp_path)
    trainer.processing_class = None
    with pytest.raises(ValueError, match=r"processing_class=NoneType; pass processing_class="):
        attach_flow_credit(trainer)


def test_a_model_without_attention_is_refused(tmp_path):
    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(NoAttentionError):
        build(FlowGRPOTrainer, mamba, tmp_path)
