"""A reward function for TRL: how much of the answer came through the reasoning."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from flowtracer_plugin.encoding import encode_prompt, encode_response
from flowtracer_plugin.tracer import FlowTracer


class FlowReward:
    """Reward function for every TRL trainer: how much of the answer came through the reasoning.

    The score is the reasoning share, from 0 to 1: the share of the flow from the question that
    enters the completion at a token other than the answer. Without an answer it is None, which TRL
    leaves out of the reward.

    With an `outcome` reward function, the score is outcome × share where the outcome is positive,
    and the outcome itself elsewhere; without an answer the share is 0. So a wrong answer does not
    pay more for flowing past the reasoning, and neither does leaving the answer out.

    Args:
        tracer: From `wrap(model, tokenizer)`; of the model that is trained, or of any other.
        outcome: Another reward function, called with the same arguments.
        name: Under which TRL logs the reward.
        batch_size: Completions in one forward pass.
        chat_template_kwargs: What the trainer passes to the chat template too, such as `tools` or
            `enable_thinking`: the score is that of the prompt as rendered here.

    Raises:
        TypeError: `tracer` is no tracer, or `outcome` no plain function.
        ValueError: The tracer has no tokenizer, or `batch_size` is below 1.
    """

    def __init__(
        self,
        tracer: FlowTracer | None = None,
        *,
        outcome: Callable[..., Sequence[float | None]] | None = None,
        name: str = "flow_reward",
        batch_size: int = 8,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(tracer, FlowTracer):
            raise TypeError(
                f"FlowReward needs a tracer, got {type(tracer).__name__}; wrap the model first: "
                "FlowReward(flowtracer_plugin.wrap(model, tokenizer))"
            )
        if tracer.tokenizer is None:
            raise ValueError("the tracer has no tokenizer; make it with wrap(model, tokenizer)")
        if outcome is not None and not _is_plain_function(outcome):
            raise TypeError(
                f"outcome must be a reward function that is not async, got {outcome!r}; give "
                "other kinds to the trainer itself, in reward_funcs beside this one"
            )
        self.tracer = tracer
        self.tokenizer = tracer.tokenizer
        self.outcome = outcome
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
        self.batch_size = batch_size
        self.chat_template_kwargs = chat_template_kwargs
        self.__name__ = name

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """One score per completion; `completion_ids` where the trainer has them."""
        encoded = [
            encode_prompt(self.tokenizer, prompt, self.chat_template_kwargs) for prompt in prompts
        ]
        if completion_ids is None:
            said = [
                encode_response(self.tokenizer, text, _content(completion))
                for (_, text), completion in zip(encoded, completions, strict=True)
            ]
        else:
            said = [list(ids) for ids in completion_ids]
        shares = [*self._shares([ids for ids, _ in encoded], said)]
        if "log_metric" in columns:
            found = sum(share is not None for share in shares)
            columns["log_metric"](f"{self.__name__}/answer_found", found / len(shares))
        if self.outcome is None:
            return shares
        outcomes = self.outcome(
            prompts=prompts, completions=completions, completion_ids=said, **columns
        )
        return [_scaled(outcome, share) for outcome, share in zip(outcomes, shares, strict=True)]

    def _shares(self, asked: list[list[int]], said: list[list[int]]) -> Iterator[float | None]:
        for start in range(0, len(asked), self.batch_size):
            rows = slice(start, start + self.batch_size)
            prompt_ids, prompt_mask = self._padded(asked[rows], "left")
            completion_ids, completion_mask = self._padded(said[rows], "right")
            batch = self.tracer.trace_ids(prompt_ids, completion_ids, prompt_mask, completion_mask)
            found = zip(batch.reasoning_share.tolist(), batch.found.tolist(), strict=True)
            yield from (share if is_found else None for share, is_found in found)

    def _padded(self, rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
        """Token ids and their mask; what stands on the padding does not matter."""
        device = next(self.tracer.model.parameters()).device
        ids = [torch.tensor(row, dtype=torch.long, device=device) for row in rows]
        kept = [torch.ones_like(row) for row in ids]
        return (
            pad_sequence(ids, batch_first=True, padding_side=side),
            pad_sequence(kept, batch_first=True, padding_side=side),
        )


def _is_plain_function(outcome: Any) -> bool:
    called = outcome if inspect.isroutine(outcome) else getattr(outcome, "__call__", None)  # noqa: B004
    return (
        callable(outcome)
        and not isinstance(outcome, nn.Module)
        and not inspect.iscoroutinefunction(called)
    )


def _content(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _scaled(outcome: float | None, share: float | None) -> float | None:
    return outcome if outcome is None or outcome <= 0 else outcome * (share or 0.0)
