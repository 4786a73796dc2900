"""What an answer loses, to first order, with every edge of attention: one backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from flowtracer_plugin.attention.adapter import AttentionCall, AttentionWeights
from flowtracer_plugin.attention.head_mean import query_tensor
from flowtracer_plugin.attention.removal import FeltCall, removal_losses
from flowtracer_plugin.attention.rounding import difference, rounding
from flowtracer_plugin.model.causal_lm import (
    input_device,
    later_logits,
    text_inputs,
)
from flowtracer_plugin.model.cutting import (
    check_model,
    cutting,
    hidden_from_later,
    plainly,
    prefix_copies,
    read_prefix,
)
from flowtracer_plugin.model.padding import in_front, put_back, text_first
from flowtracer_plugin.reading.influence import (
    check_backward,
    gradients_of,
    log_odds,
    own_graph,
    without_gradients,
)
from flowtracer_plugin.reading.one_pass import Reading
from flowtracer_plugin.reading.reader import AttentionReader

EDGES = "causal"
"""The name of these edges among the options of a trace."""

LEAST_DOUBT = 1e-30
"""Where the model is more certain than this, losses do not fit float32 and are said to be 0."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class AskedTexts:
    """Texts whose answers are asked for what they hang on, as the model reads them.

    Attributes:
        ids: The texts, with all padding behind them.
        ordered: False on that padding.
        answer: The tokens whose log-probability counts.
        visible: False on padding where the texts came from.
        start: Columns before the responses there. The rows of prompts were given, and are 0.
        cache: The keys and values of a prompt that need not be read again.
    """

    ids: Int[Tensor, "batch most"]
    ordered: Bool[Tensor, "batch most"]
    answer: Bool[Tensor, "batch most"]
    visible: Bool[Tensor, "batch token"]
    start: int
    cache: DynamicCache | None = None

    @property
    def first(self) -> int:
        """The first row that the model computes in each pass."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())

    def moved(self, values: Bool[Tensor, "batch token"]) -> Bool[Tensor, "batch most"]:
        """Values of the tokens, in the order in which the model reads them."""
        return in_front(values, self.visible, self.ordered)


def asked_texts(
    reader: AttentionReader,
    ids: Int[Tensor, "batch token"],
    visible: Bool[Tensor, "batch token"],
    answer: Bool[Tensor, "batch token"],
    start: int,
) -> AskedTexts:
    """The texts, ready for `edge_losses`; one text alone continues from the cache of its prompt.

    The cache is left out where that changes the answer's logits: some models scale positions by
    the number of tokens that they read at once.

    Raises:
        UnsupportedArchitectureError: The model cannot make a backward pass of its own.
    """
    model = reader.model
    check_backward(model, EDGES)
    device = input_device(model)
    ids, visible, answer = ids.to(device), visible.to(device), answer.to(device)
    ordered_ids, ordered = text_first(ids, visible)
    texts = AskedTexts(
        ids=ordered_ids, ordered=ordered, answer=torch.zeros_like(ordered), visible=visible,
        start=start,
    )  # fmt: skip
    texts = replace(texts, answer=texts.moved(answer))
    prompt = int(visible[0, :start].sum())
    if len(ids) > 1 or not prompt or not bool(answer.any()) or not check_model(model):
        return texts
    deciding = texts.answer[0, 1:].nonzero()[:, 0]
    with plainly(model):
        whole = read_prefix(model, ordered_ids)
        plain = _answer_logits(model, texts, deciding)
        cached = replace(texts, cache=prefix_copies(whole, prompt, 1))
        with cutting(hidden_from_later(torch.zeros_like(ordered))):
            again = _answer_logits(model, cached, deciding)
    return cached if difference(again, plain) <= rounding(plain) else texts


def edge_losses(
    reader: AttentionReader,
    texts: AskedTexts,
    layers: Sequence[int],
    hidden: Bool[Tensor, "batch token"] | None = None,
) -> Float[Tensor, "batch query key"]:
    """By how many nats `log p(answer)` falls, to first order, without each edge of attention.

    An edge is what one row reads from one token in all heads of `layers`; without it, the softmax
    of each head spreads its attention over the row's other tokens. Edges that help the answer are
    positive. `log p` is the sum over the answer's tokens. Float32, with 0 in the rows of prompts,
    which were given, and in rows and columns of padding. It takes a forward pass without dropout
    and a backward pass that changes no gradient of a parameter. The sum over layers is the only map
    of all pairs of tokens.

    Args:
        reader: Reads the model.
        texts: The texts.
        layers: The layers whose edges are summed.
        hidden: Tokens of the responses that no later token sees, in any layer.

    Raises:
        KnockOutError: Tokens are to be hidden, and the model's attention cannot be cut.
        UnsupportedArchitectureError: Attention's output has no gradient, or no linear layer takes
            it unchanged.
    """
    if not bool(texts.answer.any()):  # nothing is lost without an answer
        return torch.zeros(*texts.visible.shape, texts.visible.shape[1], device=texts.ids.device)
    unseen = None
    if hidden is not None and bool(hidden.any()):
        check_model(reader.model)
        unseen = texts.moved(hidden)
    shown, tokens = texts.ordered, texts.ordered.shape[1]
    total = torch.zeros(*shown.shape, tokens, device=shown.device)
    felt_calls, scale = _felt(reader, texts, layers, unseen)
    for felt in felt_calls:
        for start in range(texts.first, tokens, reader.block):
            stop = min(start + reader.block, tokens)
            found = removal_losses(felt, slice(start - texts.first, stop - texts.first), stop)
            total[:, start:stop, :stop] += found.to(total.device)
    total *= scale.to(total.device)[:, None, None]
    total.masked_fill_(~shown[:, :, None], 0).masked_fill_(~shown[:, None, :], 0)
    total = total if torch.equal(shown, texts.visible) else put_back(total, texts.visible)
    total[:, : texts.start] = 0
    return total


def helpful_edges(
    losses: Float[Tensor, "batch query key"],
) -> Float[Tensor, "batch query key"]:
    """The share of each edge in what the answer loses without all helpful edges of its row.

    Edges without which the answer loses nothing are 0, and so are those of a token to itself. Rows
    sum to 1, or to 0 where no edge helps. Raw losses would not do as edges: they say what the
    answer loses, not the later token, and become ever smaller where the model is certain.
    """
    helpful = losses.clamp_min(0.0).tril_(-1)
    sums = helpful.sum(-1, keepdim=True)
    return helpful.div_(torch.where(sums > 0, sums, 1.0))


def _felt(
    reader: AttentionReader,
    texts: AskedTexts,
    layers: Sequence[int],
    hidden: Bool[Tensor, "batch token"] | None,
) -> tuple[list[FeltCall], Float[Tensor, " batch"]]:
    """The attention calls of these layers with the gradients there, and what scales each text's."""
    model, sites = reader.model, [site for site in reader.sites if site.layer in set(layers)]
    projections = [reader.projections[site] for site in sites]
    readings: list[Reading] = []
    row, place = texts.answer[:, 1:].nonzero(as_tuple=True)
    deciding, column = torch.unique(place, return_inverse=True)
    if hidden is None and texts.cache is not None:
        hidden = torch.zeros_like(texts.ordered)  # so that the calls hold their masks
    with ExitStack() as stack:
        stack.enter_context(own_graph(model))
        if hidden is not None:
            stack.enter_context(cutting(hidden_from_later(hidden)))
        outputs = stack.enter_context(_inputs_of(projections))
        logits = reader.listen(
            lambda: _answer_logits(model, texts, deciding),
            texts.ordered,
            layers,
            lambda _rows, reading: readings.append(reading),
            keep=True,
            average=False,
        )
        odds = log_odds(logits[row, column], texts.ids[row, place + 1].to(logits.device))
        # The gradient of log p is that of the log-odds times 1 − p, which float32 would round to 0
        # where the model is certain. Scaled to 1, it cannot vanish on its way through the model.
        doubt = torch.zeros_like(texts.ids, dtype=torch.float64, device=odds.device)
        doubt[row, place] = odds.detach().double().neg().sigmoid()
        scale = doubt.amax(-1).clamp_min(LEAST_DOUBT)
        total = (odds * (doubt[row, place] / scale[row]).float()).sum()
        # A module that runs several times in a pass has an output for each visit.
        reached = [
            outputs[projection][site.visit]
            for projection, site in zip(projections, sites, strict=True)
        ]
        if not all(one.requires_grad for one in reached):
            raise without_gradients(model, EDGES)
        gradients = gradients_of(model, total, reached, EDGES)
    felt = [
        FeltCall(call=call, output=_by_head(one, call), gradient=_by_head(gradient, call))
        for call, one, gradient in zip(readings[0].calls, reached, gradients, strict=True)
    ]
    return felt, scale.float()


def _answer_logits(
    model: nn.Module, texts: AskedTexts, deciding: Int[Tensor, " row"]
) -> Float[Tensor, "batch row word"]:
    """The logits of these rows, float32; no other rows go through the model's large head."""
    inputs = text_inputs(model, texts.ids, texts.ordered)
    if texts.cache is not None:
        cache = prefix_copies(texts.cache, texts.first, 1)  # the model adds to it
        inputs = {"input_ids": texts.ids[:, texts.first :], "use_cache": True}
        inputs["past_key_values"] = cache
    first = int(deciding[0])
    logits = later_logits(model, inputs, first, texts.ids.shape[1])
    return logits[:, (deciding - first).to(logits.device)].float()


@contextmanager
def _inputs_of(
    projections: Sequence[nn.Module | None],
) -> Iterator[dict[nn.Module | None, list[Tensor]]]:
    """The inputs of each projection, in the order of its runs, once the model has run."""
    kept: dict[nn.Module | None, list[Tensor]] = {}

    def keep(projection: nn.Module, args: Any) -> None:
        kept.setdefault(projection, []).append(args[0])

    with ExitStack() as stack:
        for projection in set(projections):
            if projection is not None:
                stack.callback(projection.register_forward_pre_hook(keep).remove)
        yield kept


def _by_head(
    output: Tensor, call: AttentionCall | AttentionWeights
) -> Float[Tensor, "batch query head value_width"]:
    batch, heads = query_tensor(call).shape[:2]
    return output.detach().reshape(batch, -1, heads, output.shape[-1] // heads)
