"""`wrap` and the tracer that it returns."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from time import perf_counter
from types import MappingProxyType
from typing import Any, NoReturn, SupportsIndex

from flowtracer_plugin.versions import check_versions

check_versions()

# ruff: noqa: E402 (with unsupported versions, the imports below can fail with other messages)
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from flowtracer_plugin.attention.adapter import AttentionAdapter
from flowtracer_plugin.model.causal_lm import (
    check_tokenizer,
    check_vocabulary,
    language_model,
    model_name,
    unwrapped,
)
from flowtracer_plugin.model.generation import generate_ids
from flowtracer_plugin.model.layers import layer_numbers, select_layers
from flowtracer_plugin.options import BEST, EVERYWHERE, FREE, FlowOptions, flow_options, head_pairs
from flowtracer_plugin.reading.reader import AttentionReader
from flowtracer_plugin.result.token_heads import TokenHeads
from flowtracer_plugin.text.answers import AnswerFinder, check_finder, finder_name
from flowtracer_plugin.text.encoding import (
    Prompt,
    TokenIds,
    check_turn,
    encode_prompt,
    encode_response,
    token_ids,
    user_text,
)
from flowtracer_plugin.text.spans import turns_mask
from flowtracer_plugin.trace import guesses
from flowtracer_plugin.trace.default_preset import lacks_influence
from flowtracer_plugin.trace.flow_trace import FlowTrace
from flowtracer_plugin.trace.found_text import FoundText, TokenMask, find_text
from flowtracer_plugin.trace.memory import MODES, MemoryEstimate
from flowtracer_plugin.trace.rollouts import (
    FlowBatch,
    OnHost,
    check_rollouts,
    join_batches,
    rollout_masks,
    to_host,
)
from flowtracer_plugin.trace.solver import Solver
from flowtracer_plugin.trace.token_heads import token_heads

logger = logging.getLogger(__name__)


def wrap(
    model: nn.Module | Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    preset: str | None = None,
    layers: str | int | Iterable[SupportsIndex] | None = None,
    question: str = "auto",
    answer: AnswerFinder = "auto",
    target: str | None = None,
    question_weights: str | None = None,
    boundary: str | None = None,
    first_token: str | None = None,
    heads: str | float | Iterable[tuple[int, int]] | None = None,
    edges: str | None = None,
    rows: str | None = None,
    damping: float | None = None,
    adapter: AttentionAdapter | None = None,
    backend: str = "nnsight",
    block: int = 64,
    mode: str = "auto",
    verify: bool = True,
) -> FlowTracer:
    """A tracer for a Hugging Face causal language model, which stays unchanged.

    `FlowOptions` explains the options that shape the trace.

    Args:
        model: A transformers model, possibly with LoRA. Wrappers such as `torch.compile`'s are
            removed.
        tokenizer: The model's tokenizer; needed for everything that involves text.
        preset: `"paper"`, `"decision"`, `"sharp"`, `"decided"`, `"derivation"` or `"causal"`: sets
            the options below that are None. By default it is `"derivation"`, which follows each
            token to those that decided it, or with a warning `"paper"` if the model cannot make the
            backward pass that this takes; that is tried on 17 tokens.
        layers: The attention layers to average: a name, or numbers; by default the preset's, which
            are all or, for `"paper"`, `"decision"` and `"sharp"`, the middle third.
        question: The prompt tokens that are the question; presets other than `"derivation"` and
            `"decided"` inject flow there. By default all that the user said in chat messages, else
            the prompt.
        answer: The answer finder: a name (`"auto"`, `"boxed"`, …), a compiled pattern with one
            group, or a function from the text to a span.
        target: `"answer"` or `"decision"`.
        question_weights: `"uniform"`, `"reach"` or `"origins"`.
        boundary: `"literal"` or `"absorbing"`.
        first_token: `"keep"` or `"drop"`.
        heads: `"all"`, a share such as 0.3, or (layer, head) pairs.
        edges: `"attention"`, `"value"`, `"influence"` or `"causal"`.
        rows: `"own"` or `"decision"`.
        damping: Factor of every edge, above 0 and up to 1.
        adapter: An adapter for this architecture, if the built-in ones cannot read it.
        backend: `"nnsight"` reads any model. `"interface"` reads models that use transformers'
            attention interface, also with tensor parallelism, in several threads, or without
            source code.
        block: Number of query rows that are computed at a time; more rows take more memory. Of
            long texts, a CPU computes fewer.
        mode: `"dense"` holds the attention of all pairs of tokens; `"streamed"` computes it in
            blocks and linear memory, in part twice; `"auto"` is dense if that takes at most half of
            the free memory.
        verify: Check that the tokenizer belongs to the model, and that the attention that is read
            is the attention that the model computes.

    Raises:
        UnsupportedArchitectureError: No adapter can read the model.
        NoAttentionError: The model has no attention.
        ValueError: An option or a layer does not exist, or the tokenizer does not belong to the
            model.
        TypeError: `model` is no transformers model, or `tokenizer` no tokenizer.
        UnsupportedVersionError: A library is installed in an untested version.
    """
    check_versions()
    guesses.check_wrapped(model, tokenizer)
    if question == "mask":
        raise ValueError("question='mask' needs the mask: pass it to trace(..., question=)")
    check_finder(answer)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    chosen = {
        "layers": layers if layers is None or isinstance(layers, str) else layer_numbers(layers),
        "question": question,
        "answer": finder_name(answer),
        "target": target,
        "question_weights": question_weights,
        "boundary": boundary,
        "first_token": first_token,
        "heads": None if heads is None else head_pairs(heads),
        "edges": edges,
        "rows": rows,
        "damping": damping,
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    options = flow_options(preset or BEST, **chosen)
    if options.edges == "causal" and mode == "streamed":
        raise ValueError(
            "edges='causal' is a map of all pairs of tokens, which mode='streamed' avoids; "
            "wrap(..., mode='dense')"
        )
    language_model(unwrapped(model))
    reader = AttentionReader(model, adapter, backend=backend, block=block)
    reader.verified = not verify
    if verify and tokenizer is not None:
        check_tokenizer(reader.model, tokenizer)
    if preset is None and edges is None and lacks_influence(reader):
        options = flow_options(EVERYWHERE, **chosen)
    by_default = preset is None and set(chosen) <= set(FREE)
    tracer = FlowTracer(reader, tokenizer, options, answer, mode, chosen, by_default=by_default)
    logger.info("wrapped %r: %s", tracer, options)
    return tracer


def _rebuilt(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    options: FlowOptions,
    answer: AnswerFinder,
    mode: str,
    adapter: AttentionAdapter,
    backend: str,
    block: int,
    verified: bool,
    chosen: Mapping[str, Any],
    by_default: bool,
) -> FlowTracer:
    """The tracer, made again after pickling."""
    reader = AttentionReader(model, adapter, backend=backend, block=block)
    reader.verified = verified
    return FlowTracer(reader, tokenizer, options, answer, mode, chosen, by_default=by_default)


class FlowTracer:
    """Traces the answers of one model; make one with `wrap`.

    Attributes:
        model: The model, without wrappers.
        tokenizer: The tokenizer, or None.
        options: The options of the flow.
        layers: Numbers of the averaged layers.
        answer: The answer finder.
        reader: Reads the model's attention.
        mode: `"auto"`, `"dense"` or `"streamed"`.
        chosen: The options that were passed to `wrap`; the others come from the preset.
        by_default: Whether nobody chose the graph, neither by a preset nor by an option.
    """

    def __init__(
        self,
        reader: AttentionReader,
        tokenizer: PreTrainedTokenizerBase | None,
        options: FlowOptions,
        answer: AnswerFinder,
        mode: str = "auto",
        chosen: Mapping[str, Any] = MappingProxyType({}),
        *,
        by_default: bool = False,
    ) -> None:
        self.model = reader.model
        self.tokenizer = tokenizer
        self.options = options
        self.layers = select_layers(options.layers, [site.layer for site in reader.sites])
        self.answer = answer
        self.reader = reader
        self.mode = mode
        self.chosen = dict(chosen)
        self.by_default = by_default
        self._solver = Solver(reader, self.layers, options, mode)

    def __repr__(self) -> str:
        return (
            f"FlowTracer({type(self.model).__name__}, layers {list(self.layers)}, "
            f"adapter {self.reader.adapter.name!r})"
        )

    def __call__(self, *_given: object, **_named: object) -> NoReturn:
        """Not the way to trace.

        Raises:
            TypeError: Always; the message names the methods that trace.
        """
        raise TypeError(guesses.NOT_CALLED)

    def __reduce__(self) -> tuple[Any, ...]:
        # The lock and nnsight's handles cannot be pickled; unpickling makes new ones.
        reader = self.reader
        parts = self.model, self.tokenizer, self.options, self.answer, self.mode
        return _rebuilt, (
            *parts,
            reader.adapter,
            reader.backend.name,
            reader.block,
            reader.verified,
            self.chosen,
            self.by_default,
        )

    def estimate(self, tokens: int, *, batch: int = 1) -> MemoryEstimate:
        """The memory that tracing `batch` texts of `tokens` tokens would take, and the free memory.

        `print(tracer.estimate(32_768))` shows it in words. The figures follow from the model's
        sizes and a run on 17 tokens, not from a trace of that length.

        Raises:
            ValueError: `tokens` or `batch` is below 1.
        """
        return self._solver.budget.estimate(tokens, batch)

    def attention(
        self,
        input_ids: Int[Tensor, "batch query"],
        attention_mask: Int[Tensor, "batch key"] | Bool[Tensor, "batch key"] | None = None,
        *,
        model_inputs: Mapping[str, Any] | None = None,
    ) -> Float[Tensor, "batch query key"]:
        """The mean attention over the selected layers and all heads, float32, 0 at padding.

        Args:
            input_ids: Token ids.
            attention_mask: 0 on padding.
            model_inputs: Further inputs of the model, such as images. `position_ids` that restart
                mean packed texts, which take no mask. With `past_key_values` the keys are the
                cached tokens and the input, the mask covers both, and the cache stays unchanged.

        Raises:
            TypeError: Ids or mask are no tensors of whole numbers.
            ValueError: Shapes differ, a further input is misspelt, a token is outside the
                vocabulary, the input is longer than the model's context, or packed texts come with
                a mask.
            AdapterMismatchError: On first use, if the attention that is read is not the model's.
        """
        return self._solver.attention(input_ids, attention_mask, dict(model_inputs or {}))

    def trace(
        self,
        prompt: Prompt,
        response: str | None = None,
        *,
        answer: AnswerFinder | None = None,
        question: str | Sequence[bool] | TokenMask | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        progress: bool = False,
    ) -> FlowTrace:
        """The trace of the answer in `response` to `prompt`.

        A text is used unchanged; chat messages go through the tokenizer's chat template. The
        response is tokenized as a continuation of the prompt; use `trace_tokens` for sampled ids.

        Args:
            prompt: Text or chat messages.
            response: The model's response, which must be given; `generate` lets the model answer.
            answer: An answer finder to use instead of the tracer's.
            question: A mask over the prompt's tokens, or a rule to use instead of the tracer's.
            template_kwargs: Arguments that the chat template reads, such as
                `{"enable_thinking": False}` or `tools`.
            progress: Show a progress bar.

        Raises:
            AnswerNotFoundError: The response has no answer.
            TooLittleMemoryError: The trace would not fit in the free memory.
            TypeError: The prompt is no text and no chat, or the response no text.
            ValueError: Prompt or response is empty or too long, the messages end with another one
                of the assistant, or no question token reaches the answer.
        """
        guesses.check_prompt(prompt, template_kwargs)
        said = guesses.checked_response(prompt, response)
        check_turn(prompt, template_kwargs)
        tokenizer = self.require_tokenizer()
        prompt_ids, text = encode_prompt(tokenizer, prompt, template_kwargs)
        ids = encode_response(tokenizer, text, said)
        found = self.find(
            prompt_ids,
            ids,
            answer=answer,
            question=question,
            user_text=user_text(prompt),
            turns=turns_mask(tokenizer, prompt, prompt_ids, template_kwargs),
        )
        return self.trace_found([found], progress=progress)[0]

    def trace_tokens(
        self,
        prompt_ids: TokenIds | Any,
        response_ids: TokenIds | None = None,
        *,
        answer: AnswerFinder | None = None,
        question: str | Sequence[bool] | TokenMask | None = None,
        progress: bool = False,
    ) -> FlowTrace:
        """The trace of given token ids, such as sampled ones: lists, arrays or tensors.

        A batch of one is unpacked; use `trace_ids` for more. A `RequestOutput` of vLLM, which holds
        both, may be passed alone.

        Raises:
            TypeError: Ids are no whole numbers, or those of the response are missing.
            ValueError: As for `trace`; an id is outside the model's vocabulary, there are several
                texts, or `question="user"` or `"turns"`, which need the text.
        """
        if response_ids is None:
            prompt_ids, response_ids = guesses.sampled_ids(prompt_ids)
        asked, said = token_ids("prompt_ids", prompt_ids), token_ids("response_ids", response_ids)
        if asked or said:
            check_vocabulary(self.model, torch.tensor([*asked, *said]))
        rule = self.options.question if question is None else question
        guesses.check_rule(rule, "pass trace_tokens(..., question=mask)")
        found = self.find(asked, said, answer=answer, question=question)
        return self.trace_found([found], progress=progress)[0]

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        do_sample: bool = False,
        temperature: float | None = None,
        top_p: float | None = None,
        answer: AnswerFinder | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        progress: bool = False,
    ) -> FlowTrace:
        """The trace of the model's own answer to `prompt`, greedy unless `do_sample`.

        The response ends at the model's end token, at a stop string of its generation config, after
        `max_new_tokens`, or at the end of the context. Sampling uses this config, unless
        `temperature` or `top_p` is given. Beams, several answers and token healing, which would
        change the prompt, are not used. The chat template gets `template_kwargs`, as in `trace`;
        with `{"continue_final_message": True}` the model goes on with the last message.

        Raises:
            AnswerNotFoundError: The response has no answer; the message quotes it.
            TypeError: As for `trace`.
            ValueError: As for `trace`, or `temperature` or `top_p` come without `do_sample`.
        """
        check_finder(self.answer if answer is None else answer)
        prompt_ids, ids = self.sample(
            prompt,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_p=top_p,
            template_kwargs=template_kwargs,
            progress=progress,
        )
        found = self.find(
            prompt_ids,
            ids,
            answer=answer,
            user_text=user_text(prompt),
            turns=turns_mask(self.require_tokenizer(), prompt, prompt_ids, template_kwargs),
        )
        return self.trace_found([found], progress=progress)[0]

    def sample(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        do_sample: bool = False,
        temperature: float | None = None,
        top_p: float | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        progress: bool = False,
    ) -> tuple[list[int], list[int]]:
        """The token ids of `prompt` and of the model's answer, as `generate` traces them.

        Raises:
            TypeError: The prompt is no text and no chat.
            ValueError: The prompt is empty or too long, the messages end with one of the assistant,
                or `temperature` or `top_p` come without `do_sample`.
        """
        guesses.check_prompt(prompt, template_kwargs)
        check_turn(prompt, template_kwargs)
        started = perf_counter()
        tokenizer = self.require_tokenizer()
        prompt_ids, _ = encode_prompt(tokenizer, prompt, template_kwargs)
        with self.reader.exclusive():
            ids = generate_ids(
                self.model,
                prompt_ids,
                tokenizer=tokenizer,
                max_new_tokens=max_new_tokens,
                do_sample=do_sample,
                temperature=temperature,
                top_p=top_p,
                progress=progress,
            )
        seconds = perf_counter() - started
        logger.info("generated %d tokens for %d in %.2f s", len(ids), len(prompt_ids), seconds)
        return prompt_ids, ids

    def trace_ids(
        self,
        prompt_ids: Int[Tensor, "batch prompt"],
        completion_ids: Int[Tensor, "batch completion"],
        prompt_mask: Int[Tensor, "batch prompt"] | Bool[Tensor, "batch prompt"],
        completion_mask: Int[Tensor, "batch completion"] | Bool[Tensor, "batch completion"],
        *,
        batch_size: int | None = None,
        answer: AnswerFinder | None = None,
        question: Bool[Tensor, "batch prompt"] | None = None,
    ) -> FlowBatch:
        """The flow of padded rollouts, in the form in which trainers hold them.

        Prompts are padded on the left, completions on the right. Only ids and masks are copied from
        the device, to find the answers. Rows without an answer or without a visible completion are
        0, and None in `answers`. A row that fails is 0, too, and its error is in `errors`.

        Args:
            prompt_ids: Prompts.
            completion_ids: Sampled completions.
            prompt_mask: 0 on padding.
            completion_mask: 0 on padding.
            batch_size: Number of rows in one forward pass; all by default.
            answer: An answer finder to use instead of the tracer's.
            question: The prompt tokens that are the question, to use instead of the tracer's rule.

        Raises:
            TypeError: Ids or masks are no tensors, or of a kind that cannot be read.
            ValueError: Ids and masks differ in shape, prompts are padded on the right, there are no
                rows, `batch_size` is below 1, there is no such finder, or as for `attention`.
        """
        checks = check_rollouts(prompt_ids, completion_ids, prompt_mask, completion_mask)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
        guesses.check_marked(question, prompt_ids, self.options.question)
        ids = torch.cat([prompt_ids, completion_ids], dim=1)
        mask = torch.cat([prompt_mask, completion_mask], dim=1).bool()
        host, sound = to_host(ids, mask, *(check.sound for check in checks))
        for check, passed in zip(checks, sound, strict=True):
            if not passed:
                check.explain()
        tokenizer, finder = self.require_tokenizer(), self.answer if answer is None else answer
        length = prompt_ids.shape[1]
        parts = []
        for start in range(0, len(ids), size := batch_size or len(ids)):
            rows = slice(start, start + size)
            part = OnHost(host.ids[rows], host.visible[rows])
            # Rows without an answer run through the model, too: all processes of a distributed run
            # must make the same forward passes.
            asked = None if question is None else question[rows]
            masks = rollout_masks(
                tokenizer,
                *part,
                length,
                self.options,
                finder,
                question=asked,
                device=ids.device,
            )
            parts.append(self._solver.rollouts(ids[rows], part, masks, length))
        return join_batches(parts)

    def find(
        self,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        *,
        answer: AnswerFinder | None = None,
        question: str | Sequence[bool] | TokenMask | None = None,
        user_text: str | None = None,
        turns: TokenMask | None = None,
    ) -> FoundText:
        """The text with its question and answer, for `trace_found`; the model does not run.

        Args:
            prompt_ids: The token ids of the prompt.
            response_ids: The token ids of the response.
            answer: An answer finder to use instead of the tracer's.
            question: A mask over the prompt's tokens, or a rule to use instead of the tracer's.
            user_text: What the user said; needed for `question="user"`.
            turns: The prompt's tokens of all that the user said; needed for `question="turns"`.

        Raises:
            AnswerNotFoundError: The response has no answer.
            ValueError: Prompt or response is empty, or the user's text is missing.
        """
        return find_text(
            self.require_tokenizer(),
            list(prompt_ids),
            list(response_ids),
            self.options,
            finder=self.answer if answer is None else answer,
            question=self.options.question if question is None else question,
            user_text=user_text,
            turns=turns,
        )

    def trace_found(self, texts: Sequence[FoundText], *, progress: bool = False) -> list[FlowTrace]:
        """The traces of texts from `find`, in their order.

        Texts of like length are faster together: they are read in one forward pass, if that fits
        in the free memory and the heads are not chosen for each text.

        Raises:
            TooLittleMemoryError: A trace would not fit in the free memory.
            ValueError: A text is too long, or no question token reaches the answer.
        """
        started = perf_counter()
        solved = self._solver.texts(texts, progress=progress)
        lengths = ", ".join(str(len(text.ids)) for text in texts)
        logger.info("traced %s tokens in %.2f s", lengths, perf_counter() - started)
        return [
            FlowTrace(
                token_ids=np.array(text.ids),
                tokens=text.tokens,
                spans=text.spans,
                model=model_name(self.model),
                options=text.options,
                layers=self.layers,
                **parts,
            )
            for text, parts in zip(texts, solved, strict=True)
        ]

    def heads(self, trace: FlowTrace, token: int) -> TokenHeads:
        """What each attention head pays into one token of a trace that this tracer made.

        The edges of the trace are means over heads; this divides those into one token among the
        heads again, at the cost of a forward pass, and with `edges="influence"` of a backward
        pass. The trace's own options count, also where they are not those of this tracer.

        Args:
            trace: A trace of this model.
            token: The number of the token.

        Raises:
            TooLittleMemoryError: The queries and keys of the text do not fit in the free memory.
            UnsupportedArchitectureError: The model is tensor parallel: no process has all heads.
            ValueError: No edges lead into the token, they are `"causal"`, which no single head has
                a part of, or another model made the trace.

        Examples:
            >>> tracer.heads(trace, 43).strongest(1)[0].layer  # doctest: +SKIP
            2
        """
        return token_heads(self.reader, trace, token)

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            ValueError: The tracer has no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("this tracer has no tokenizer; make it with wrap(model, tokenizer)")
        return self.tokenizer
