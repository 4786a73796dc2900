"""Generate answers with a model, one or several at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from flowtracer_plugin.model.causal_lm import (
    accepted_inputs,
    check_length,
    context_length,
    input_device,
)

_ONE_BY_ONE: Mapping[str, Any] = MappingProxyType(
    {
        "num_beams": 1,
        "num_return_sequences": 1,
        "return_dict_in_generate": False,
        "penalty_alpha": 0.0,
        "is_assistant": False,
        # It would write the end of the prompt anew, without the tokens of a chat template.
        "token_healing": False,
    }
)
"""Settings that make `generate` extend a prompt by one token after the other."""

_OTHER_WAYS = ("constraints", "force_words_ids", "dola_layers")
"""Ways of decoding that only None turns off."""

_GREEDY: Mapping[str, Any] = MappingProxyType({"temperature": 1.0, "top_p": 1.0, "top_k": 50})
"""The library's defaults, which greedy decoding does not use; others would be warned about."""


def decoding(model: nn.Module, **settings: Any) -> dict[str, Any]:
    """The arguments with which `generate` decodes token by token, by these settings.

    What they leave open comes from the model's own generation config, such as end tokens, stop
    strings and penalties; None turns a setting off.
    """
    own = getattr(model, "generation_config", None)
    names = *_OTHER_WAYS, *(name for name, value in settings.items() if value is None)
    # Passed as arguments, since in a config None stands for the model's own setting.
    off = {name: None for name in names if getattr(own, name, None) is not None}
    config = GenerationConfig(**{**_ONE_BY_ONE, **settings})  # type: ignore[no-untyped-call]
    return {"generation_config": config, **off}


def generate_ids(
    model: nn.Module,
    prompt_ids: Sequence[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    do_sample: bool,
    temperature: float | None = None,
    top_p: float | None = None,
    progress: bool = False,
) -> list[int]:
    """Token ids of one answer, which stops at the model's end token, or where the context ends.

    The model's generation config may name stop strings, which also end it.

    Raises:
        ValueError: The prompt fills the context, or `temperature` or `top_p` come without
            `do_sample`.
    """
    if not do_sample and (temperature is not None or top_p is not None):
        name = "top_p" if temperature is None else "temperature"
        raise ValueError(
            f"{name} is for sampling, and by default no token is sampled; pass do_sample=True too"
        )
    check_length(model, len(prompt_ids) + 1)
    most = min(max_new_tokens, context_length(model) - len(prompt_ids))
    # Sampling follows the model's own generation config, which greedy decoding does not use.
    choice: Mapping[str, Any] = _GREEDY
    if do_sample:
        given = {"temperature": temperature, "top_p": top_p}
        choice = {name: value for name, value in given.items() if value is not None}
    (answer,) = _continued(
        model,
        [prompt_ids],
        tokenizer,
        {"max_new_tokens": most, "do_sample": do_sample, **choice},
        streamer=GenerationProgress(most) if progress else None,
    )
    return answer


def generate_many(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
) -> list[list[int]]:
    """Token ids of the greedy answer to each prompt, in one padded batch where that is possible.

    It is not where the model takes no attention mask, where its generation config names stop
    strings, after which nobody can tell an end token from padding, and where the context leaves
    less than `max_new_tokens`.

    Raises:
        ValueError: A prompt fills the context.
    """
    own = getattr(model, "generation_config", None)
    longest = max(map(len, prompts))
    together = (
        len(prompts) > 1
        and "attention_mask" in accepted_inputs(model)
        and getattr(own, "stop_strings", None) is None
        and longest + max_new_tokens <= context_length(model)
    )
    if not together:
        return [
            generate_ids(
                model, one, tokenizer=tokenizer, max_new_tokens=max_new_tokens, do_sample=False
            )
            for one in prompts
        ]
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, **_GREEDY}
    answers = _continued(model, prompts, tokenizer, settings)
    return [_ended(answer, _end_tokens(model)) for answer in answers]


def breaks_off(model: nn.Module, answer: Sequence[int]) -> bool:
    """Whether a generated answer stops at the limit of tokens, and not at its end.

    Where the model's generation config names stop strings, nobody can tell, and the value is False.
    """
    own = getattr(model, "generation_config", None)
    stops = getattr(own, "stop_strings", None) is not None
    return not stops and (not answer or answer[-1] not in _end_tokens(model))


def _end_tokens(model: nn.Module) -> set[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {ends} if isinstance(ends, int) else set(ends or ())


def _continued(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Any],
    streamer: GenerationProgress | None = None,
) -> list[list[int]]:
    """What `generate` adds to each prompt, with what it adds after the end of an answer."""
    device, pad, longest = input_device(model), tokenizer.pad_token_id or 0, max(map(len, prompts))
    ids = [[pad] * (longest - len(one)) + [*one] for one in prompts]
    seen = [[0] * (longest - len(one)) + [1] * len(one) for one in prompts]
    generated = cast(Any, model).generate(
        torch.tensor(ids, device=device),
        attention_mask=torch.tensor(seen, device=device),
        **decoding(model, pad_token_id=pad, **settings),
        tokenizer=tokenizer,  # finds stop strings
        streamer=streamer,
    )
    answers: list[list[int]] = generated[:, longest:].tolist()
    return answers


def _ended(ids: list[int], ends: Set[int]) -> list[int]:
    """The tokens up to the first end token, which counts; what follows is padding."""
    return ids[: next((place + 1 for place, one in enumerate(ids) if one in ends), len(ids))]


class GenerationProgress:
    """A transformers streamer: it is called once for the prompt, then once for each token."""

    def __init__(self, total: int) -> None:
        self._bar: tqdm[Any] = tqdm(
            total=total,
            desc="generating",
            unit="token",
            leave=None,  # stays if it is the only one
        )
        self._started = False

    def put(self, value: Tensor) -> None:
        """Count a token; the first call is the prompt."""
        self._bar.update(int(self._started))
        self._started = True

    def end(self) -> None:
        """Close the bar."""
        self._bar.close()
