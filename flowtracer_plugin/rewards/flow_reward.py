"""`FlowReward`, a TRL reward function that scores how flow passes through the reasoning."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from flowtracer_plugin.flow.torch_arrays import sent
from flowtracer_plugin.model.causal_lm import check_length, check_vocabulary
from flowtracer_plugin.text.encoding import content_text, encode_prompt, encode_response, is_text
from flowtracer_plugin.text.spans import known_ids, question_mask, turns_mask
from flowtracer_plugin.trace.rollouts import FlowBatch
from flowtracer_plugin.trace.tracer import FlowTracer
from flowtracer_plugin.trace.troubles import Troubles

logger = logging.getLogger(__name__)


def concentration(
    throughput: Float[Tensor, "batch token"], counted: Bool[Tensor, "batch token"]
) -> Float[Tensor, " batch"]:
    """How unevenly flow is spread over the counted tokens of each row: 1 − exp(H) / n.

    H is the entropy of the throughput over the n counted tokens, normalized to sum 1, so that
    exp(H) tokens would carry the flow if they carried it evenly. The concentration is 0 if all
    tokens carry the same flow, 1 − 1/n if one carries all of it, and 0 without tokens or flow. It
    does not change if every token is split into several that share its flow, so that short and
    long completions have the same scale.
    """
    flow = torch.where(counted, throughput, 0.0)
    share = flow / flow.sum(-1, keepdim=True).clamp_min(torch.finfo(flow.dtype).tiny)
    carrying = torch.special.entr(share).sum(-1).exp()
    spread = 1 - carrying / counted.sum(-1).clamp_min(1)
    return torch.where(flow.sum(-1) > 0, spread.clamp(0, 1), 0.0)


SCORES: Mapping[str, Callable[[FlowBatch], Float[Tensor, " batch"]]] = MappingProxyType(
    {
        "reasoning_share": lambda batch: batch.reasoning_share.clamp(0, 1),
        "concentration": lambda batch: concentration(batch.throughput, batch.reasoning),
    }
)
"""The scores of `FlowReward` by name, all from 0 to 1."""


class FlowReward:
    """Reward function for all TRL trainers: how the answer's flow passes through the reasoning.

    The `score` is one of

    * `"reasoning_share"`: the share of the flow that enters the completion at another token than
      the answer instead of jumping from the question to the answer. It rewards answers that are
      read off the text before them. Any text before the answer can game it, because text draws
      attention whether it makes sense or not.
    * `"concentration"`: how unevenly the flow is spread over the completion's tokens before the
      answer. It rewards reasoning that passes through a few tokens. Filler that carries nothing
      can game it, and so can one token that everything must pass, such as a line break.

    Without an answer the score is None, which TRL leaves out of the reward. So it is for a
    completion that fails, such as one that is longer than the traced model's context; the log tells
    the first. Both scores measure attention, not truth: combine them with an outcome, and see
    `docs/rewards.md`.

    With an `outcome` reward function, the reward is outcome × score if the outcome is positive, and
    the outcome otherwise; without an answer the score counts as 0. So neither a wrong answer nor a
    missing one can earn more by its flow.

    A call changes neither the model's training mode nor any random state.

    Args:
        tracer: The result of `wrap(model, tokenizer)`, for the model that is trained or another; or
            a function that returns one, called with the first completions.
        score: A key of `SCORES`.
        outcome: Another reward function, called with the same arguments.
        name: The name under which TRL logs the reward; by default the score's name. With the
            outcome `accuracy` it is `accuracy_x_reasoning_share`.
        batch_size: Number of completions in one forward pass.
        chat_template_kwargs: The arguments that the trainer, too, passes to the chat template, such
            as `tools` or `enable_thinking`.
        retokenize: Read the completions as text, for a traced model with another tokenizer than the
            trained model's. Otherwise the sampled ids are read.

    Raises:
        TypeError: `tracer` is no tracer, or `outcome` is no plain function.
        ValueError: There is no such score, the tracer has no tokenizer, or `batch_size` is below 1.
    """

    def __init__(
        self,
        tracer: FlowTracer | Callable[[], FlowTracer] | None = None,
        *,
        score: str = "reasoning_share",
        outcome: Callable[..., Sequence[float | None]] | None = None,
        name: str | None = None,
        batch_size: int = 8,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        retokenize: bool = False,
    ) -> None:
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
        if outcome is not None and not _is_plain_function(outcome):
            raise TypeError(
                f"outcome must be a reward function that is not async, got {outcome!r}; give "
                "other kinds to the trainer itself, in reward_funcs beside this one"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
        made_later = callable(tracer) and not isinstance(tracer, nn.Module | FlowTracer)
        self._make: Any = tracer if made_later else None
        if not made_later:
            self.tracer = _checked(tracer)
        self.score = score
        self.outcome = outcome
        self.batch_size = batch_size
        self.chat_template_kwargs = chat_template_kwargs
        self.retokenize = retokenize
        self._troubles = Troubles(logger)
        self.__name__ = name or (score if outcome is None else f"{_name_of(outcome)}_x_{score}")

    @cached_property
    def tracer(self) -> FlowTracer:
        """The tracer of the completions."""
        return _checked(self._make())

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """One reward per completion; `completion_ids` are the sampled ids, if the trainer has them.

        Raises:
            NotImplementedError: A prompt contains images.
            ValueError: The ids do not spell the completions, or a completion has several messages
                and no ids.
        """
        tokenizer = self.tracer.tokenizer
        assert tokenizer is not None
        _refuse_images(prompts)
        encoded = [
            encode_prompt(tokenizer, prompt, self.chat_template_kwargs) if prompt else ([], "")
            for prompt in prompts
        ]
        if completion_ids is None or self.retokenize:
            said = [
                encode_response(tokenizer, text, _only_text(completion))
                for (_, text), completion in zip(encoded, completions, strict=True)
            ]
        else:
            said = [
                _sampled(tokenizer, completion, ids)
                for completion, ids in zip(completions, completion_ids, strict=True)
            ]
        asked = [ids for ids, _ in encoded]
        scores = [*self._scores(asked, said, self._turns(prompts, asked))]
        if "log_metric" in columns:
            found = sum(score is not None for score in scores)
            columns["log_metric"](f"{self.__name__}/answer_found", found / max(1, len(scores)))
        if self.outcome is None:
            return scores
        ids = said if completion_ids is None else completion_ids
        outcomes = self.outcome(
            prompts=prompts, completions=completions, completion_ids=ids, **columns
        )
        return [_scaled(outcome, score) for outcome, score in zip(outcomes, scores, strict=True)]

    def _turns(self, prompts: Sequence[Any], asked: list[list[int]]) -> list[list[bool]] | None:
        """The question of each prompt, if chat messages tell what the user said."""
        tokenizer, rule = self.tracer.require_tokenizer(), self.tracer.options.question
        if rule not in ("auto", "turns"):
            return None
        turns = [
            turns_mask(tokenizer, prompt, ids, self.chat_template_kwargs) if prompt else None
            for prompt, ids in zip(prompts, asked, strict=True)
        ]
        if all(one is None for one in turns):
            return None
        return [
            question_mask(tokenizer, ids or [0], "prompt" if one is None else one).tolist()
            for one, ids in zip(turns, asked, strict=True)
        ]

    def _scores(
        self,
        asked: list[list[int]],
        said: list[list[int]],
        question: list[list[bool]] | None,
    ) -> Iterator[float | None]:
        pairs = [self._readable(*pair) for pair in zip(asked, said, strict=True)]
        for start in range(0, len(pairs), self.batch_size):
            prompts, completions = zip(*pairs[start : start + self.batch_size], strict=True)
            prompt_ids, prompt_mask = self._padded(prompts, "left")
            completion_ids, completion_mask = self._padded(completions, "right")
            rows = None if question is None else question[start : start + self.batch_size]
            # A prompt that cannot be read is cut to one token, so its question is, too.
            cut = rows and [row[: len(ids)] for row, ids in zip(rows, prompts, strict=True)]
            batch = self.tracer.trace_ids(
                prompt_ids,
                completion_ids,
                prompt_mask,
                completion_mask,
                question=self._padded(cut, "left")[0].bool() if cut else None,
            )
            for error in batch.errors.values():
                self._troubles.add("a completion has no flow reward", error)
            found = zip(SCORES[self.score](batch).tolist(), batch.found.tolist(), strict=True)
            yield from (score if is_found else None for score, is_found in found)

    def _readable(self, asked: list[int], said: list[int]) -> tuple[list[int], list[int]]:
        """The text, or one without an answer in place of a text that the model cannot read.

        All processes of a distributed run must make the same forward passes.
        """
        if not asked:
            return [0], []
        try:
            check_length(self.tracer.model, len(asked) + len(said))
            check_vocabulary(self.tracer.model, torch.tensor([*asked, *said]))
        except ValueError as error:
            self._troubles.add("a completion has no flow reward", error)
            return asked[:1], []
        return asked, said

    def _padded(self, rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
        """Token ids and their mask."""
        device = next(self.tracer.model.parameters()).device
        ids = [torch.tensor(row, dtype=torch.long) for row in rows]
        kept = [torch.ones_like(row) for row in ids]
        return (
            sent(pad_sequence(ids, batch_first=True, padding_side=side), device),
            sent(pad_sequence(kept, batch_first=True, padding_side=side), device),
        )


def _checked(tracer: Any) -> FlowTracer:
    if not isinstance(tracer, FlowTracer):
        raise TypeError(
            f"FlowReward needs a tracer, got {type(tracer).__name__}; wrap the model first: "
            "FlowReward(flowtracer_plugin.wrap(model, tokenizer))"
        )
    if tracer.tokenizer is None:
        raise ValueError("the tracer has no tokenizer; make it with wrap(model, tokenizer)")
    return tracer


def _is_plain_function(outcome: Any) -> bool:
    called = outcome if inspect.isroutine(outcome) else getattr(outcome, "__call__", None)  # noqa: B004
    return (
        callable(outcome)
        and not isinstance(outcome, nn.Module)
        and not inspect.iscoroutinefunction(called)
    )


def _name_of(outcome: Any) -> str:
    return str(getattr(outcome, "__name__", type(outcome).__name__))


def _refuse_images(prompts: Sequence[Any]) -> None:
    messages = (m for prompt in prompts if not isinstance(prompt, str) for m in prompt)
    contents = (message.get("content") for message in messages if isinstance(message, Mapping))
    if not all(content is None or is_text(content) for content in contents):
        raise NotImplementedError(
            "FlowReward reads text only, and a prompt holds something else; train on text, or "
            "leave this reward out"
        )


def completion_text(completion: Any) -> str | None:
    """The text of a completion that is a text or one message; None for anything else.

    A message that only calls tools has no text.
    """
    if isinstance(completion, str):
        return completion
    message = _only_message(completion)
    if message is None or not is_text(message.get("content")):
        return None
    return content_text(message["content"])


def _only_message(completion: Any) -> Mapping[str, Any] | None:
    messages = list(completion) if isinstance(completion, list | tuple) else []
    return messages[0] if len(messages) == 1 and isinstance(messages[0], Mapping) else None


def _only_text(completion: Any) -> str:
    text, message = completion_text(completion), _only_message(completion)
    if text is None and message is not None and message.get("content") is None:
        return ""  # it only calls tools
    if text is None:
        raise ValueError(
            "without completion_ids a completion must be text or one message of text, got "
            f"{completion!r}"
        )
    return text


def _sampled(tokenizer: Any, completion: Any, ids: Sequence[int]) -> list[int]:
    """The ids without the padding that some trainers leave behind them."""
    sampled, text = list(ids), completion_text(completion)
    known = known_ids(tokenizer, sampled)
    read = (tokenizer.decode(known, skip_special_tokens=skip) for skip in (True, False))
    # A trainer may have cut off a part, such as a tool call, but has added nothing.
    if text is not None and not any(text.strip() in whole for whole in read):
        raise ValueError(
            f"completion_ids do not stand for the completion {text[:60]!r} in the tokenizer of the "
            "tracer, which is not that of the trained model; wrap the trained model, or pass "
            "FlowReward(tracer, retokenize=True) to read the text"
        )
    while sampled and sampled[-1] == tokenizer.pad_token_id:
        sampled.pop()
    return sampled


def _scaled(outcome: float | None, score: float | None) -> float | None:
    return outcome if outcome is None or outcome <= 0 else outcome * (score or 0.0)
