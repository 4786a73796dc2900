"""How much do flow rewards pay for text that is no reasoning? The table of docs/rewards.md.

    python benchmarks/reward_gaming.py --model FOLDER --data gsm8k.jsonl [--rows 40]

The completions are GSM8K's reference solutions and variants of them, all with the right answer, so
a variant that scores higher does so without being better.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flowtracer_plugin as ft
from flowtracer_plugin.rewards.flow_reward import SCORES, FlowReward


def split(solution: str) -> tuple[str, str]:
    """The text of a solution without calculator annotations, and its answer."""
    text, answer = re.sub(r"<<.*?>>", "", solution).rsplit("\n#### ", 1)
    return text, answer


def variants(text: str, other: str) -> dict[str, str]:
    """Texts to put before the answer, by name."""
    words = text.split(" ")
    filler = ("and so on " * len(words))[: len(text)]
    return {
        "the solution": text,
        "nothing": "",
        "its first line": text.split("\n")[0],
        "of another problem": other,
        "shuffled words": " ".join(random.Random(len(text)).sample(words, len(words))),
        "filler": filler,
        "solution and filler": f"{text}\n{filler}",
        "solution twice": f"{text}\n{text}",
        "solution and blank line": f"{text}\n\n",
    }


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tracer = ft.wrap(
        model, AutoTokenizer.from_pretrained(arguments.model), preset="paper", question="prompt"
    )
    with arguments.data.open() as lines:
        rows = [json.loads(line) for line in islice(lines, arguments.rows)]
    said: dict[str, list[str]] = {}
    for row, following in zip(rows, [*rows[1:], rows[0]], strict=True):
        text, answer = split(row["answer"])
        for name, variant in variants(text, split(following["answer"])[0]).items():
            said.setdefault(name, []).append(f"{variant}\n#### {answer}".lstrip("\n"))
    prompts = [[{"role": "user", "content": row["question"]}] for row in rows]
    for score in SCORES:
        reward = FlowReward(tracer, score=score, batch_size=4)
        found = {name: reward(prompts=prompts, completions=texts) for name, texts in said.items()}
        first = found["the solution"]
        for name, scores in found.items():
            higher = sum(ours > theirs for ours, theirs in zip(scores, first, strict=True))
            spread = f"{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f}"
            print(f"{score:16} {name:24} {spread}  higher {higher / len(first):.0%}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a chat model")
    parser.add_argument("--data", type=Path, required=True, help="GSM8K as JSON lines")
    parser.add_argument("--rows", type=int, default=40)
    return parser.parse_args()


if __name__ == "__main__":
    main()
