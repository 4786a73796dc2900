"""How much less likely does an answer become when attention between tokens of its text is cut?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from flowtracer_plugin.attention.rounding import difference, rounding
from flowtracer_plugin.evaluation.cut_passes import (
    MOST_EDGES,
    PACKED_ROWS,
    ReadText,
    affordable_cuts,
    can_pack,
    log_probs,
    pack_cuts,
    packed_log_probs,
)
from flowtracer_plugin.evaluation.progress import Tick
from flowtracer_plugin.flow.arrays import check_readable
from flowtracer_plugin.model.causal_lm import (
    check_input,
    input_device,
    unwrapped,
)
from flowtracer_plugin.model.cutting import (
    Edges,
    check_model,
    hidden_from_later,
    plainly,
    read_prefix,
)
from flowtracer_plugin.result.trace_data import TraceData

ROWS = ("answer", "future")
"""From which queries a token is hidden: those that predict the answer, or all later ones."""

TokenSets = Bool[Tensor, "cut token"]


def _ignore(_cuts: int) -> None:
    pass


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class KnockOut:
    """The effect of each cut on an answer; tensors are on the CPU.

    Attributes:
        log_prob: Mean log-probability of the answer's tokens without a cut, in nats.
        predicted: Whether greedy decoding without a cut gives every answer token.
        drop: How far the mean log-probability of the answer's tokens falls, in nats per token.
        flipped: Whether the greedy choice changes at any answer token.
        divergence: KL divergence of the next-token distribution from the one without the cut, in
            nats, the mean over the answer's tokens.
    """

    log_prob: float
    predicted: bool
    drop: Float[Tensor, " cut"]
    flipped: Bool[Tensor, " cut"]
    divergence: Float[Tensor, " cut"]


def knock_out(
    model: nn.Module,
    ids: Int[Tensor, " token"],
    answer: Bool[Tensor, " token"],
    tokens: TokenSets,
    *,
    rows: str = "future",
    batch_size: int | None = None,
) -> KnockOut:
    """The effect on the answer if no layer and head can attend to sets of tokens.

    The softmax spreads the attention that they received over the other tokens. A token always sees
    itself.

    Args:
        model: A causal language model, which is not changed.
        ids: Prompt and response.
        answer: Tokens of the response whose log-probability counts; not the first token.
        tokens: One set of tokens for each cut.
        rows: `"future"` hides the tokens from all later ones, which ends every path through them.
            `"answer"` hides them only from the tokens that predict the answer: what other tokens
            took over from them still counts.
        batch_size: Cuts in one forward pass; as many as memory allows by default.

    Raises:
        KnockOutError: The model's attention cannot be cut, or its tokens also reach later ones by
            other ways, such as recurrent states.
        TypeError: Ids, answer or tokens are no tensors, or of a kind that cannot be read.
        ValueError: Shapes differ, there is no answer, `rows` is not one of the choices, or
            `batch_size` is below 1.
    """
    return Baseline.read(model, ids, answer).knock_out(tokens, rows=rows, batch_size=batch_size)


def token_drops(
    model: nn.Module,
    trace: TraceData,
    tokens: Iterable[int] | None = None,
    *,
    batch_size: int | None = None,
) -> dict[int, float]:
    """By its number, how far the answer's log-probability falls if a token is knocked out, in nats.

    It is the mean over the answer's tokens, and each token is knocked out alone, as by `knock_out`.

    Args:
        model: The model of the trace.
        trace: The trace whose answer counts.
        tokens: Numbers of tokens; by default all before the answer, which takes a forward pass for
            each of them.
        batch_size: Cuts in one forward pass; as many as memory allows by default.

    Raises:
        KnockOutError, TypeError: As for `knock_out`.
        ValueError: As for `knock_out`, or the trace has no such token.
    """
    first = int(trace.spans.answer.argmax())
    asked = list(range(first) if tokens is None else tokens)
    found = set_drops(model, trace, [[token] for token in asked], batch_size=batch_size)
    return dict(zip(asked, found, strict=True))


def set_drops(
    model: nn.Module,
    trace: TraceData,
    sets: Sequence[Sequence[int]],
    *,
    batch_size: int | None = None,
) -> list[float]:
    """How far the answer's log-probability falls if a set of tokens is knocked out, in nats.

    An answer that stands in a text several times hardly needs any one of its places, but it needs
    them together.

    Args:
        model: The model of the trace.
        trace: The trace whose answer counts.
        sets: Numbers of tokens; those of a set are knocked out together.
        batch_size: Sets in one forward pass; as many as memory allows by default.

    Raises:
        KnockOutError, TypeError: As for `knock_out`.
        ValueError: As for `knock_out`, or the trace has no such token.
    """
    size = len(trace.token_ids)
    unknown = sorted({token for one in sets for token in one if not 0 <= token < size})
    if unknown:
        raise ValueError(f"wanted tokens 0 to {size - 1}, found {unknown}")
    hidden = torch.zeros(len(sets), size, dtype=torch.bool)
    for row, one in zip(hidden, sets, strict=True):
        row[list(one)] = True
    ids, answer = torch.from_numpy(trace.token_ids), torch.from_numpy(trace.spans.answer)
    return knock_out(model, ids, answer, hidden, batch_size=batch_size).drop.tolist()


def cut_edges(
    model: nn.Module,
    ids: Int[Tensor, " token"],
    answer: Bool[Tensor, " token"],
    edges: Edges,
    *,
    batch_size: int | None = None,
) -> KnockOut:
    """The effect of cutting edges: which query cannot see which key, in all layers and heads.

    Edges of a token to itself stay.

    Raises:
        KnockOutError, TypeError, ValueError: As for `knock_out`.
    """
    return Baseline.read(model, ids, answer).cut_edges(edges, batch_size=batch_size)


def hidden_edges(tokens: TokenSets, answer: Bool[Tensor, " token"], *, rows: str) -> Edges:
    """The edges that `knock_out` cuts, without those of tokens to themselves."""
    edges = hidden_from_later(tokens)
    return edges & deciding_rows(answer)[:, None] if rows == "answer" else edges


def deciding_rows(answer: Bool[Tensor, " token"]) -> Bool[Tensor, " token"]:
    """The tokens before the answer's, whose logits choose them."""
    return answer.roll(-1)


@dataclass(frozen=True, eq=False)
class Baseline(ReadText):
    """A text as the model reads it without a cut. It is read once, however many cuts follow.

    Attributes:
        answer: The answer's tokens, which the deciding rows choose.
        continues: Whether the model computes the same from a short cached text as from the whole.
    """

    answer: Bool[Tensor, " token"]
    continues: bool

    @classmethod
    def read(
        cls, model: nn.Module, ids: Int[Tensor, " token"], answer: Bool[Tensor, " token"]
    ) -> Baseline:
        """The text as the model reads it without a cut.

        Raises:
            KnockOutError, TypeError: As for `knock_out`.
            ValueError: The shapes of `ids` and `answer` differ, or there is no answer.
        """
        model = unwrapped(model)
        _check_tensors(ids=ids, answer=answer)
        if ids.ndim != 1 or answer.shape != ids.shape or answer.dtype != torch.bool:
            raise ValueError(
                f"ids and answer must both be [token], answer boolean, got {tuple(ids.shape)} and "
                f"{answer.dtype} of shape {tuple(answer.shape)}"
            )
        if not bool(answer.any()) or bool(answer[0]):
            raise ValueError(
                "answer must mark at least one token, and not the first, which nothing predicts"
            )
        check_input(model, ids[None], None)
        device = input_device(model)
        deciding = deciding_rows(answer).nonzero()[:, 0].to(device)
        return cls(model, ids[None].to(device), deciding, answer.to(device), check_model(model))

    @property
    def log_prob(self) -> float:
        """Mean log-probability of the answer's tokens, in nats."""
        return float(self.log_probs.gather(-1, self.wanted[:, None]).mean())

    @property
    def predicted(self) -> bool:
        """Whether greedy decoding gives every answer token."""
        return bool((self.log_probs.argmax(-1) == self.wanted).all())

    @property
    def wanted(self) -> Int[Tensor, " answer"]:
        """Ids of the answer's tokens."""
        return self.ids[0, self.answer]

    @cached_property
    def log_probs(self) -> Float[Tensor, "answer word"]:
        """Next-token log-probabilities where the answer is predicted."""
        with plainly(self.model):
            return log_probs(self, None)[0]

    @cached_property
    def cache(self) -> DynamicCache | None:
        """Keys and values of the text; None if a text of this length does not continue from them.

        For example, positions may be scaled by the number of tokens that are read at once.
        """
        start = int(self.deciding[0])
        if not self.continues or not start:
            return None
        size = self.ids.shape[1]
        none = torch.zeros(1, size, size, dtype=torch.bool, device=self.ids.device)
        with plainly(self.model):
            cache = read_prefix(self.model, self.ids)
            again = log_probs(self, none, cache, start)[0]
        allowed = rounding(next(self.model.parameters()))
        return cache if difference(again, self.log_probs) <= allowed else None

    def knock_out(
        self,
        tokens: TokenSets,
        *,
        rows: str = "future",
        batch_size: int | None = None,
        tick: Tick = _ignore,
    ) -> KnockOut:
        """`knock_out` for sets of this text's tokens; `tick` gets the number of cuts just made."""
        if rows not in ROWS:
            raise ValueError(f"rows must be one of {', '.join(ROWS)}, got {rows!r}")
        _check_tensors(tokens=tokens)
        size = self.ids.shape[1]
        if tokens.ndim != 2 or tokens.shape[1] != size or tokens.dtype != torch.bool:
            raise ValueError(
                f"tokens must be boolean sets [cut, {size}], got {tokens.dtype} of shape "
                f"{tuple(tokens.shape)}; set_drops takes numbers of tokens"
            )
        hidden = tokens.to(self.ids.device)
        first = hidden.int().argmax(-1).where(hidden.any(-1), size - 1) + 1
        if rows == "answer":
            first = first.clamp_min(int(self.deciding[0]))

        def removed(cuts: Int[Tensor, " cut"]) -> Edges:
            return hidden_edges(hidden[cuts], self.answer, rows=rows)

        order = torch.from_numpy(np.lexsort((~tokens.cpu().numpy()).T[::-1])).to(first.device)
        return _measure(self, removed, first, order, batch_size, tick)

    def cut_edges(
        self, edges: Edges, *, batch_size: int | None = None, tick: Tick = _ignore
    ) -> KnockOut:
        """`cut_edges` for edges between this text's tokens, with `tick` as for `knock_out`."""
        _check_tensors(edges=edges)
        size = self.ids.shape[1]
        if edges.ndim != 3 or edges.shape[1:] != (size, size) or edges.dtype != torch.bool:
            raise ValueError(
                f"edges must be boolean [cut, query, key] with {size} tokens, got {edges.dtype} of "
                f"shape {tuple(edges.shape)}"
            )
        edges = edges.to(self.ids.device)
        cut = edges.any(-1)
        first = cut.int().argmax(-1).where(cut.any(-1), size - 1)
        order = first.argsort(stable=True)
        return _measure(self, lambda cuts: edges[cuts], first, order, batch_size, tick)


def _check_tensors(**given: object) -> None:
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name} must be a torch tensor, got {type(tensor).__name__}; convert it first, "
                "for example with torch.tensor"
            )
        check_readable(name, tensor)


def _measure(
    text: Baseline,
    removed: Callable[[Int[Tensor, " cut"]], Edges],
    first: Int[Tensor, " cut"],
    order: Int[Tensor, " cut"],
    batch_size: int | None,
    tick: Tick,
) -> KnockOut:
    """Run the text with each cut, from the first row on that a cut changes.

    In the `order` of the cuts, those that are alike for longest are neighbours, and their first
    rows ascend.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
    plain, cache = text.log_probs, text.cache
    first = first.clamp_max(int(text.deciding[0]))
    if cache is None:
        first = torch.zeros_like(first)
    drop, flipped, divergence = torch.zeros(3, len(first), device=plain.device)
    with plainly(text.model):
        for cuts, found in _passes(text, removed, first[order], order, batch_size):
            drop[cuts], flipped[cuts], divergence[cuts] = _compare(found, plain, text.wanted)
            tick(len(cuts))
    return KnockOut(
        log_prob=text.log_prob,
        predicted=text.predicted,
        drop=drop.cpu(),
        flipped=flipped.bool().cpu(),
        divergence=divergence.cpu(),
    )


def _compare(
    found: Float[Tensor, "cut answer word"],
    plain: Float[Tensor, "answer word"],
    wanted: Int[Tensor, " answer"],
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = wanted[None, :, None].expand(len(found), -1, 1)
    fell = plain.gather(-1, wanted[:, None])[:, 0] - found.gather(-1, chosen)[..., 0]
    flipped = (found.argmax(-1) != plain.argmax(-1)).any(-1).float()
    # A token that the model never chooses has a log-probability of minus infinity in every cut.
    divergence = (plain.exp() * (plain - found)).nan_to_num(0.0).sum(-1).mean(-1)
    return fell.mean(-1), flipped, divergence


def _passes(
    text: Baseline,
    removed: Callable[[Int[Tensor, " cut"]], Edges],
    first: Int[Tensor, " cut"],
    order: Int[Tensor, " cut"],
    batch_size: int | None,
) -> Iterator[tuple[Int[Tensor, " cut"], Float[Tensor, "cut answer word"]]]:
    """Numbers of cuts that run together, and their log-probabilities, in packs where possible."""
    deciding, size = text.deciding.tolist(), text.ids.shape[1]
    packing, checked, at = text.cache is not None and can_pack(text), False, 0
    while at < len(order):
        start = int(first[at])
        if packing and start and text.cache is not None:
            count = min(batch_size or PACKED_ROWS, max(MOST_EDGES // size**2, 1))
            edges = removed(order[at : at + count]).cpu().numpy()
            pack, count = pack_cuts(edges, start, deciding, plain=not checked)
            found = packed_log_probs(text, pack, text.cache, text.log_probs)
            if found is None:
                packing = False
                continue
            checked = True
        else:
            count = batch_size or affordable_cuts(text, start)
            found = log_probs(text, removed(order[at : at + count]), text.cache, start)
        yield order[at : at + count], found
        at += count
