"""Train the embedded reasoner: a tiny language model that solves `problems.py`, and often errs."""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

if not __package__:  # as a script, this file does not find its neighbours
    sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.reasoner.problems import (
    LARGEST_VALUE,
    NAMES,
    SIGNS,
    THINGS,
    Problem,
    Sloppiness,
    is_correct,
    make_problems,
    sloppy_response,
    stream_problems,
)

MODEL_DIR = Path(__file__).parent / "model"
SEED = 20260610
HELD_OUT_SEED = 7
THREADS = 1  # tensors are so small that a second thread mostly waits for the first
IGNORED = -100
CONTEXT_LENGTH = 128
MAX_NEW_TOKENS = 52
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
# A space belongs to the piece after it, so that joining the pieces gives the text back.
PIECE = r"\n| ?\\boxed\{| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The pupil learns from right solutions first, then from sloppy ones."""

    steps: int = 700
    batch_size: int = 64
    learning_rate: float = 4e-3
    right_share: float = 0.6


def build_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer_of_pieces(_pieces(), PIECE)


def tokenizer_of_pieces(pieces: list[str], pattern: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each piece; `pattern` splits texts into pieces."""
    vocabulary = {piece: index for index, piece in enumerate([*SPECIAL_TOKENS, *pieces])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Split(Regex(pattern), behavior="isolated")
    backend.decoder = Fuse()
    backend.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )


def _pieces() -> list[str]:
    numbers = [str(value) for value in range(LARGEST_VALUE + 1)]
    words = [*NAMES, *THINGS, *SIGNS, *numbers, "has", "How", "many", "The", "answer", "is"]
    spaced = [f" {word}" for word in [*words, "+", "-", "=", "\\boxed{"]]
    return [*spaced, *NAMES, *numbers, "The", ".", "?", "}", "\n"]


def build_model(tokenizer: PreTrainedTokenizerFast, width: int = 80) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int
) -> None:
    def losses() -> Iterator[Tensor]:
        for input_ids, labels in _batches(tokenizer, recipe, random.Random(seed)):
            logits = model(input_ids=input_ids).logits[:, :-1].flatten(0, 1)
            yield cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED)

    minimise(losses(), model, steps=recipe.steps, learning_rate=recipe.learning_rate)


def minimise(
    losses: Iterable[Tensor],
    model: PreTrainedModel,
    *,
    steps: int,
    learning_rate: float,
    title: str = "training",
) -> None:
    """Take one step of AdamW for each loss; losses are computed one by one, as steps are taken."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    schedule = OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)
    model.train()
    progress = tqdm(losses, total=steps, desc=title, unit="step")
    for loss in progress:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def _batches(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe, rng: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    problems = stream_problems(rng, "train")
    for step in range(recipe.steps):
        is_right = step < recipe.right_share * recipe.steps
        sloppiness = Sloppiness(misread=0, distracted=0, slip=0) if is_right else Sloppiness()
        batch = [next(problems) for _ in range(recipe.batch_size)]
        yield _collate(
            tokenizer,
            [(problem.prompt, sloppy_response(problem, rng, sloppiness)) for problem in batch],
        )


def _collate(
    tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]
) -> tuple[Tensor, Tensor]:
    """Token ids, padded on the right, and labels, which ignore the prompt."""
    rows, labels = [], []
    for prompt, response in pairs:
        prompt_ids = tokenizer.encode(prompt)
        response_ids = tokenizer.encode(response, add_special_tokens=False)
        response_ids.append(tokenizer.eos_token_id)
        rows.append(torch.tensor(prompt_ids + response_ids))
        labels.append(torch.tensor([IGNORED] * len(prompt_ids) + response_ids))
    input_ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    return input_ids, pad_sequence(labels, batch_first=True, padding_value=IGNORED)


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    *,
    sample: bool,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """One completion for each prompt, at temperature 1 or greedy."""
    model.eval()
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    # top_k=0: the distribution itself, as in reinforcement learning
    choice = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sample else {"do_sample": False}
    sequences = model.generate(**inputs, **choice, max_new_tokens=max_new_tokens)
    completion_ids = sequences[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(completion_ids, skip_special_tokens=True)


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[Problem],
    *,
    sample: bool,
) -> float:
    prompts = [problem.prompt for problem in problems]
    completions = answer(model, tokenizer, prompts, sample=sample)
    hits = map(is_correct, completions, [problem.answer for problem in problems])
    return sum(hits) / len(problems)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save weights in half precision, with a configuration that loads them in single precision."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text()) | {"dtype": "float32"}
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def report(folder: Path, count: int = 2000) -> None:
    """Print the accuracy of the saved model."""
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    problems = make_problems(count, HELD_OUT_SEED, "held_out")
    for name, sample in (("sampled", True), ("greedy", False)):
        share = accuracy(model, tokenizer, problems, sample=sample)
        error = math.sqrt(share * (1 - share) / count)
        print(f"{name} accuracy on {count} held-out problems: {share:.3f} ± {error:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    train(model, tokenizer, Recipe(steps=arguments.steps), SEED)
    save(model, tokenizer, arguments.out)
    report(arguments.out)


if __name__ == "__main__":
    main()
