"""Forward passes over one text with many cuts: what several cuts have in common is read once.

A cut changes only the rows that can no longer see a token, and those after them. So all cuts begin
with the rows of the plain text, and two cuts share their rows up to the first one that sees other
tokens. The text is read in a few passes from left to right; before each, every group of cuts that
parts from others gets its own copy of the keys and values so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from flowtracer_plugin.model.causal_lm import (
    accepted_inputs,
    first_output,
    language_model,
    vocabulary_size,
)
from flowtracer_plugin.model.cutting import Edges, cutting, prefix_copies
from flowtracer_plugin.model.free_memory import free_memory


class Sizes(NamedTuple):
    """How much is read together.

    Attributes:
        batch: The most tokens in all rows of a batch of cuts.
        one_pass: The fewest tokens in a pass, unless fewer are left. Shorter passes share more
            rows, but each copies the keys and values before it.
    """

    batch: int
    one_pass: int


SIZES = {"cpu": Sizes(2**12, 2**9)}
"""By device."""

SIZES_ELSEWHERE = Sizes(2**14, 2**12)
"""On other devices, which have not been measured; they need larger passes."""

SPARE = 0.5
"""Share of the free memory that a batch of cuts may take."""


@dataclass(frozen=True, eq=False)
class ReadText:
    """A text that a model reads with cuts.

    Attributes:
        model: The model without wrappers.
        ids: The token ids, on the model's device.
        deciding: Numbers of the rows whose logits count, in ascending order.
    """

    model: nn.Module
    ids: Int[Tensor, "1 token"]
    deciding: Int[Tensor, " answer"]


def whole_log_probs(text: ReadText, removed: Edges | None) -> Float[Tensor, "cut answer word"]:
    """Next-token log-probabilities of the deciding rows, in one pass over the whole text."""
    copies = 1 if removed is None else len(removed)
    inputs: dict[str, Any] = {"input_ids": text.ids.expand(copies, -1)}
    if "use_cache" in accepted_inputs(text.model):
        inputs["use_cache"] = False
    return _logits(text, inputs, removed, text.deciding).float().log_softmax(-1)


def shared_log_probs(
    text: ReadText, removed: Edges, cache: DynamicCache, start: int, *, least: int | None = None
) -> Float[Tensor, "cut answer word"]:
    """The same from keys and values of the plain text, which hold for all rows before `start`.

    A pass has at least `least` tokens, if there are so many left; by default as fits the device.
    """
    kept = prefix_copies(cache, start, 1)
    least = least or _sizes(text).one_pass
    parted = np.zeros(len(removed), np.int64)
    logits = torch.empty(0)
    for one in _passes(removed.cpu().numpy(), start, text.deciding.tolist(), least):
        parents = parted[one.members]
        if len(parents) > 1 or parents.tolist() != [0]:
            kept.batch_select_indices(torch.from_numpy(parents))
        here = text.deciding - one.begin
        inputs = {
            "input_ids": text.ids[:, one.begin : one.end].expand(len(parents), -1),
            "past_key_values": kept,
            "use_cache": True,
        }
        members = torch.from_numpy(one.members).to(removed.device)
        logits = _logits(text, inputs, removed[members], here if one.last else here[:0])
        parted = one.group
    found = logits.float().log_softmax(-1)
    return found[torch.from_numpy(parted).to(found.device)]


class _Pass(NamedTuple):
    """Rows that are read together.

    Attributes:
        begin: The first row.
        end: The row after the last one.
        group: The number of each cut's group; its cuts are alike up to the end of the pass.
        members: One cut of each group.
        last: Whether the deciding rows are among these rows.
    """

    begin: int
    end: int
    group: Int[np.ndarray, " cut"]
    members: Int[np.ndarray, " group"]
    last: bool


def _passes(
    removed: Bool[np.ndarray, "cut query key"], start: int, deciding: list[int], least: int
) -> Iterator[_Pass]:
    """The passes from row `start` to the last deciding one; all deciding rows are in the last."""
    bits = np.packbits(removed, axis=-1)
    group = np.zeros((len(removed), 1), np.int64)
    begin = start
    for row in range(start, deciding[-1] + 1):
        seen = np.concatenate([group.view(np.uint8), bits[:, row]], axis=1)
        _, members, inverse = np.unique(seen, axis=0, return_index=True, return_inverse=True)
        group = inverse.reshape(-1, 1).astype(np.int64)
        end, last = row + 1, row == deciding[-1]
        if last or (end <= deciding[0] and len(members) * (end - begin) >= least):
            yield _Pass(begin, end, group[:, 0], members, last)
            begin = end


def _logits(
    text: ReadText,
    inputs: dict[str, Any],
    removed: Edges | None,
    rows: Int[Tensor, " row"],
) -> Float[Tensor, "cut _ word"]:
    """The logits of some rows of one pass; those of the last row if there are none."""
    kept = "logits_to_keep" in accepted_inputs(text.model)
    if kept:
        inputs = {**inputs, "logits_to_keep": rows if len(rows) else 1}
    with ExitStack() as stack:
        if removed is not None:
            stack.enter_context(cutting(removed))
        logits = first_output(text.model(**inputs))
    return logits if kept else logits[:, rows if len(rows) else slice(-1, None)]


def affordable_cuts(text: ReadText, start: int) -> int:
    """How many cuts fit in one batch over the rows from `start` on."""
    config = language_model(text.model).config.get_text_config()
    tokens = text.ids.shape[1]
    rows, width = tokens - start, getattr(config, "hidden_size", None) or 1024
    heads = getattr(config, "num_attention_heads", None) or 32
    layers = getattr(config, "num_hidden_layers", None) or 32
    kept = len(text.deciding) if "logits_to_keep" in accepted_inputs(text.model) else rows
    # Scores in float32 with the mask beside them, some twenty activations, keys and values of all
    # layers, and three copies of the logits.
    scores = rows * tokens * (8 * heads + 8)
    active = 4 * width * (20 * rows + 2 * layers * tokens)
    logits = 12 * vocabulary_size(text.model) * kept
    room = SPARE * free_memory(text.ids.device) / (scores + active + logits)
    return max(1, min(int(room), _sizes(text).batch // rows))


def _sizes(text: ReadText) -> Sizes:
    return SIZES.get(text.ids.device.type, SIZES_ELSEWHERE)
