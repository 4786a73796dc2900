r"""`flowtracer train`: GRPO with flow credit on the command line, in the style of TRL's scripts.

    flowtracer train --model_name_or_path Qwen/Qwen3-0.6B --dataset_name openai/gsm8k \
        --dataset_config main --prompt_column question --answer_column answer \
        --prompt_template hash --reward_funcs math_answer --output_dir out
    accelerate launch -m flowtracer_plugin train --config run.yaml

`examples/grpo_flow.py` does the same in a script to copy and change.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from flowtracer_plugin.files import check_folder
from flowtracer_plugin.model.loading import load_model, load_tokenizer
from flowtracer_plugin.grpo.trainer import FlowGRPOConfig, FlowGRPOTrainer
from flowtracer_plugin.grpo.options import documented
from flowtracer_plugin.grpo.settings import settings_line
from flowtracer_plugin.rewards.flow_reward import FlowReward
from flowtracer_plugin.rewards.named import imported_reward, named_reward
from flowtracer_plugin.trace.tracer import FlowTracer, wrap
from flowtracer_plugin.text.data_sets import columns, load_rows, with_prompts

# ruff: noqa: I001 (grpo.trainer checks the release of TRL before anything of it is imported)
import torch
import yaml
from datasets import disable_progress_bars
from trl.scripts.utils import ScriptArguments, TrlParser
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_peft_config, get_quantization_config

REWARDS = ("math_answer", "flow", "reasoning_share", "concentration", "math_flow")
"""The rewards that have a name; "flow" means "reasoning_share"."""


@dataclass
class FlowScriptArguments(ScriptArguments):
    r"""Arguments of the training script, in addition to those of the trainer and the model.

    It has those of [`~trl.ScriptArguments`]; `dataset_name` may also be a local file.

    Parameters:
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column of the questions: texts, or lists of chat messages.
        answer_column (`str`, *optional*):
            Column of the right answers, which reward functions get as `answer`.
        prompt_template (`str`, *optional*):
            Text with `{prompt}` in the place of the question; or `"hash"` or `"boxed"`, which ask
            for an answer after `####` or in `\boxed{}`.
        system_prompt (`str`, *optional*):
            System message before each question.
        chat (`bool`, *optional*, defaults to `True`):
            Whether texts become chat messages if the tokenizer has a chat template.
        reward_funcs (`list[str]`, *optional*):
            Reward functions: `math_answer`, `flow` (or `reasoning_share`), `concentration`,
            `math_flow`, or dotted paths, also of modules in the current folder.
        reward_model_name_or_path (`str`, *optional*):
            Reward model: a folder or an id on the hub.
        trace_model_name_or_path (`str`, *optional*):
            Frozen model whose attention the flow rewards trace. By default they trace the model
            that is trained.
    """

    prompt_column: str = documented(__doc__, "prompt_column", "prompt")
    answer_column: str | None = documented(__doc__, "answer_column", None)
    prompt_template: str | None = documented(__doc__, "prompt_template", None)
    system_prompt: str | None = documented(__doc__, "system_prompt", None)
    chat: bool = documented(__doc__, "chat", True)
    reward_funcs: list[str] | None = documented(__doc__, "reward_funcs", None)
    reward_model_name_or_path: str | None = documented(__doc__, "reward_model_name_or_path", None)
    trace_model_name_or_path: str | None = documented(__doc__, "trace_model_name_or_path", None)


Arguments = tuple[FlowScriptArguments, FlowGRPOConfig, ModelConfig]


def parse(arguments: Sequence[str] | None = None, prog: str | None = None) -> Arguments:
    """The arguments of a command line and of the file that `--config` names.

    Raises:
        ValueError: An argument is unknown, has an invalid value, or lacks one, or the file cannot
            be read.
    """
    _check_config(sys.argv[1:] if arguments is None else arguments)
    kinds: Any = (FlowScriptArguments, FlowGRPOConfig, ModelConfig)
    # Only the command takes the model first; a script of TRL's kind takes options alone.
    place, name = ("[MODEL] ", "") if prog else ("", "--model_name_or_path ")
    parser = _Parser(
        kinds,
        prog=prog,
        usage=f"%(prog)s {place}[--config FILE.yaml] [--OPTION VALUE ...]",
        description=_EXAMPLE.format(name=name),
        formatter_class=_HelpFormatter,
    )
    if not torch.accelerator.is_available():
        parser.set_defaults(use_cpu=True, bf16=False)  # TRL's defaults are for accelerators
    parsed: Any
    *parsed, unknown = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0], known, n=1)
        meant = f"did you mean {near[0]}?" if near else "--help shows what there is"
        raise ValueError(f"there is no option {unknown[0]!r}; {meant}")
    return tuple(parsed)


def _check_config(arguments: Sequence[str]) -> None:
    """Check the file of `--config`, whose damages TRL's parser reports without its name."""
    if any(argument.startswith("--config=") for argument in arguments):
        raise ValueError("--config takes its file as the next argument: --config FILE.yaml")
    if "--config" not in arguments[:-1]:
        if "--config" in arguments:
            raise ValueError("--config needs a file of YAML after it")
        return
    name = arguments[arguments.index("--config") + 1]
    try:
        settings = yaml.safe_load(Path(name).read_text("utf-8"))
        found = f"{settings!r:.80}"
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        settings, found = None, " ".join(str(error).split())
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ValueError(
            f"cannot read the settings in {name!r}: wanted YAML in UTF-8 with lines such as "
            f"'output_dir: out', found {found}"
        )


def build_trainer(
    script_args: FlowScriptArguments,
    training_args: FlowGRPOConfig,
    model_args: ModelConfig,
    *,
    reward_funcs: Sequence[Callable[..., Any]] = (),
) -> FlowGRPOTrainer:
    """The trainer with its model, data and rewards; `reward_funcs` are added to the named ones.

    Raises:
        ValueError: Model, data or a column is missing, there is no reward, or one cannot be
            imported.
        OSError: Nothing can be written to the output folder.
    """
    if training_args.should_save:
        check_folder(Path(training_args.output_dir or "."))
    name = model_args.model_name_or_path
    if not name:
        raise ValueError("no model: pass --model_name_or_path FOLDER, or an id on the hub")
    shared: dict[str, Any] = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
    }
    tokenizer = load_tokenizer(name, padding_side="left", truncation_side="left", **shared)
    # The trainer is made below; a reward needs it when the first completions come.
    rewards = _rewards(script_args, lambda: _tracer(trainer, script_args), reward_funcs)
    has_eval = training_args.eval_strategy != "no"
    train_rows = _rows(script_args, script_args.dataset_train_split, tokenizer)
    eval_rows = _rows(script_args, script_args.dataset_test_split, tokenizer) if has_eval else None
    needs_answers = {"math_answer", "math_flow"} & set(script_args.reward_funcs or ())
    if needs_answers and "answer" not in columns(train_rows):
        raise ValueError(
            f"{needs_answers.pop()} needs the right answers: pass --answer_column; the data have "
            f"{', '.join(map(repr, columns(train_rows)))}"
        )
    given: Any = training_args.model_init_kwargs or {}
    training_args.model_init_kwargs = {
        **shared,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **given,
    }
    trainer = FlowGRPOTrainer(
        model=name,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    return trainer


def train(trainer: FlowGRPOTrainer) -> None:
    """Train, from a checkpoint if the arguments name one, then save model and trainer state.

    `--resume_from_checkpoint` takes a folder, or `true` for the last one in the output folder.

    Raises:
        ValueError: There is no such checkpoint.
    """
    args, say = trainer.args, trainer.accelerator.print
    say(f"flow credit: {settings_line(args.flow_credit)}")
    trainer.train(resume_from_checkpoint=_checkpoint(args.resume_from_checkpoint))
    trainer.save_model(args.output_dir)
    trainer.save_state()  # with the log of every step
    say(f"wrote {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()  # type: ignore[no-untyped-call]


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the script with these arguments, by default those of the command line."""
    if not sys.stderr.isatty():
        disable_progress_bars()  # in a log file each of their updates would be a line
    # TRL sets an option that transformers has renamed; users can do nothing about the warning.
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
    train(build_trainer(*parse(arguments, prog)))


_EXAMPLE = """For example:

%(prog)s {name}Qwen/Qwen3-0.6B --dataset_name data.jsonl --reward_funcs math_answer
"""


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows the defaults, and keeps the example on its own line."""


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        """Raise the error without two hundred lines of usage before it."""
        raise ValueError(f"{message}; --help shows what there is")


def _rows(script_args: FlowScriptArguments, split: str, tokenizer: Any) -> Any:
    if not script_args.dataset_name:
        raise ValueError("no data: pass --dataset_name FILE, or the name of a data set on the hub")
    rows = load_rows(
        script_args.dataset_name,
        split,
        config=script_args.dataset_config,
        streaming=script_args.dataset_streaming,
    )
    return with_prompts(
        rows,
        prompt_column=script_args.prompt_column,
        answer_column=script_args.answer_column,
        template=script_args.prompt_template,
        system=script_args.system_prompt,
        chat=script_args.chat and tokenizer.chat_template is not None,
    )


def _rewards(
    script_args: FlowScriptArguments,
    tracer: Callable[[], FlowTracer],
    given: Sequence[Callable[..., Any]],
) -> list[Any]:
    named = [_reward(name, tracer) for name in script_args.reward_funcs or ()]
    model = script_args.reward_model_name_or_path
    rewards = [*([model] if model else []), *named, *given]
    if not rewards:
        raise ValueError(
            f"no reward: pass --reward_funcs with some of {', '.join(REWARDS)}, or dotted paths"
        )
    return rewards


def _reward(name: str, tracer: Callable[[], FlowTracer]) -> Callable[..., Any]:
    if name == "math_answer":
        return named_reward(name)
    if name == "math_flow":
        return FlowReward(tracer, outcome=named_reward("math_answer"), name=name)
    if name in REWARDS:
        return FlowReward(tracer, score="reasoning_share" if name == "flow" else name)
    return imported_reward(name, REWARDS)


def _tracer(trainer: FlowGRPOTrainer, script_args: FlowScriptArguments) -> FlowTracer:
    """The tracer of the model that is trained, or of the model that the arguments name."""
    name, args = script_args.trace_model_name_or_path, trainer.args
    model: Any = trainer.model
    tokenizer: Any = trainer.processing_class
    if name:
        model = load_model(name, str(trainer.accelerator.device), "auto")
        tokenizer = load_tokenizer(name)
    options = args.credit_options()
    return wrap(
        model,
        tokenizer,
        preset=options.chosen_scorer.preset or "paper",
        layers=options.chosen_layers,
        answer=options.answer,
        target=options.target,
    )


def _checkpoint(given: str | None) -> str | bool | None:
    """The checkpoint as transformers takes it: a folder, or True for the last one."""
    if given is None or given.lower() in {"false", "none"}:
        return None
    if given.lower() == "true":
        return True
    if not Path(given).is_dir():
        raise ValueError(
            f"there is no checkpoint {given!r}; pass a folder checkpoint-N, or true for the last "
            "one in --output_dir"
        )
    return given
