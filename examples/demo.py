"""In under a minute on two cores: train a small reasoner with flow credit, and look at its answer.

python examples/demo.py [--steps N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging

import flowtracer_plugin as ft
from flowtracer_plugin.grpo import FlowGRPOConfig, FlowGRPOTrainer

if not __package__:  # as a script, this file does not find its neighbours
    sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.reasoner.problems import is_correct, make_problems
from examples.reasoner.train import MAX_NEW_TOKENS, MODEL_DIR, accuracy

HELD_OUT = 1024
BATCH = 128

console = Console()


def accuracy_reward(completions: list[str], answer: list[int], **_: Any) -> list[float]:
    """1 for a right answer, 0 otherwise."""
    return [
        float(is_correct(text, wanted)) for text, wanted in zip(completions, answer, strict=True)
    ]


def main() -> None:
    arguments = _arguments()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # on a model this small, more threads only wait for each other
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, padding_side="left")

    console.rule("1  Train with flow credit")
    before = measured(model, tokenizer)
    train(model, tokenizer, arguments.steps, arguments.out)
    after = measured(model, tokenizer)
    report(before, after, arguments.steps)

    console.rule("2  Trace one solved problem")
    trace = solved_trace(model, tokenizer)
    console.print(trace)

    console.rule("3  The same as a page")
    page = trace.to_html(arguments.out / "demo.html")
    console.print(f"open {page.resolve()} in a browser", soft_wrap=True)

    console.rule("4  Your own model")
    console.print(
        "import flowtracer_plugin as ft\n"
        "tracer = ft.wrap(model, tokenizer)              # any Hugging Face causal LM\n"
        'tracer.generate("What is 17 * 3?").to_html("trace.html")',
        highlight=False,
    )


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, steps: int, out: Path
) -> None:
    """Train with GRPO, with more credit for the tokens that carried an answer."""
    problems = make_problems(8 * steps, seed=2)
    rows = [{"prompt": problem.prompt, "answer": problem.answer} for problem in problems]
    trainer = FlowGRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[accuracy_reward],
        train_dataset=Dataset.from_list(rows),
        callbacks=[Progress(steps)],
        args=FlowGRPOConfig(
            output_dir=str(out / "demo_run"),
            max_steps=steps,
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=MAX_NEW_TOKENS,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
            seed=0,
        ),
    )
    trainer.remove_callback(PrinterCallback)  # the progress bar says enough
    trainer.train()


class Progress(TrainerCallback):
    """A progress bar with the reward and the share of rollouts in which an answer was found."""

    def __init__(self, steps: int) -> None:
        self.bar = tqdm(total=steps, desc="GRPO with flow credit", unit="step")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "reward" in logs:
            self.bar.set_postfix(
                reward=f"{logs['reward']:.2f}", answers=f"{logs['flow/answer_found']:.0%}"
            )

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.bar.update()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.bar.close()


def measured(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[float, float]:
    """The sampled accuracy on held-out problems, and its standard error."""
    parts = tqdm(range(0, HELD_OUT, BATCH), desc="held-out accuracy", unit="batch")
    problems = make_problems(HELD_OUT, seed=1, split="held_out")
    shares = [
        accuracy(model, tokenizer, problems[start : start + BATCH], sample=True) for start in parts
    ]
    share = sum(shares) / len(shares)
    return share, math.sqrt(share * (1 - share) / HELD_OUT)


def report(before: tuple[float, float], after: tuple[float, float], steps: int) -> None:
    gain, noise = after[0] - before[0], math.hypot(before[1], after[1])
    console.print(
        f"held-out accuracy, {HELD_OUT} sampled answers\n"
        f"  before             {before[0]:6.1%}  ± {before[1]:.1%}\n"
        f"  after {steps:3} steps    {after[0]:6.1%}  ± {after[1]:.1%}\n"
        f"  gain               {gain:+6.1%}  ± {noise:.1%}  "
        f"({gain / noise:.0f} times its standard error)",
        highlight=False,
    )
    if gain < 3 * noise:
        raise SystemExit("training did not raise the accuracy beyond the noise")
    console.print(
        "Plain GRPO learns this task too: the run shows that everything works together, not that "
        "a model learns faster with flow credit.",
        style="dim",
    )


def solved_trace(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ft.FlowTrace:
    """The trace of the first held-out problem that the model solves."""
    tracer = ft.wrap(model, tokenizer)
    for problem in make_problems(HELD_OUT, seed=1, split="held_out"):
        try:
            trace = tracer.generate(problem.prompt, max_new_tokens=MAX_NEW_TOKENS)
        except ft.AnswerNotFoundError:
            continue
        if is_correct(trace.text, problem.answer):
            return trace
    raise SystemExit("the model solved none of the held-out problems")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="GRPO steps")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for results")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
