"""A text whose question and answer are found, ready to be read by the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flowtracer_plugin.options import FlowOptions
from flowtracer_plugin.text.answers import AnswerFinder
from flowtracer_plugin.text.spans import Spans, decode_tokens, find_spans

TokenMask = Bool[np.ndarray, " token"]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class FoundText:
    """A text before the model reads it.

    Attributes:
        ids: The token ids of prompt and response.
        tokens: The decoded text of each token.
        spans: Question, response and answer.
        options: The options of its trace.
    """

    ids: list[int]
    tokens: tuple[str, ...]
    spans: Spans
    options: FlowOptions


def find_text(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    response: list[int],
    options: FlowOptions,
    *,
    finder: AnswerFinder,
    question: str | Sequence[bool] | TokenMask,
    user_text: str | None,
    turns: TokenMask | None,
) -> FoundText:
    """The text with its spans; its options name the rule by which the question was found.

    Raises:
        AnswerNotFoundError: The response has no answer.
        ValueError: Prompt or response is empty, or the rule needs more than is known.
    """
    if isinstance(question, str) and question == "auto":
        question = "prompt" if turns is None else "turns"
    named = question if isinstance(question, str) else "mask"
    if named == "turns":
        if turns is None:
            raise ValueError(
                "question='turns' needs chat messages in which the user says something, and a "
                "template that shows it as it is; pass question='prompt', or a mask"
            )
        question = turns
    spans = find_spans(
        tokenizer,
        prompt,
        response,
        finder=finder,
        question=question,
        user_text=user_text,
        target=options.target,
    )
    ids = prompt + response
    tokens = decode_tokens(tokenizer, ids).pieces
    return FoundText(ids=ids, tokens=tokens, spans=spans, options=replace(options, question=named))


Masks = Mapping[str, Bool[Tensor, "batch token"]]


def padded_texts(
    texts: Sequence[FoundText],
) -> tuple[Int[Tensor, "batch token"], Bool[Tensor, "batch token"], Masks]:
    """The ids of texts with padding behind the shorter ones, where they are visible, and masks.

    The masks are those of target, response and answer. All are on the host.
    """
    most = max(len(text.ids) for text in texts)
    ids = torch.zeros(len(texts), most, dtype=torch.long)
    visible = torch.zeros_like(ids, dtype=torch.bool)
    masks = {name: torch.zeros_like(visible) for name in ("target", "response", "answer")}
    for row, text in enumerate(texts):
        length = len(text.ids)
        ids[row, :length] = torch.tensor(text.ids)
        visible[row, :length] = True
        for name, mask in masks.items():
            mask[row, :length] = torch.from_numpy(getattr(text.spans, name))
    return ids, visible, masks
