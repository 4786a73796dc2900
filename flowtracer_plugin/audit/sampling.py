"""Groups as in GRPO: a prompt, completions sampled from the policy, and their rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from flowtracer_plugin.model.causal_lm import check_length, context_length, evaluating, input_device
from flowtracer_plugin.model.generation import decoding
from flowtracer_plugin.moved import warn
from flowtracer_plugin.text.encoding import Prompt
from flowtracer_plugin.text.spans import known_ids

Reward = Callable[..., Sequence[float | None]]
"""A reward function as TRL defines it: it is called with keywords, and may return `None`."""

PLAIN: Mapping[str, float] = MappingProxyType(
    {
        "num_beams": 1,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "typical_p": 1.0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
    }
)
"""Settings that make `generate` draw from the policy itself. It takes missing settings from
the model's configuration, and would then sample from another distribution than the audited one."""

SMALLEST = 1e-4
"""TRL adds this number to the standard deviation of the rewards, then divides by the sum."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One prompt with its completions and their rewards; plain values.

    Attributes:
        row: Number of the prompt in the data.
        prompt_ids: Token ids of the prompt.
        completions: Token ids of each completion, with the end token if there is one.
        rewards: Reward of each completion.
    """

    row: int
    prompt_ids: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    rewards: tuple[float, ...]

    @property
    def advantages(self) -> Float[Tensor, " completion"]:
        """Each reward minus the mean, divided by the standard deviation."""
        rewards = torch.tensor(self.rewards, dtype=torch.float64)
        return ((rewards - rewards.mean()) / (rewards.std() + SMALLEST)).float()

    @property
    def has_signal(self) -> bool:
        """Whether the rewards differ; if they do not, no token is better than another."""
        return max(self.rewards) > min(self.rewards)

    @property
    def tells(self) -> bool:
        """The old name of `has_signal`."""
        warn("Group.tells", "Group.has_signal", level=3)
        return self.has_signal


def padded(
    group: Group, device: torch.device
) -> tuple[Int[Tensor, "completion token"], Bool[Tensor, "completion token"]]:
    """The ids of prompt and completions as one batch, padded after the text, and their mask."""
    rows = [torch.tensor([*group.prompt_ids, *said]) for said in group.completions]
    visible = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    ids = pad_sequence(rows, batch_first=True)
    return ids.to(device), pad_sequence(visible, batch_first=True).to(device)


def sample(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    *,
    completions: int,
    max_new_tokens: int,
    temperature: float,
    seed: Sequence[int],
) -> tuple[tuple[int, ...], ...]:
    """The token ids of completions that are drawn from the policy itself.

    The model's own sampling settings and stop strings are ignored. `seed` alone decides what is
    drawn, and no random state changes.

    Raises:
        ValueError: The prompt fills the context.
    """
    check_length(model, len(prompt_ids) + 1)
    inputs = torch.tensor([list(prompt_ids)], device=input_device(model))
    most = min(max_new_tokens, context_length(model) - len(prompt_ids))
    with _seeded(seed), evaluating(model):
        generated = cast(Any, model).generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            **decoding(
                model,
                max_new_tokens=most,
                num_return_sequences=completions,
                do_sample=True,
                temperature=temperature,
                pad_token_id=tokenizer.pad_token_id or 0,
                stop_strings=None,
                **PLAIN,
            ),
        )
    ends = _end_ids(model, tokenizer)
    return tuple(_until_end(row, ends) for row in generated[:, len(prompt_ids) :].tolist())


def rewarded(
    reward: Reward,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    completions: Sequence[Sequence[int]],
    columns: Mapping[str, Any],
) -> tuple[float, ...]:
    """The rewards that a function gives the completions of a prompt; `None` counts as 0.

    Raises:
        ValueError: The function does not return one finite number for each completion.
    """
    said: list[Any] = [
        tokenizer.decode(known_ids(tokenizer, ids), skip_special_tokens=True) for ids in completions
    ]
    if not isinstance(prompt, str):
        said = [[{"role": "assistant", "content": text}] for text in said]
    found = reward(
        prompts=[prompt] * len(said),
        completions=said,
        completion_ids=[list(ids) for ids in completions],
        **{name: [value] * len(said) for name, value in columns.items()},
    )
    rewards = tuple(0.0 if one is None else float(one) for one in found)
    if len(rewards) != len(said) or not all(map(math.isfinite, rewards)):
        raise ValueError(
            f"the reward must return one finite number for each of {len(said)} completions, got "
            f"{found!r:.200}"
        )
    return rewards


@contextmanager
def _seeded(seed: Sequence[int]) -> Iterator[None]:
    """Set the random state by these numbers, and restore it afterwards."""
    number = np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0]
    with torch.random.fork_rng():
        torch.manual_seed(int(number >> np.uint64(1)))
        yield


def _end_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    return set(ends if isinstance(ends, list) else [ends]) - {None}


def _until_end(ids: Sequence[int], ends: set[int]) -> tuple[int, ...]:
    """The ids up to and including the first end token, which the policy chose like all others."""
    stop = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
    return tuple(ids[:stop])
