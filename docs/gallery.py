"""The example pages of the documentation, made anew whenever it is built.

    python docs/gallery.py FOLDER                  # writes the pages
    python docs/gallery.py --chat MODEL            # traces the long chat again
    python docs/gallery.py --figure                # draws the figure of exports.md again

The repository's tiny reasoner makes three of the pages. The long chat takes a larger model, so its
trace is kept in `long_chat.flow`: its numbers are those of that model, and its page is drawn anew.
The figure is kept, too, so that the documentation shows it wherever it is read.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed
from transformers.utils import logging

if not __package__:  # as a script, this file does not find its neighbours
    sys.path.insert(0, str(Path(__file__).parents[1]))

import flowtracer_plugin as ft
from examples.demo import accuracy_reward
from examples.reasoner.problems import is_correct, make_problems
from examples.reasoner.train import MAX_NEW_TOKENS, MODEL_DIR
from flowtracer_plugin.evaluation import token_drops
from flowtracer_plugin.grpo import FlowGRPOConfig, FlowGRPOTrainer
from flowtracer_plugin.report import write_comparison

LONG_CHAT = Path(__file__).with_name("long_chat.flow")
FIGURE = Path(__file__).with_name("figure.svg")
QUESTION = "Ann has 4 apples. Ann buys 1. Ann gets 3. Ann sees 6. Ann buys 6. How many apples?\n"
CHAT = (
    "We are four friends and want to spend three days in Lisbon in May. I have never planned a "
    "trip before. What should we think of first?",
    "Lisbon in May is warm and not too full. Three things decide what such a trip costs: how you "
    "get there, where you sleep, and what you do there.\n\n"
    "1. Flights are cheapest on a Tuesday or a Wednesday, about two months before.\n"
    "2. For four people a flat is often cheaper than two hotel rooms, and you can make breakfast "
    "there.\n"
    "3. Many sights cost nothing: the viewpoints, the old town, and most churches.\n\n"
    "Shall I make a list with prices?",
    "Yes, please. We fly from Berlin, and we would like to see the castle and take a boat on the "
    "river.",
    "Here is a list for all four of you:\n\n"
    "- Flights from Berlin and back: 480 euros.\n"
    "- A flat near the river for two nights: 260 euros.\n"
    "- Tickets for the castle: 60 euros.\n"
    "- A boat on the river: 100 euros.\n"
    "- Food for three days: 300 euros.\n\n"
    "Trams and the metro are cheap, and most of the old town is best seen on foot.",
    "The boat is too much for us. What does the flat near the river cost? Answer in one short "
    "sentence.",
)
"""Questions and answers in turn, written by hand; the model answers the last question."""

SAMPLES, STEPS = 8, 1


def write_gallery(folder: Path) -> None:
    """Write the four pages to `folder`."""
    _quiet()
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, padding_side="left")
    tracer = ft.wrap(model, tokenizer)
    trace = tracer.generate(QUESTION, max_new_tokens=MAX_NEW_TOKENS)
    _named(trace).to_html(folder / "short_maths.html", drops=token_drops(model, trace))
    ft.load(LONG_CHAT).to_html(folder / "long_chat.html")
    write_right_against_wrong(tracer, folder / "right_against_wrong.html")
    write_training_group(model, tokenizer, folder / "training_group.html")


def draw_figure(path: Path) -> None:
    """Draw the overview of the short answer."""
    _quiet()
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    tracer = ft.wrap(model, AutoTokenizer.from_pretrained(MODEL_DIR))
    trace = tracer.generate(QUESTION, max_new_tokens=MAX_NEW_TOKENS)
    _named(trace).to_figure(path, "overview")


def write_right_against_wrong(tracer: ft.FlowTracer, path: Path) -> None:
    """Write the comparison of sampled answers to the first problem with right and wrong ones."""
    set_seed(0)
    for problem in make_problems(20, seed=1, split="held_out"):
        traces, right = [], []
        while len(traces) < SAMPLES:
            try:
                traces.append(
                    tracer.generate(problem.prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=True)
                )
            except ft.AnswerNotFoundError:
                continue
            right.append(is_correct(traces[-1].text, problem.answer))
        if 3 <= sum(right) <= SAMPLES - 3:
            write_comparison([_named(trace) for trace in traces], path, right=right)
            return
    raise RuntimeError("no problem has at least three right and three wrong answers")


def write_training_group(model: Any, tokenizer: Any, path: Path) -> None:
    """Write the first page of a training with flow credit."""
    problems = make_problems(8 * STEPS, seed=2)
    rows = [{"prompt": problem.prompt, "answer": problem.answer} for problem in problems]
    with TemporaryDirectory() as folder:
        config = FlowGRPOConfig(
            output_dir=str(Path(folder) / "reasoner"),
            max_steps=STEPS,
            per_device_train_batch_size=32,
            num_generations=SAMPLES,
            max_completion_length=MAX_NEW_TOKENS,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = FlowGRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=[accuracy_reward],
            train_dataset=Dataset.from_list(rows),
            args=config,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        page = Path(config.output_dir) / "flow" / "step_000000.html"
        path.write_bytes(page.read_bytes())


def trace_chat(name: str) -> None:
    """Let a chat model answer the last question of `CHAT`, and keep the trace of its answer."""
    _quiet()
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
    tracer = ft.wrap(model, AutoTokenizer.from_pretrained(name))
    roles = ("user", "assistant") * len(CHAT)
    messages = [{"role": role, "content": text} for role, text in zip(roles, CHAT, strict=False)]
    trace = tracer.generate(messages, max_new_tokens=60, answer="last_number")
    replace(trace, model=Path(name).name).save(LONG_CHAT)


def _named(trace: ft.FlowTrace) -> ft.FlowTrace:
    """The trace without the folder of this checkout."""
    return replace(trace, model="embedded reasoner")


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # on a model this small, more threads only wait for each other


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="folder for the pages")
    parser.add_argument("--chat", metavar="MODEL", help="trace the long chat with this model")
    parser.add_argument("--figure", action="store_true", help="draw the figure of exports.md")
    arguments = parser.parse_args()
    if arguments.figure:
        draw_figure(FIGURE)
    if arguments.chat:
        trace_chat(arguments.chat)
    if arguments.folder:
        write_gallery(arguments.folder)
