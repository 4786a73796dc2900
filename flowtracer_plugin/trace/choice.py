"""Which tokens an answer hangs on, one after another: those already chosen are hidden.

A gradient says what the answer loses if one token is hidden, but not what it loses if several are:
an answer that stands twice in a text does not hang on either copy. So a few tokens are chosen,
then hidden from all later ones, and the gradient of the text with holes chooses the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowtracer_plugin.model.layers import select_layers
from flowtracer_plugin.options import FlowOptions
from flowtracer_plugin.reading.edges import completions, reasoning_mask
from flowtracer_plugin.reading.reader import AttentionReader
from flowtracer_plugin.reading.removal import (
    AskedTexts,
    asked_texts,
    edge_losses,
    helpful_edges,
)
from flowtracer_plugin.text.spans import target_mask
from flowtracer_plugin.trace.rollouts import (
    RolloutMasks,
    RowErrors,
    asked_edges,
    solve_rollouts,
)

STEPS = 8
"""Steps of the choice, unless somebody says otherwise."""

SHARE = 0.2
"""Share of a response's tokens before its answer that is chosen in these steps. A scorer does not
know how many tokens will be asked for. Where more have been hidden, there is little left of the
text whose gradient could say anything, so the last step's gradient ranks all other tokens."""

Row = Float[Tensor, "batch token"]
Hidden = Bool[Tensor, "batch token"]


def order_of_choice(
    losses: Callable[[Hidden], Row], candidates: Hidden, spared: Hidden, steps: int
) -> Row:
    """How early each candidate is chosen: from 1 for the first, evenly down to above 0, float32.

    In each step, `losses` says what is lost without each token of texts in which the tokens chosen
    so far are hidden, and those with the largest losses are chosen and hidden. After step `s` of
    `S`, `⌈⌈0.2 n⌉ s / S⌉` of a text's `n` candidates are. Spared tokens are never hidden, but take
    their place among those chosen, once they cost no less than one of these. All others come after
    them, by the losses of the last step. Tokens without a loss in their step are 0, and never
    chosen. Texts with losses that are not finite are NaN.
    """
    count = candidates.sum(-1)
    most = [math.ceil(round(SHARE * number, 9)) for number in count.tolist()]
    place = torch.zeros(candidates.shape, device=candidates.device)
    hidden, placed = torch.zeros(2, *candidates.shape, dtype=torch.bool, device=candidates.device)
    broken = torch.zeros_like(candidates[:, :1])
    for step in range(1, min(steps, max(most)) + 1):
        after = [-(-one * step // max(1, min(steps, one))) for one in most]
        enough = [min(one, number) for one, number in zip(after, most, strict=True)]
        wanted = (torch.tensor(enough, device=count.device) - hidden.sum(-1))[:, None]
        # A text whose tokens have all been chosen is done, whatever else is in its batch.
        if not bool((active := wanted > 0).any()):
            continue
        lost = losses(hidden).masked_fill(~candidates | placed, 0.0)
        broken |= active & ~lost.isfinite().all(-1, keepdim=True)
        front = lost.masked_fill(spared, 0.0)
        chosen = (_rank(front) < wanted) & (front > 0)
        least = front.where(chosen, torch.inf).amin(-1, keepdim=True)
        here = chosen | (active & spared & (lost >= least))
        rank = placed.sum(-1, keepdim=True) + _rank(lost.where(here, 0.0))
        place = torch.where(here, rank.float(), place)
        hidden, placed = hidden | chosen, placed | here
        lost = lost.masked_fill(placed, 0.0)
        later = (placed.sum(-1, keepdim=True) + _rank(lost)).float()
        later = later.masked_fill(lost <= 0, torch.inf)
        place = torch.where(active & ~placed, later, place)
    left = (1 - place / count.clamp_min(1)[:, None]).clamp_min(0.0)
    return left.masked_fill(broken, torch.nan).masked_fill(~candidates, 0.0)


def first_chosen(order: Sequence[float], candidates: int) -> tuple[int, ...]:
    """The tokens that `order_of_choice` ranks first among so many candidates, a fifth of these.

    Examples:
        >>> first_chosen([0.0, 0.4, 1.0, 0.2, 0.8, 0.6], 6)
        (2, 4)
    """
    ranked = sorted(
        (token for token, rank in enumerate(order) if rank > 0), key=lambda t: -order[t]
    )
    return tuple(ranked[: math.ceil(round(SHARE * candidates, 9))])


def _rank(losses: Row) -> Int[Tensor, "batch token"]:
    """0 for the largest loss; the earlier token among equals."""
    return losses.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def removal_order(
    reader: AttentionReader,
    ids: Int[Tensor, "batch token"],
    visible: Bool[Tensor, "batch token"],
    answer: Bool[Tensor, "batch token"],
    start: int,
    *,
    steps: int = STEPS,
    batch_size: int | None = None,
) -> Row:
    """`order_of_choice` by what the answer loses, to first order, when a token is hidden.

    A token's loss is the sum of `edge_losses` over the rows of all later tokens. Candidates are
    those of `before_answer`.

    Args:
        reader: Reads the model.
        ids: Prompts and responses.
        visible: False on padding.
        answer: The answers' tokens.
        start: Columns before the responses.
        steps: Steps, each a forward and a backward pass.
        batch_size: Texts in one pass. By default one on a CPU, where each then continues from the
            cache of its prompt, and all on an accelerator.

    Raises:
        KnockOutError: The model's attention cannot be cut.
        UnsupportedArchitectureError: The model cannot make a backward pass of its own.
    """
    layers = [site.layer for site in reader.sites]
    found = torch.zeros(ids.shape, device=ids.device)
    candidates, spared = before_answer(visible, answer, start)
    for rows in _batches(candidates, batch_size):
        texts = asked_texts(reader, ids[rows], visible[rows], answer[rows], start)

        def losses(hidden: Hidden, texts: AskedTexts = texts) -> Row:
            return edge_losses(reader, texts, layers, hidden).tril(-1).sum(1)

        found[rows] = order_of_choice(losses, candidates[rows], spared[rows], steps)
    return found


def flow_order(
    reader: AttentionReader,
    ids: Int[Tensor, "batch token"],
    visible: Bool[Tensor, "batch token"],
    masks: RolloutMasks,
    start: int,
    options: FlowOptions,
    *,
    steps: int = STEPS,
    batch_size: int | None = None,
) -> tuple[Row, RowErrors]:
    """`order_of_choice` by the throughput along the edges that help the answer, and errors of rows.

    In each step the flow runs along `helpful_edges` of the text with holes, as `options` ask for
    them, from the question to `options.target`. The target's own tokens are 0: all flow ends there.
    Arguments and errors are as for `removal_order`.
    """
    layers = select_layers(options.layers, [site.layer for site in reader.sites])
    found = torch.zeros(ids.shape, device=ids.device)
    response = completions(visible, start)
    errors: dict[int, Exception] = {}
    candidates, spared = before_answer(visible, masks.answer, start)
    target = torch.from_numpy(target_mask(masks.answer.cpu().numpy(), options.target))
    masks = replace(masks, target=target.to(ids.device), errors={})
    for rows in _batches(candidates, batch_size):
        texts = asked_texts(reader, ids[rows], visible[rows], masks.answer[rows], start)
        part = masks.rows(rows)

        def losses(
            hidden: Hidden,
            texts: AskedTexts = texts,
            part: RolloutMasks = part,
            rows: slice = rows,
        ) -> Row:
            edges = helpful_edges(edge_losses(reader, texts, layers, hidden))
            edges = asked_edges(edges, visible[rows], response[rows], options)
            flow = solve_rollouts(edges, part, start, options)
            errors.update({rows.start + row: error for row, error in flow.errors.items()})
            return flow.throughput.masked_fill(part.target, 0.0)

        found[rows] = order_of_choice(losses, candidates[rows], spared[rows], steps)
    for row in errors:
        found[row] = 0.0
    return found, errors


def before_answer(
    visible: Bool[Tensor, "batch token"], answer: Bool[Tensor, "batch token"], start: int
) -> tuple[Hidden, Hidden]:
    """The tokens from the column `start` on before the answer, and the last five of them.

    There are none in texts without an answer. The last five are often a template such as "The
    answer is". Hiding it costs any answer much, and a text without it says nothing about the
    reasoning, so these are not hidden, unless there is nothing else.
    """
    response = completions(visible, start)
    candidates = response & (answer.int().cumsum(-1) == 0) & answer.any(-1)[:, None]
    reasoning = reasoning_mask(response, answer)
    return candidates, candidates & ~reasoning & reasoning.any(-1)[:, None]


def _batches(candidates: Hidden, size: int | None) -> Iterator[slice]:
    """A few rows at a time, without batches in which nothing is to be chosen."""
    size = size or (1 if candidates.device.type == "cpu" else len(candidates))
    parts = (slice(at, at + size) for at in range(0, len(candidates), size))
    return (rows for rows in parts if bool(candidates[rows].any()))
