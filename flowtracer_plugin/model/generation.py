"""Generate one answer with a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from flowtracer_plugin.model.causal_lm import check_length, context_length, input_device


def generate_ids(
    model: nn.Module,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    do_sample: bool,
    temperature: float | None,
    pad_token_id: int,
    progress: bool,
) -> list[int]:
    """Token ids of one answer, which stops at the model's end token, or where the context ends.

    Raises:
        ValueError: The prompt fills the context.
    """
    check_length(model, len(prompt_ids) + 1)
    most = min(max_new_tokens, context_length(model) - len(prompt_ids))
    inputs = torch.tensor([prompt_ids], device=input_device(model))
    # Sampling follows the model's own generation config, which greedy decoding does not use.
    choice: dict[str, Any] = dict.fromkeys(("temperature", "top_p", "top_k"))
    if do_sample:
        choice = {} if temperature is None else {"temperature": temperature}
    generated = cast(Any, model).generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=most,
        do_sample=do_sample,
        num_beams=1,
        num_return_sequences=1,
        return_dict_in_generate=False,
        **choice,
        pad_token_id=pad_token_id,
        streamer=GenerationProgress(most) if progress else None,
    )
    answer: list[int] = generated[0, len(prompt_ids) :].tolist()
    return answer


class GenerationProgress:
    """A transformers streamer: it is called once for the prompt, then once for each token."""

    def __init__(self, total: int) -> None:
        self._bar: tqdm[Any] = tqdm(total=total, desc="generating", unit="token")
        self._started = False

    def put(self, value: Tensor) -> None:
        """Count a token; the first call is the prompt."""
        self._bar.update(int(self._started))
        self._started = True

    def end(self) -> None:
        """Close the bar."""
        self._bar.close()
