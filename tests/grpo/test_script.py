"""The training script: its arguments, its data, its rewards, and real runs of it."""

import inspect
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.scripts.utils import ScriptArguments

from flowtracer_plugin.credit.scorers import SCORERS
from flowtracer_plugin.grpo import FlowGRPOConfig, script as training
from flowtracer_plugin.grpo.options import documented
from flowtracer_plugin.grpo.script import build_trainer, main, parse, train
from flowtracer_plugin.rewards import math_answer
from tests.grpo.worker import PROMPTS, config, word_tokenizer

ROOT = Path(__file__).parents[2]
ROWS = [{"question": prompt, "solution": f"so #### {n}"} for n, prompt in enumerate(PROMPTS * 2)]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def data(tmp_path):
    return written(tmp_path / "data.jsonl")


def written(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(policy, data, folder, *more, rewards=("math_answer",)):
    return [
        *("--model_name_or_path", policy, "--dataset_name", str(data)),
        *("--prompt_column", "question", "--answer_column", "solution", "--no_chat"),
        *(("--reward_funcs", *rewards) if rewards else ()),
        *("--output_dir", str(folder / "out"), "--use_cpu", "true", "--bf16", "false"),
        *("--max_steps", "2", "--num_generations", "2", "--max_completion_length", "8"),
        *("--per_device_train_batch_size", "4", "--logging_steps", "1", "--disable_tqdm", "true"),
        *("--learning_rate", "1e-2", "--save_strategy", "no"),
        *map(str, more),
    ]


def built(policy, data, folder, *more, **options):
    return build_trainer(*parse(arguments(policy, data, folder, *more, **options)))


def state(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


# arguments


def test_every_option_of_flow_credit_is_one_of_the_script():
    given = {
        field.name: 0.25 if field.name == "flow_top_fraction" else field.default
        for field in fields(FlowGRPOConfig)
        if field.name.startswith("flow_") and isinstance(field.default, str | int | float)
    }
    flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    _, training_args, _ = parse([*flags, "--use_cpu", "true"])
    assert {name: getattr(training_args, name) for name in given} == given
    assert training_args.flow_top_fraction == 0.25


def test_a_machine_without_accelerator_trains_on_its_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    _, args, _ = parse([])
    assert args.use_cpu
    assert not args.bf16
    _, args, _ = parse(["--bf16", "true"])
    assert args.bf16


def test_the_command_line_overrides_the_file_of_arguments(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("prompt_column: question\nflow_gamma: 2\nuse_cpu: true\nlora_r: 3\n")
    script_args, training_args, model_args = parse(["--config", str(file), "--flow_gamma", "3"])
    assert script_args.prompt_column == "question"
    assert training_args.flow_gamma == 3
    assert model_args.lora_r == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--promt_column", "a"], "there is no option '--promt_column'; did you mean --prompt_col"),
        (["--xyzzy"], "there is no option '--xyzzy'; --help shows what there is"),
        (["--learning_rate", "much"], "argument --learning_rate.*: invalid float value: 'much'"),
        (["--flow_gamma", "-1"], "flow credit: gamma must be at least 0, got -1.0"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_errors_name_the_wrong_argument(given, message):
    with pytest.raises((ValueError, OSError), match=message):
        parse([*given, "--use_cpu", "true"])


@pytest.mark.parametrize(
    "content",
    [
        b"a:\n\t- b: c\n",
        b"- output_dir\n",
        b"",
        b"1: 2\n",
        b"output_dir: \xe9\n",
        "output_dir: x\n".encode("utf-16"),
        bytes(range(256)),
        b"a: " + b"[" * 5000,
        b"!!python/object/apply:os.system ['true']\n",
    ],
    ids=lambda content: repr(content[:20]),
)
def test_a_damaged_file_of_options_is_named(tmp_path, content):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read the settings in '.*run\.yaml': wanted YAML"):
        parse(["--config", str(tmp_path / "run.yaml")])


def test_a_file_of_options_must_be_named():
    with pytest.raises(ValueError, match="--config needs a file of YAML after it"):
        parse(["--config"])
    with pytest.raises(ValueError, match=r"--config takes its file as the next argument: --config"):
        parse(["--config=run.yaml"])


def test_an_output_folder_is_tried_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("old")
    for folder in (tmp_path / "file", tmp_path / "file" / "new", "/proc/new"):
        parsed = parse(["--model_name_or_path", "nowhere", "--output_dir", str(folder)])
        with pytest.raises(OSError, match=r"cannot write to the folder .* name a folder that you"):
            build_trainer(*parsed)
    assert (tmp_path / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_options_in_a_file_must_exist_too(tmp_path):
    (tmp_path / "run.yaml").write_text("promt_column: question\nuse_cpu: true\n")
    with pytest.raises(ValueError, match="there is no option '--promt_column'; did you mean"):
        parse(["--config", str(tmp_path / "run.yaml")])


# data


def test_the_error_names_data_that_the_hub_does_not_have():
    given = ["--model_name_or_path", "examples/reasoner/model", "--reward_funcs", "flow"]
    ran = command(
        *given, *("--use_cpu", "true", "--dataset_name", "nobody/nothing"), HF_HUB_OFFLINE="1"
    )
    assert ran.returncode == 1
    assert ran.stdout == ""
    (sentence,) = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert "cannot load split 'train' of 'nobody/nothing': " in sentence
    assert "Warning" not in ran.stderr
    assert "Traceback" not in ran.stderr


def test_it_trains_saves_and_names_its_folder(policy, data, tmp_path, capsys):
    names = ("math_answer", "flow", "concentration", "math_flow")
    main(arguments(policy, data, tmp_path, rewards=names))
    said = capsys.readouterr().out
    assert said.endswith(f"wrote {tmp_path / 'out'}\n")
    assert "flow credit: scorer=flow, gamma=1.5, top_fraction=0.4; throughput" in said
    assert not same(state(tmp_path / "out"), state(policy))
    log = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    assert max(step.get("flow/answer_found", 0) for step in log) > 0
    for name in ("math_answer", "reasoning_share", "concentration", "math_flow"):
        assert f"rewards/{name}/mean" in log[0], name


def test_uniform_credit_is_plain_grpo_with_the_same_data_and_seed(policy, data, tmp_path):
    def digits(completions, **columns):
        return [float(sum(map(ord, text)) % 7) for text in completions]

    parsed = parse(arguments(policy, data, tmp_path, "--flow_gamma", 1, rewards=()))
    ours = build_trainer(*parsed, reward_funcs=[digits])
    ours.train()
    settings = config(GRPOConfig, tmp_path)
    theirs = GRPOTrainer(
        policy,
        digits,
        args=settings,
        processing_class=word_tokenizer(),
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS * 2}),
    )
    theirs.train()
    assert same(ours.model.state_dict(), theirs.model.state_dict())
    assert not same(ours.model.state_dict(), state(policy))


def test_flow_rewards_trace_the_model_that_is_trained_with_the_options_of_its_credit(
    policy, data, tmp_path
):
    more = ("--flow_layers", "late:1", "--flow_target", "decision", "--flow_answer", "hash")
    trainer = built(policy, data, tmp_path, *more, rewards=("flow",))
    tracer = trainer.reward_funcs[0].tracer
    assert tracer.model is trainer.model
    assert tracer.layers == (4,)
    assert (tracer.options.target, tracer.options.answer) == ("decision", "hash")


def test_flow_rewards_can_trace_a_model_that_is_not_trained(policy, data, tmp_path):
    trainer = built(policy, data, tmp_path, "--trace_model_name_or_path", policy, rewards=("flow",))
    train(trainer)
    traced = trainer.reward_funcs[0].tracer.model
    assert same(traced.state_dict(), state(policy))
    assert not same(trainer.model.state_dict(), state(policy))


def test_a_chat_template_is_used_if_there_is_one(policy, data, tmp_path):
    trainer = built(policy, data, tmp_path)
    assert trainer.train_dataset[0]["prompt"] == PROMPTS[0]
    script_args, *others = parse(arguments(policy, data, tmp_path))
    script_args.chat = True
    trainer = build_trainer(script_args, *others)
    assert trainer.train_dataset[0]["prompt"] == [{"role": "user", "content": PROMPTS[0]}]


def test_lora_is_trained_and_saved_as_an_adapter(policy, data, tmp_path):
    lora = ("--use_peft", "--lora_r", 4, "--lora_target_modules", "q_proj", "v_proj")
    trainer = built(policy, data, tmp_path, *lora, rewards=("math_answer", "flow"))
    assert isinstance(trainer.model, PeftModel)
    train(trainer)
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    assert trainer.reward_funcs[1].tracer.model is trainer.model


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(policy, data, tmp_path):
    steps = ("--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2)
    rewards = ("math_answer", "flow")
    main(arguments(policy, data, tmp_path, *steps, rewards=rewards))
    wanted = state(tmp_path / "out")
    assert not same(wanted, state(policy))
    first = tmp_path / "out/checkpoint-2"
    main(
        arguments(
            policy, data, tmp_path, *steps, "--resume_from_checkpoint", first, rewards=rewards
        )
    )
    assert same(state(tmp_path / "out"), wanted)
    trainer = built(policy, data, tmp_path, *steps, "--resume_from_checkpoint", "true")
    train(trainer)
    assert trainer.state.global_step == 4  # from checkpoint-4: nothing is left to do
    assert same(trainer.model.state_dict(), wanted)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere", "there is no checkpoint 'nowhere'; pass a folder checkpoint-N, or true"),
        ("true", "No valid checkpoint found in output directory"),
        (".", "valid checkpoint"),
    ],
)
def test_the_error_names_a_missing_checkpoint(policy, data, tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    trainer = built(policy, data, tmp_path, "--resume_from_checkpoint", given)
    with pytest.raises(ValueError, match=message):
        train(trainer)


@pytest.mark.parametrize("given", ["false", "None"])
def test_a_run_need_not_be_resumed(policy, data, tmp_path, given):
    trainer = built(policy, data, tmp_path, "--resume_from_checkpoint", given)
    train(trainer)
    assert trainer.state.global_step == 2


def test_a_split_is_held_out(policy, data, tmp_path):
    wanted = ("--eval_strategy", "steps", "--eval_steps", 1, "--per_device_eval_batch_size", 4)
    with pytest.raises(ValueError, match=r"cannot load split 'test'.*train\[:95%\]"):
        built(policy, data, tmp_path, *wanted)
    splits = ("--dataset_train_split", "train[:4]", "--dataset_test_split", "train[4:]")
    trainer = built(policy, data, tmp_path, *wanted, *splits)
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (4, 4)
    train(trainer)
    assert any("eval_reward" in step for step in trainer.state.log_history)


# rewards


def test_a_reward_is_imported_by_its_path(policy, data, tmp_path, monkeypatch):
    (tmp_path / "my_own_rewards.py").write_text(
        "def short(completions, solution, **columns):\n"
        "    return [1 / (1 + len(text)) for text in completions]\n"
        "class Scorer: pass\n"
        "number = 5\n"
    )
    monkeypatch.chdir(tmp_path)
    rewards = ("my_own_rewards.short", "trl.rewards.think_format_reward")
    trainer = built(policy, data, tmp_path, rewards=rewards)
    assert [func.__name__ for func in trainer.reward_funcs] == ["short", "think_format_reward"]
    for path, message in {
        "my_own_rewards.long": "cannot import the reward 'my_own_rewards.long': module 'my_own",
        "my_other_rewards.short": "cannot import the reward .*No module named 'my_other_rewards'",
        "my_own_rewards.Scorer": "must be a function or an instance that can be called, got <class",
        "my_own_rewards.number": "must be a function or an instance that can be called, got 5",
        "math_anser": "there is no reward 'math_anser'; wanted one of math_answer, flow, .* dotted",
    }.items():
        with pytest.raises(ValueError, match=message):
            built(policy, data, tmp_path, rewards=(path,))


def test_a_reward_model_can_score(policy, data, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "scorer")
    word_tokenizer().save_pretrained(tmp_path / "scorer")
    scorer = ("--reward_model_name_or_path", tmp_path / "scorer")
    trainer = built(policy, data, tmp_path, *scorer, "--max_steps", 1)
    train(trainer)
    assert "rewards/scorer/mean" in trainer.state.log_history[0]
    assert trainer.reward_funcs[1] is math_answer


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("model_name_or_path", "no model: pass --model_name_or_path"),
        ("dataset_name", "no data: pass --dataset_name"),
        ("reward_funcs", "no reward: pass --reward_funcs with some of math_answer, flow"),
        (
            "answer_column",
            "math_answer needs the right answers: pass --answer_column; .*'solution'",
        ),
    ],
)
def test_errors_name_the_missing_option(policy, data, tmp_path, left_out, message):
    parsed = parse(arguments(policy, data, tmp_path))
    for part in parsed:
        if hasattr(part, left_out):
            setattr(part, left_out, None)
    with pytest.raises(ValueError, match=message):
        build_trainer(*parsed)


# as a program


def command(*more, module=("-m", "flowtracer_plugin", "train"), **environment):
    """`flowtracer train`, or a script, in a process."""
    return subprocess.run(
        [sys.executable, *module, *map(str, more)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'adapters'}",
            **environment,
        },
    )


GSM8K = [
    {
        "question": "Natalia sold clips to 48 of her friends in April, and half as many in May.",
        "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72",
    }
] * 4


@pytest.fixture
def worked(policy, tmp_path, monkeypatch):
    """The worked example with another model, fewer tokens and a file in place of the hub's data."""
    monkeypatch.chdir(ROOT)
    return [
        *("--config", "examples/gsm8k.yaml", "--model_name_or_path", policy),
        *("--dataset_name", written(tmp_path / "gsm8k.jsonl", GSM8K), "--eval_strategy", "no"),
        *("--output_dir", tmp_path / "out", "--use_cpu", "true", "--bf16", "false"),
        *("--max_steps", 1, "--max_completion_length", 4, "--gradient_accumulation_steps", 1),
    ]


def test_the_command_runs_the_worked_example(worked, tmp_path, flowtracer):
    ran = flowtracer("train", *worked)
    assert ran.code == 0, ran.err
    assert "rewards/math_answer/mean" in ran.out
    assert "rewards/asked_for/mean" not in ran.out
    assert state(tmp_path / "out")


def test_the_example_script_runs_the_worked_example(worked, tmp_path):
    ran = command(*worked, module=("examples/grpo_flow.py",), HF_HOME=str(tmp_path / "hf"))
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "rewards/math_answer/mean" in ran.stdout
    assert "rewards/asked_for/mean" in ran.stdout
    assert state(tmp_path / "out")


def test_the_worked_example_sets_options_that_exist():
    settings = yaml.safe_load((ROOT / "examples/gsm8k.yaml").read_text())
    script_args, training_args, model_args = parse(
        ["--config", str(ROOT / "examples/gsm8k.yaml"), "--use_cpu", "true"]
    )
    for name, value in settings.items():
        (holder,) = [
            part for part in (script_args, training_args, model_args) if hasattr(part, name)
        ]
        assert getattr(holder, name) == value, name


@pytest.mark.real_model
def test_a_pretrained_model_takes_a_step(tmp_path):
    model = Path(os.environ["FLOWTRACER_MODELS"]) / "stories260K"
    if not model.is_dir():
        pytest.skip("FLOWTRACER_MODELS has no folder stories260K")
    given = ("--max_steps", 1, "--flow_no_answer", "last")
    trainer = built(
        str(model), written(tmp_path / "data.jsonl"), tmp_path, *given, rewards=("math_answer",)
    )
    train(trainer)
    assert trainer.state.log_history[0]["flow/weight_mean"] > 1


def helps(kind, inherited):
    """The help of each field that a configuration class adds."""
    names = {one.name for one in fields(inherited)}
    return {one.name: one.metadata["help"] for one in fields(kind) if one.name not in names}


def test_every_option_has_its_help_and_lists_what_it_takes():
    script = helps(training.FlowScriptArguments, ScriptArguments)
    credit = helps(FlowGRPOConfig, GRPOConfig)
    assert all(len(text) > 20 for text in (*script.values(), *credit.values()))
    assert all(name in script["reward_funcs"] for name in training.REWARDS)
    assert all(name in credit["flow_scorer"] for name in SCORERS)


def test_help_is_found_in_a_docstring_without_its_indentation():
    """Python 3.13 stores docstrings so."""
    for doc in (FlowGRPOConfig.__doc__, inspect.cleandoc(FlowGRPOConfig.__doc__)):
        found = documented(doc, "flow_gamma", 1.5)
        assert found.metadata["help"].startswith("Factor on the advantage of these tokens.")
        assert "flow_layers" not in found.metadata["help"]
    linked = documented(FlowGRPOConfig.__doc__, "flow_answer", "auto").metadata["help"]
    assert "Pass a pattern or a function to attach_flow_credit instead." in linked
