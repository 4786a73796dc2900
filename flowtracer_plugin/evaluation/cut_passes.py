"""Forward passes over one text with many cuts: rows that several cuts have in common are read once.

A cut changes only the rows that can no longer see a token, and those after them. So all cuts begin
with the rows of the plain text, and two cuts share their rows up to the first one that sees other
tokens. In a pack, the rows of many cuts are one sequence: a row sees the plain text before it, and
of the pack only the rows of its own cut. Rows that no later row sees are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from flowtracer_plugin.attention.rounding import difference, rounding
from flowtracer_plugin.model.causal_lm import (
    accepted_inputs,
    first_output,
    language_model,
    vocabulary_size,
)
from flowtracer_plugin.model.cutting import Edges, cutting, prefix_copies
from flowtracer_plugin.model.free_memory import free_memory

MOST_TOKENS = {"cpu": 2**11}
"""Number of tokens in one forward pass, by device: a CPU keeps no more of them in its caches."""

MOST_ELSEWHERE = 2**14
"""The same on other devices."""

PACKED_ROWS = 2**9
"""A pack is full with so many rows; attention compares each of them with all others."""

MOST_EDGES = 2**25
"""Number of edges of cuts that are looked at together while packs are made."""

SPARE = 0.5
"""Share of the free memory that a forward pass may take."""


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


def log_probs(
    text: ReadText, removed: Edges | None, cache: DynamicCache | None = None, start: int = 0
) -> Float[Tensor, "cut answer word"]:
    """Next-token log-probabilities of the deciding rows, by the rows from `start` on.

    Each cut is a row of the batch. The cache holds keys and values of the plain text.
    """
    copies = 1 if removed is None else len(removed)
    inputs: dict[str, Any] = {"input_ids": text.ids[:, start:].expand(copies, -1)}
    if cache is not None and start:
        inputs |= {"past_key_values": prefix_copies(cache, start, copies), "use_cache": True}
    elif "use_cache" in accepted_inputs(text.model):
        inputs["use_cache"] = False
    return _run(text, inputs, removed, text.deciding - start)


class Pack(NamedTuple):
    """The rows of some cuts, and perhaps, spread evenly between them, those of the plain text.

    Attributes:
        places: The place in the text of each row.
        hidden: The edges that are removed, of the plain rows before the pack and of its own.
        leaves: For each cut, and then for the plain text, its deciding rows within the pack.
        plain: Whether the plain text is there.
    """

    places: list[int]
    hidden: Bool[np.ndarray, "query key"]
    leaves: Int[np.ndarray, "leaf answer"]
    plain: bool


def packed_log_probs(
    text: ReadText, pack: Pack, cache: DynamicCache, plain: Float[Tensor, "answer word"]
) -> Float[Tensor, "cut answer word"] | None:
    """The same of a pack's cuts; None if its plain text does not get the logits that it has alone.

    For example, a sliding window or a bias by distance counts the rows of other cuts too. In no cut
    do they lie farther apart than in the plain text, whose rows are spread over the whole pack.
    """
    start, device = len(pack.hidden) - len(pack.places), text.ids.device
    places = torch.tensor([pack.places], device=device)
    inputs = {
        "input_ids": text.ids[:, places[0]],
        "position_ids": places,
        "past_key_values": prefix_copies(cache, start, 1),
        "use_cache": True,
    }
    leaves = torch.from_numpy(pack.leaves).to(device)
    removed = torch.from_numpy(pack.hidden)[None].to(device)
    found = _run(text, inputs, removed, leaves.flatten())[0]
    found = found.view(*leaves.shape, *found.shape[1:])
    if not pack.plain:
        return found
    allowed = rounding(next(text.model.parameters()))
    return found[:-1] if difference(found[-1], plain) <= allowed else None


def can_pack(text: ReadText) -> bool:
    """Whether the model can be told the place of each row."""
    return {"position_ids", "past_key_values"} <= accepted_inputs(text.model)


def pack_cuts(
    removed: Bool[np.ndarray, "cut query key"],
    start: int,
    deciding: Sequence[int],
    *,
    plain: bool,
) -> tuple[Pack, int]:
    """A pack of the first cuts, and how many they are; neighbours share the rows they can.

    Args:
        removed: The edges of each cut; those that are alike for longest should be neighbours.
        start: A row up to which all cuts are like the plain text.
        deciding: The rows whose logits count.
        plain: Add the rows of the plain text, which share none.
    """
    stop = deciding[-1] + 1
    tree = _Tree(start, stop, deciding)
    count = 0
    for count, cut in enumerate(removed, 1):
        tree.add(cut, removed[count - 2] if count > 1 else None)
        if len(tree.places) >= PACKED_ROWS:
            break
    rows = len(tree.places)
    if plain:
        tree.add(np.zeros_like(removed[0]), None)
    added = len(tree.places) - rows
    # Each row stays after those that it sees; the last one of the plain text comes last.
    spread = np.linspace(0, rows, added + 1)[1:]
    order = np.argsort(np.concatenate([np.arange(rows), spread]), kind="stable")
    whole = np.concatenate([np.arange(start), start + order])
    return Pack(
        places=np.array(tree.places)[order].tolist(),
        hidden=tree.hidden()[np.ix_(whole, whole)],
        leaves=np.argsort(order)[np.stack(tree.leaves)],
        plain=plain,
    ), count


class _Tree:
    """The rows of cuts that were added one after another."""

    def __init__(self, start: int, stop: int, deciding: Sequence[int]) -> None:
        self.places: list[int] = []
        self.leaves: list[Int[np.ndarray, " answer"]] = []
        self._start, self._stop, self._deciding = start, stop, list(deciding)
        self._path = np.full(stop, -1)
        self._sees: list[Int[np.ndarray, " key"]] = []

    def add(
        self,
        cut: Bool[np.ndarray, "query key"],
        before: Bool[np.ndarray, "query key"] | None,
    ) -> None:
        """Add the rows that the cut does not share with the one that was added before."""
        start, stop = self._start, self._stop
        differs = [] if before is None else (cut != before)[start:stop].any(1)
        shared = start + int(np.argmax(differs)) if np.any(differs) else start
        lower = np.tri(stop, k=-1, dtype=bool)
        seen = (lower & ~cut[:stop, :stop]).any(0)
        seen[self._deciding] = True
        for row in range(start, stop):
            if row < shared and self._path[row] >= 0 and seen[row]:
                continue
            self._path[row] = -1
            if seen[row]:
                keys = np.flatnonzero(~cut[row, :row])
                nodes = self._path[keys[keys >= start]]
                self._sees.append(np.concatenate([keys[keys < start], start + nodes]))
                self._path[row] = len(self.places)
                self.places.append(row)
        self.leaves.append(self._path[self._deciding].copy())

    def hidden(self) -> Bool[np.ndarray, "query key"]:
        """The edges that are removed, of the plain rows before the tree and of its own."""
        size = self._start + len(self.places)
        hidden = np.ones((size, size), bool)
        for row, keys in enumerate(self._sees, self._start):
            hidden[row, keys] = False
        return hidden


def _run(
    text: ReadText, inputs: dict[str, Any], removed: Edges | None, rows: Int[Tensor, " row"]
) -> Float[Tensor, "cut row word"]:
    """The log-probabilities that one pass gives at some of its rows."""
    kept = "logits_to_keep" in accepted_inputs(text.model)
    if kept:
        inputs["logits_to_keep"] = rows
    with ExitStack() as stack:
        if removed is not None:
            stack.enter_context(cutting(removed))
        logits = first_output(text.model(**inputs))
    return (logits if kept else logits[:, rows]).float().log_softmax(-1)


def affordable_cuts(text: ReadText, start: int) -> int:
    """How many cuts fit in one forward pass over the rows from `start` on."""
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
    most = MOST_TOKENS.get(text.ids.device.type, MOST_ELSEWHERE)
    return max(1, min(int(room), most // rows))
