"""A text whose question and answer are found, ready to be read by the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from flowtracer_plugin.options import FlowOptions
from flowtracer_plugin.text.spans import Spans


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
