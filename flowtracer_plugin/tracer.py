"""Wrap a model, and trace what carried its answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from flowtracer_plugin.attention import AttentionAdapter
from flowtracer_plugin.capture import AttentionReader, language_model, vocabulary_size
from flowtracer_plugin.encoding import Prompt, encode_prompt, encode_response, user_text
from flowtracer_plugin.flow import solve_flow
from flowtracer_plugin.layers import select_layers
from flowtracer_plugin.rollouts import (
    FlowBatch,
    drop_first_token,
    join_batches,
    rollout_masks,
    solve_rollouts,
    target_mask,
)
from flowtracer_plugin.spans import AnswerFinder, answer_mask, decode_tokens, question_mask
from flowtracer_plugin.trace import FlowOptions, FlowTrace, Spans

TokenMask = Bool[np.ndarray, " token"]


class AnswerNotFoundError(ValueError):
    """The response holds nothing that the answer finder takes for an answer."""


def wrap(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    layers: str | Sequence[int] = "middle",
    question: str = "prompt",
    answer: AnswerFinder = "auto",
    target: str = "answer",
    question_weights: str = "uniform",
    boundary: str = "literal",
    first_token: str = "keep",
    adapter: AttentionAdapter | None = None,
    block: int = 64,
    verify: bool = True,
) -> FlowTracer:
    """A tracer for any Hugging Face causal language model. The model is not changed.

    Options that shape the trace are explained at `FlowOptions`.

    Args:
        model: A transformers model, also inside PEFT's wrapper; on any device, in any dtype.
        tokenizer: The model's; needed for everything that involves text.
        layers: Which attention layers are averaged.
        question: Which prompt tokens flow is injected at.
        answer: Finder of the answer in a response: a name (`"auto"`, `"boxed"`, …), a compiled
            pattern with one group, or a function from text to a span.
        target: `"answer"` or `"decision"`.
        question_weights: `"uniform"` or `"reach"`.
        boundary: `"literal"` or `"absorbing"`.
        first_token: `"keep"` or `"drop"`.
        adapter: How to read this architecture, if the built-in adapters cannot.
        block: Query rows that are computed at a time: memory against speed.
        verify: Whether the first trace checks that what is read is what the model computes.

    Raises:
        UnsupportedArchitectureError: No adapter knows the model.
        NoAttentionError: The model has no attention.
        ValueError: An option has no such choice, there is no such layer, or the tokenizer does not
            belong to the model.
        TypeError: `model` is no transformers model.
    """
    options = FlowOptions(
        layers=layers if isinstance(layers, str) else tuple(layers),
        question=question,
        answer=_finder_name(answer),
        target=cast(Any, target),
        question_weights=cast(Any, question_weights),
        boundary=cast(Any, boundary),
        first_token=cast(Any, first_token),
    )
    language_model(model)
    reader = AttentionReader(model, adapter, block=block)
    reader.verified = not verify
    if tokenizer is not None:
        _check_tokenizer(model, tokenizer)
    return FlowTracer(reader, tokenizer, options, answer)


def _finder_name(finder: AnswerFinder) -> str:
    if isinstance(finder, re.Pattern):
        return str(finder.pattern)
    return finder if isinstance(finder, str) else getattr(finder, "__name__", repr(finder))


def _check_tokenizer(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    known, embedded = len(tokenizer), vocabulary_size(model)
    # Embeddings are often padded beyond the tokenizer by a few per cent, never the other way round.
    if not embedded / 2 <= known <= embedded:
        raise ValueError(
            f"the tokenizer knows {known} tokens and the model embeds {embedded}: they do not "
            "belong together; load both from the same path"
        )


class FlowTracer:
    """Traces the answers of one model; make one with `wrap`."""

    def __init__(
        self,
        reader: AttentionReader,
        tokenizer: PreTrainedTokenizerBase | None,
        options: FlowOptions,
        answer: AnswerFinder,
    ) -> None:
        self.model = reader.model
        self.tokenizer = tokenizer
        self.options = options
        self.layers = select_layers(options.layers, [site.layer for site in reader.sites])
        self._answer = answer
        self._reader = reader

    def __repr__(self) -> str:
        return (
            f"FlowTracer({type(self.model).__name__}, layers {list(self.layers)}, "
            f"adapter {self._reader.adapter.name!r})"
        )

    def attention(
        self,
        input_ids: Int[Tensor, "batch token"],
        attention_mask: Int[Tensor, "batch token"] | Bool[Tensor, "batch token"] | None = None,
        *,
        model_inputs: Mapping[str, Any] | None = None,
    ) -> Float[Tensor, "batch query key"]:
        """Mean over the selected layers and all heads, float32, padding rows and columns 0.

        Raises:
            ValueError: Shapes differ, a token is outside the vocabulary, or the input is longer
                than the model's context.
            AdapterMismatchError: On first use, if what is read is not what the model computes.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self._check_input(input_ids, mask)
        self._reader.verify()
        return self._reader.read(input_ids, mask.bool(), self.layers, model_inputs=model_inputs)

    def trace(
        self,
        prompt: Prompt,
        response: str,
        *,
        answer: AnswerFinder | None = None,
        question: Sequence[bool] | TokenMask | None = None,
    ) -> FlowTrace:
        """What carried the answer of `response` to `prompt`.

        A text is used as it is, chat messages go through the tokenizer's chat template. The
        response is tokenized as a continuation of the prompt; use `trace_tokens` for ids that were
        sampled.

        Args:
            prompt: Text or chat messages.
            response: What the model answered.
            answer: How to find the answer, instead of the tracer's own finder.
            question: Mask over the prompt's tokens, instead of the tracer's rule.

        Raises:
            AnswerNotFoundError: There is no answer in the response.
            ValueError: Prompt or response is empty or too long, or no question token reaches the
                answer.
        """
        tokenizer = self._require_tokenizer()
        prompt_ids, text = encode_prompt(tokenizer, prompt)
        ids = encode_response(tokenizer, text, response)
        return self._trace(prompt_ids, ids, answer, question, user_text(prompt))

    def trace_tokens(
        self,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        *,
        answer: AnswerFinder | None = None,
        question: Sequence[bool] | TokenMask | None = None,
    ) -> FlowTrace:
        """`trace` for token ids, such as sampled ones."""
        return self._trace(list(prompt_ids), list(response_ids), answer, question, None)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        do_sample: bool = False,
        temperature: float = 1.0,
        answer: AnswerFinder | None = None,
        progress: bool = False,
    ) -> FlowTrace:
        """Let the model answer `prompt`, then trace its answer; greedy unless `do_sample`.

        Raises:
            AnswerNotFoundError: There is no answer in what the model said; the message quotes it.
            ValueError: As for `trace`.
        """
        tokenizer = self._require_tokenizer()
        prompt_ids, _ = encode_prompt(tokenizer, prompt)
        self._check_length(len(prompt_ids) + 1)
        device = next(self.model.parameters()).device
        inputs = torch.tensor([prompt_ids], device=device)
        generated = cast(Any, self.model).generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature if do_sample else None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id or 0,
            streamer=_Progress(max_new_tokens) if progress else None,
        )
        ids = generated[0, len(prompt_ids) :].tolist()
        return self._trace(prompt_ids, ids, answer, None, user_text(prompt))

    def trace_ids(
        self,
        prompt_ids: Int[Tensor, "batch prompt"],
        completion_ids: Int[Tensor, "batch completion"],
        prompt_mask: Int[Tensor, "batch prompt"] | Bool[Tensor, "batch prompt"],
        completion_mask: Int[Tensor, "batch completion"] | Bool[Tensor, "batch completion"],
        *,
        batch_size: int | None = None,
        answer: AnswerFinder | None = None,
    ) -> FlowBatch:
        """The flow of padded rollouts, as a trainer holds them.

        Prompts are padded left, completions right. Nothing leaves the device but the token ids, for
        finding the answers. Rows without an answer, or without a visible completion, come back as 0
        and are `None` in `answers`.

        Args:
            prompt_ids: Prompts.
            completion_ids: Completions that were sampled.
            prompt_mask: 0 on padding.
            completion_mask: 0 on padding.
            batch_size: Rows in one forward pass; all by default.
            answer: How to find the answers, instead of the tracer's own finder.
        """
        ids = torch.cat([prompt_ids, completion_ids], dim=1)
        mask = torch.cat([prompt_mask, completion_mask], dim=1).bool()
        tokenizer, finder = self._require_tokenizer(), self._answer if answer is None else answer
        length = prompt_ids.shape[1]
        parts = []
        for rows in _chunks(len(ids), batch_size):
            # Rows without an answer run through the model too: every process of a distributed run
            # must make the same forward passes.
            attention = self._edges(ids[rows], mask[rows])
            masks = rollout_masks(tokenizer, ids[rows], mask[rows], length, self.options, finder)
            parts.append(solve_rollouts(attention, masks, length, self.options))
        return join_batches(parts)

    def _edges(
        self, ids: Int[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch query key"]:
        attention = self.attention(ids, mask)
        if self.options.first_token == "drop":
            return drop_first_token(attention, mask)
        return attention

    def _trace(
        self,
        prompt_ids: list[int],
        response_ids: list[int],
        finder: AnswerFinder | None,
        question: Sequence[bool] | TokenMask | None,
        user_text: str | None,
    ) -> FlowTrace:
        finder = self._answer if finder is None else finder
        spans = self._spans(prompt_ids, response_ids, finder, question, user_text)
        device = next(self.model.parameters()).device
        ids = torch.tensor([prompt_ids + response_ids], device=device)
        attention = self._edges(ids, torch.ones_like(ids, dtype=torch.bool))[0].cpu().numpy()
        options = self.options if question is None else replace(self.options, question="mask")
        flow = solve_flow(
            attention,
            spans.question,
            spans.target,
            question_weights=options.question_weights,
            boundary=options.boundary,
        )
        return FlowTrace(
            token_ids=np.array(prompt_ids + response_ids),
            tokens=decode_tokens(self._require_tokenizer(), prompt_ids + response_ids).pieces,
            spans=spans,
            attention=attention,
            reach=flow.reach,
            throughput=flow.throughput,
            model=_model_name(self.model),
            options=options,
            layers=self.layers,
        )

    def _spans(
        self,
        prompt_ids: list[int],
        response_ids: list[int],
        finder: AnswerFinder,
        question: Sequence[bool] | TokenMask | None,
        user_text: str | None,
    ) -> Spans:
        tokenizer = self._require_tokenizer()
        if not response_ids:
            raise ValueError("the response is empty, so there is no answer to trace")
        found = answer_mask(tokenizer, response_ids, finder)
        text = decode_tokens(tokenizer, response_ids).text
        if found is None:
            raise AnswerNotFoundError(
                f"no answer found by {_finder_name(finder)!r} in the response {_shorten(text)!r}; "
                "say how to find it with answer=: a finder's name, re.compile(...) with one group, "
                "or a function from text to (start, end)"
            )
        rule = self.options.question if question is None else question
        source = question_mask(tokenizer, prompt_ids, cast(Any, rule), user_text)
        nothing = np.zeros(len(response_ids), bool)
        answer = np.concatenate([np.zeros(len(prompt_ids), bool), found[0]])
        return Spans(
            prompt_length=len(prompt_ids),
            question=np.concatenate([source, nothing]),
            answer=answer,
            target=target_mask(answer, self.options),
            rule=found[1].rule,
            answer_text=text[found[1].start : found[1].end],
        )

    def _require_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError("this tracer has no tokenizer; make it with wrap(model, tokenizer)")
        return self.tokenizer

    def _check_input(self, input_ids: Tensor, mask: Tensor) -> None:
        if input_ids.ndim != 2 or input_ids.shape != mask.shape:
            raise ValueError(
                "input_ids and attention_mask must both be [batch, token], got "
                f"{tuple(input_ids.shape)} and {tuple(mask.shape)}"
            )
        self._check_length(input_ids.shape[1])
        size = vocabulary_size(self.model)
        if not bool(((input_ids >= 0) & (input_ids < size)).all()):
            raise ValueError(
                f"token ids must be between 0 and {size - 1}, the model's vocabulary, got "
                f"{int(input_ids.min())} to {int(input_ids.max())}"
            )

    def _check_length(self, length: int) -> None:
        config = language_model(self.model).config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise ValueError(
                f"prompt and response have {length} tokens, more than the model's context of "
                f"{limit}; shorten them"
            )


def _chunks(count: int, size: int | None) -> Iterator[slice]:
    step = size or max(count, 1)
    return (slice(start, start + step) for start in range(0, count, step))


def _model_name(model: nn.Module) -> str:
    return language_model(model).config.name_or_path or type(model).__name__


def _shorten(text: str, limit: int = 160) -> str:
    return text if len(text) <= limit else f"…{text[-limit:]}"


class _Progress:
    """A progress bar as a transformers streamer: one call for the prompt, one for each token."""

    def __init__(self, total: int) -> None:
        self._bar: tqdm[Any] = tqdm(total=total, desc="generating", unit="token")
        self._started = False

    def put(self, value: Tensor) -> None:
        self._bar.update(int(self._started))
        self._started = True

    def end(self) -> None:
        self._bar.close()
