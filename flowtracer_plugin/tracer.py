"""Wrap a model, and trace what carried its answers."""

from __future__ import annotations

import re
import sys
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
from flowtracer_plugin.capture import (
    AttentionReader,
    evaluating,
    language_model,
    vocabulary_size,
)
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
from flowtracer_plugin.spans import (
    AnswerFinder,
    answer_mask,
    decode_tokens,
    find_answer,
    question_mask,
)
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
    if question == "mask":
        raise ValueError("question='mask' needs the mask: pass it to trace(..., question=)")
    _check_finder(answer)
    options = FlowOptions(
        layers=layers if isinstance(layers, str) else tuple(layers),
        question=question,
        answer=_finder_name(answer),
        target=target,
        question_weights=question_weights,
        boundary=boundary,
        first_token=first_token,
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


def _check_finder(finder: AnswerFinder) -> None:
    """Refuse an unknown finder now, not after a long generation."""
    if isinstance(finder, str | re.Pattern):
        find_answer("", finder)


def _check_tokenizer(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    known, embedded = len(tokenizer), vocabulary_size(model)
    # Embeddings are often padded beyond the tokenizer by a few per cent. Of a tokenizer, a token
    # for images may lie beyond the embeddings of its text-only models (Gemma 3).
    if not embedded / 2 <= known or tokenizer.vocab_size > embedded:
        raise ValueError(
            f"the tokenizer knows {known} tokens and the model embeds {embedded}: they do not "
            "belong together; load both from the same path"
        )


def _rebuilt(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    options: FlowOptions,
    answer: AnswerFinder,
    adapter: AttentionAdapter,
    block: int,
    verified: bool,
) -> FlowTracer:
    """The tracer that was pickled."""
    reader = AttentionReader(model, adapter, block=block)
    reader.verified = verified
    return FlowTracer(reader, tokenizer, options, answer)


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

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the lock and nnsight's handles on the model, which are made anew.
        reader = self._reader
        parts = self.model, self.tokenizer, self.options, self._answer
        return _rebuilt, (*parts, reader.adapter, reader.block, reader.verified)

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
        """`trace` for token ids, such as sampled ones.

        Raises:
            ValueError: As for `trace`, or the tracer's rule is `question="user"`, which needs text.
        """
        if question is None and self.options.question == "user":
            raise ValueError(
                "question='user' needs to know what the user said, and token ids do not tell; "
                "pass trace_tokens(..., question=mask)"
            )
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

        The answer ends at the model's end token, after `max_new_tokens`, or where the context ends.

        Raises:
            AnswerNotFoundError: There is no answer in what the model said; the message quotes it.
            ValueError: As for `trace`.
        """
        tokenizer = self._require_tokenizer()
        _check_finder(self._answer if answer is None else answer)
        prompt_ids, _ = encode_prompt(tokenizer, prompt)
        self._check_length(len(prompt_ids) + 1)
        most = min(max_new_tokens, self._context() - len(prompt_ids))
        device = next(self.model.parameters()).device
        inputs = torch.tensor([prompt_ids], device=device)
        with evaluating(self.model):
            generated = cast(Any, self.model).generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=most,
                do_sample=do_sample,
                temperature=temperature if do_sample else None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id or 0,
                streamer=_Progress(most) if progress else None,
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

        Raises:
            ValueError: There are no rows, `batch_size` is below 1, or as for `attention`.
        """
        if not len(prompt_ids):
            raise ValueError("wanted at least one rollout, found none")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
        if self.options.question == "user":
            raise ValueError(
                "question='user' needs to know what the user said, and token ids do not tell; "
                "wrap the model with question='prompt'"
            )
        ids = torch.cat([prompt_ids, completion_ids], dim=1)
        mask = torch.cat([prompt_mask, completion_mask], dim=1).bool()
        tokenizer, finder = self._require_tokenizer(), self._answer if answer is None else answer
        length = prompt_ids.shape[1]
        parts = []
        for rows in _chunks(len(ids), batch_size or len(ids)):
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
        # Padding does not count: positions begin at the first token that is visible.
        self._check_length(int(mask.bool().sum(-1).max()))
        size = vocabulary_size(self.model)
        if not bool(((input_ids >= 0) & (input_ids < size)).all()):
            raise ValueError(
                f"token ids must be between 0 and {size - 1}, the model's vocabulary, got "
                f"{int(input_ids.min())} to {int(input_ids.max())}"
            )

    def _check_length(self, length: int) -> None:
        limit = self._context()
        if length > limit:
            raise ValueError(
                f"prompt and response have {length} tokens, more than the model's context of "
                f"{limit}; shorten them"
            )

    def _context(self) -> int:
        config = language_model(self.model).config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or sys.maxsize


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


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
