"""What becomes of a model's answer where attention between tokens of the text is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from flowtracer_plugin.attention.rounding import difference, rounding
from flowtracer_plugin.model.causal_lm import (
    accepted_inputs,
    check_input,
    first_output,
    input_device,
    language_model,
    unwrapped,
    vocabulary_size,
)
from flowtracer_plugin.model.cutting import (
    Edges,
    check_model,
    cutting,
    plainly,
    prefix_copies,
    read_prefix,
)
from flowtracer_plugin.model.free_memory import free_memory

ROWS = ("answer", "future")
"""From which queries a token is hidden: those that predict the answer, or all later ones."""

MOST_TOKENS = 2**14
"""Tokens of one forward pass; more of them are no faster."""

SPARE = 0.5
"""Share of the free memory that a forward pass may take."""

TokenSets = Bool[Tensor, "cut token"]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class KnockOut:
    """What became of an answer under each cut, on the CPU.

    Attributes:
        log_prob: Of the answer's tokens without a cut, the mean of them, in nats.
        predicted: Whether the model, decoding greedily, says each answer token after the others.
        drop: How far the mean log-probability of the answer's tokens fell, in nats per token.
        flipped: Whether the greedy choice at any answer token is another.
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
    """What becomes of the answer if sets of tokens cannot be attended to, in all layers and heads.

    The softmax shares out what was paid to them among the others. A token always sees itself.

    Args:
        model: A causal language model, which is not changed.
        ids: Prompt and response.
        answer: Tokens of the response whose log-probability counts; not the first token.
        tokens: One set of tokens for each cut.
        rows: Whether they are hidden from all later tokens (`"future"`), which ends every way over
            them, or only from those that predict the answer (`"answer"`): then what later tokens
            took over from them still counts.
        batch_size: Cuts in one forward pass; as many as memory allows by default.

    Raises:
        KnockOutError: The model does not let its attention be cut, or tokens reach later ones on
            other ways, such as recurrent states.
        ValueError: Shapes differ, there is no answer, `rows` has no such choice, or `batch_size` is
            below 1.
    """
    if rows not in ROWS:
        raise ValueError(f"rows must be one of {', '.join(ROWS)}, got {rows!r}")
    if tokens.ndim != 2 or tokens.shape[1] != len(ids) or tokens.dtype != torch.bool:
        raise ValueError(
            f"tokens must be boolean sets [cut, {len(ids)}], got {tokens.dtype} of shape "
            f"{tuple(tokens.shape)}"
        )
    text = _text(model, ids, answer)
    last = len(ids) - 1
    hidden = tokens.to(text.ids.device)
    first = hidden.int().argmax(-1).where(hidden.any(-1), last) + 1
    if rows == "answer":
        first = first.clamp_min(int(text.deciding[0]))

    def removed(cuts: Int[Tensor, " cut"]) -> Edges:
        return hidden_edges(hidden[cuts], text.answer, rows=rows)

    return _measure(text, removed, first.clamp_max(last), batch_size)


def cut_edges(
    model: nn.Module,
    ids: Int[Tensor, " token"],
    answer: Bool[Tensor, " token"],
    edges: Edges,
    *,
    batch_size: int | None = None,
) -> KnockOut:
    """`knock_out` for edges: which query cannot see which key, in all layers and heads.

    Edges of a token to itself stay.

    Raises:
        KnockOutError: As for `knock_out`.
        ValueError: As for `knock_out`.
    """
    shape = (len(ids), len(ids))
    if edges.ndim != 3 or edges.shape[1:] != shape or edges.dtype != torch.bool:
        raise ValueError(
            f"edges must be boolean [cut, query, key] with {len(ids)} tokens, got {edges.dtype} of "
            f"shape {tuple(edges.shape)}"
        )
    text = _text(model, ids, answer)
    edges = edges.to(text.ids.device)
    cut = edges.any(-1)
    first = cut.int().argmax(-1).where(cut.any(-1), len(ids) - 1)
    return _measure(text, lambda cuts: edges[cuts], first, batch_size)


def hidden_edges(tokens: TokenSets, answer: Bool[Tensor, " token"], *, rows: str) -> Edges:
    """The edges that `knock_out` cuts, those of tokens to themselves left out."""
    place = torch.arange(tokens.shape[1], device=tokens.device)
    queries = place[:, None] > place
    if rows == "answer":
        queries = queries & deciding_rows(answer)[:, None]
    return tokens[:, None, :] & queries


def deciding_rows(answer: Bool[Tensor, " token"]) -> Bool[Tensor, " token"]:
    """The tokens before the answer's, whose logits choose them."""
    return answer.roll(-1)


class _Text(NamedTuple):
    """A text whose answer is measured.

    Attributes:
        model: Without wrappers.
        ids: On the model's device.
        answer: The answer's tokens.
        deciding: Numbers of the rows whose logits choose them.
        reuses: Whether the model continues a short cached text as it reads it whole.
    """

    model: nn.Module
    ids: Int[Tensor, "1 token"]
    answer: Bool[Tensor, " token"]
    deciding: Int[Tensor, " answer"]
    reuses: bool


def _text(model: nn.Module, ids: Int[Tensor, " token"], answer: Bool[Tensor, " token"]) -> _Text:
    model = unwrapped(model)
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
    return _Text(model, ids[None].to(device), answer.to(device), deciding, check_model(model))


def _measure(
    text: _Text,
    removed: Callable[[Int[Tensor, " cut"]], Edges],
    first: Int[Tensor, " cut"],
    batch_size: int | None,
) -> KnockOut:
    """Run the text with each cut, from the first row on that a cut changes."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
    wanted = text.ids[0, text.answer]
    first = first.clamp_max(int(text.deciding[0]))
    with plainly(text.model):
        plain = _log_probs(text, None, None, 0)[0]
        cache = _cache(text, plain)
        if cache is None:
            first = torch.zeros_like(first)
        drop, flipped, divergence = torch.zeros(3, len(first), device=plain.device)
        for cuts, start in _batches(text, first, batch_size):
            found = _log_probs(text, removed(cuts), cache, start)
            drop[cuts], flipped[cuts], divergence[cuts] = _compare(found, plain, wanted)
    return KnockOut(
        log_prob=float(plain.gather(-1, wanted[:, None]).mean()),
        predicted=bool((plain.argmax(-1) == wanted).all()),
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
    # A word that cannot be said has a log-probability of minus infinity under every cut.
    divergence = (plain.exp() * (plain - found)).nan_to_num(0.0).sum(-1).mean(-1)
    return fell.mean(-1), flipped, divergence


def _batches(
    text: _Text, first: Int[Tensor, " cut"], batch_size: int | None
) -> Iterator[tuple[Int[Tensor, " cut"], int]]:
    """Numbers of cuts that run together, and the row at which the earliest of them begins."""
    order = first.argsort(stable=True)
    at = 0
    while at < len(order):
        start = int(first[order[at]])
        size = batch_size or _affordable(text, start)
        yield order[at : at + size], start
        at += size


def _affordable(text: _Text, start: int) -> int:
    """Cuts that fit in one forward pass over the rows from `start` on."""
    config = language_model(text.model).config.get_text_config()
    tokens = text.ids.shape[1]
    rows, width = tokens - start, getattr(config, "hidden_size", None) or 1024
    heads = getattr(config, "num_attention_heads", None) or 32
    layers = getattr(config, "num_hidden_layers", None) or 32
    # Scores in float32 with the mask beside them, some twenty activations, keys and values of all
    # layers, and three copies of the logits.
    scores = rows * tokens * (8 * heads + 8)
    active = 4 * width * (20 * rows + 2 * layers * tokens)
    logits = 12 * vocabulary_size(text.model) * _logit_rows(text, rows)
    room = SPARE * free_memory(text.ids.device) / (scores + active + logits)
    return max(1, min(int(room), MOST_TOKENS // rows))


def _logit_rows(text: _Text, rows: int) -> int:
    return len(text.deciding) if "logits_to_keep" in accepted_inputs(text.model) else rows


def _log_probs(
    text: _Text, removed: Edges | None, cache: DynamicCache | None, start: int
) -> Float[Tensor, "cut answer word"]:
    """Next-token log-probabilities where the answer is predicted, by the rows from `start` on."""
    copies = 1 if removed is None else len(removed)
    inputs: dict[str, Any] = {"input_ids": text.ids[:, start:].expand(copies, -1)}
    accepted, rows = accepted_inputs(text.model), text.deciding - start
    if cache is not None and start:
        inputs |= {"past_key_values": prefix_copies(cache, start, copies), "use_cache": True}
    elif "use_cache" in accepted:
        inputs["use_cache"] = False
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = rows
    with ExitStack() as stack:
        if removed is not None:
            stack.enter_context(cutting(removed))
        logits = first_output(text.model(**inputs))
    kept = logits if "logits_to_keep" in accepted else logits[:, rows]
    return kept.float().log_softmax(-1)


def _cache(text: _Text, plain: Float[Tensor, "answer word"]) -> DynamicCache | None:
    """Keys and values of the text, if a text of this length goes on from them as it should.

    Positions, for example, may be scaled by the length of what is read at once.
    """
    start = int(text.deciding[0])
    if not text.reuses or not start:
        return None
    cache = read_prefix(text.model, text.ids)
    none = torch.zeros(1, *[text.ids.shape[1]] * 2, dtype=torch.bool, device=text.ids.device)
    again = _log_probs(text, none, cache, start)[0]
    allowed = rounding(next(text.model.parameters()))
    return cache if difference(again, plain) <= allowed else None
