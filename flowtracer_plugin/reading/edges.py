"""The edges that flow runs on: the mean of all heads, or of some, weighed by lengths of values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from flowtracer_plugin.attention.adapter import AttentionCall, AttentionWeights
from flowtracer_plugin.attention.head_choice import attention_to, most_attentive, named_heads
from flowtracer_plugin.attention.head_mean import query_tensor
from flowtracer_plugin.flow.substitution import Rows
from flowtracer_plugin.model.padding import in_front
from flowtracer_plugin.options import FlowOptions, Heads
from flowtracer_plugin.reading.rows import AttentionRows

BEFORE_ANSWER = 5
"""The number of tokens before the answer that do not count as reasoning: they are often a template
such as "The answer is". Only local heads look at these, and with local heads, flow finds no more
than chance would."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class EdgeChoice:
    """Which edges are wanted for a batch of texts.

    Attributes:
        heads: As in `FlowOptions`.
        edges: As in `FlowOptions`.
        target: The rows of the answer, or the rows that decide it.
        reasoning: The tokens of the response before the answer, as `reasoning_mask` finds them.
        decided: The sampled tokens on which the influence of heads and rows counts.
    """

    heads: Heads
    edges: str
    target: Bool[Tensor, "batch token"]
    reasoning: Bool[Tensor, "batch token"]
    decided: Bool[Tensor, "batch token"]

    def behind(
        self, mask: Bool[Tensor, "batch token"], ordered: Bool[Tensor, "batch most"]
    ) -> EdgeChoice:
        """The same choice for texts with all padding behind them, whose mask is `ordered`."""
        return replace(
            self,
            target=in_front(self.target, mask, ordered),
            reasoning=in_front(self.reasoning, mask, ordered),
            decided=in_front(self.decided, mask, ordered),
        )


def edge_choice(
    options: FlowOptions,
    target: Bool[Tensor, "batch token"],
    response: Bool[Tensor, "batch token"],
    answer: Bool[Tensor, "batch token"],
) -> EdgeChoice | None:
    """The edges that `options` ask for; None for the plain mean."""
    if options.plain:
        return None
    if options.rows == "decision":  # heads are chosen in rows as the model makes them
        target = target.roll(-1, -1)
    return EdgeChoice(
        heads=options.heads,
        edges=options.edges,
        target=target,
        reasoning=reasoning_mask(response, answer),
        decided=up_to_answer(response, answer),
    )


def reasoning_mask(
    response: Bool[Tensor, "batch token"], answer: Bool[Tensor, "batch token"]
) -> Bool[Tensor, "batch token"]:
    """Response tokens more than five before the answer; none in texts without an answer."""
    place = torch.arange(answer.shape[1], device=answer.device)
    first = answer.int().argmax(-1, keepdim=True)
    return response & (place < first - BEFORE_ANSWER) & answer.any(-1, keepdim=True)


def up_to_answer(
    response: Bool[Tensor, "batch token"], answer: Bool[Tensor, "batch token"]
) -> Bool[Tensor, "batch token"]:
    """Response tokens up to the end of the answer, with which no later one has to do.

    In texts without an answer, all response tokens.
    """
    left = answer.int().flip(-1).cumsum(-1).flip(-1)  # answer tokens from each place on
    return response & ((left > 0) | ~answer.any(-1, keepdim=True))


def completions(
    visible: Bool[Tensor, "batch token"], prompt_length: int
) -> Bool[Tensor, "batch token"]:
    """The visible tokens after the prompts."""
    return visible & (torch.arange(visible.shape[1], device=visible.device) >= prompt_length)


def deciding_rows(
    attention: Float[Tensor, "batch query key"],
    visible: Bool[Tensor, "batch query"],
    response: Bool[Tensor, "batch query"],
) -> Float[Tensor, "batch query key"]:
    """The attention by which each response token was decided: that of the token before it.

    The row of a token is computed from that token, and its logits choose the next one. Rows of
    prompt tokens are 0, since the prompt was given.
    """
    place = torch.arange(visible.shape[1], device=attention.device)
    last = place.where(visible, 0).cummax(-1).values  # the last visible token up to each place
    before = last.roll(1, -1)[:, :, None].expand_as(attention)
    # Filled in place, so that no third map of all pairs is made.
    return attention.gather(1, before).masked_fill_(~response[:, :, None], 0.0)


def deciding_blocks(rows: Rows, response: Bool[Tensor, "batch token"], prompt: int) -> Rows:
    """`deciding_rows`, by blocks of rows of texts with all padding behind them.

    No response begins before the token `prompt`, so blocks that end there are not computed.
    """

    def shifted(start: int, stop: int) -> Float[Tensor, "batch row key"]:
        found = torch.zeros(len(response), stop - start, stop, device=response.device)
        if stop > max(prompt, 1):
            first = max(start - 1, 0)
            block = rows(first, stop - 1)
            found[:, start == 0 :, : block.shape[2]] = block
        return found.mul_(response[:, start:stop, None])

    return shifted


def chosen_rows(
    model: nn.Module,
    calls: Sequence[AttentionCall | AttentionWeights],
    layers: Sequence[int],
    lengths: Sequence[Float[Tensor, "batch _ _"]],
    visible: Bool[Tensor, "batch token"],
    choice: EdgeChoice,
    *,
    block: int,
    sizes: Sequence[Float[Tensor, "batch _ _"]] = (),
) -> AttentionRows:
    """The rows of the chosen edges.

    Args:
        model: The model that made the calls.
        calls: The calls of the layers.
        layers: The layer of each call.
        lengths: The lengths of each call's values; empty if attention is not weighed by them.
        visible: True for tokens, False for padding.
        choice: The edges to compute.
        block: Query rows that are computed at a time.
        sizes: The influence of each call's heads and rows; empty if that is not asked for.

    Raises:
        ValueError: The choice names layers or heads that the model does not have.
    """
    heads = None
    if isinstance(choice.heads, tuple):
        counts = [query_tensor(call).shape[1] for call in calls]
        heads = named_heads(choice.heads, layers, counts, len(visible))
    elif not isinstance(choice.heads, str):
        asked = choice.target.any(0).tolist()  # copied to the host once for all layers
        paid = [attention_to(call, choice.target, choice.reasoning, asked) for call in calls]
        heads = most_attentive(paid, choice.heads)
    return AttentionRows(
        model, calls, visible, block=block, heads=heads, lengths=lengths, sizes=sizes
    )
