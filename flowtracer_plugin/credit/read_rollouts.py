"""One batch of rollouts with everything that scorers need, each part read at most once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flowtracer_plugin.attention.adapter import AttentionCall, AttentionWeights
from flowtracer_plugin.attention.value_lengths import value_lengths
from flowtracer_plugin.credit.counterfactual import swap_losses
from flowtracer_plugin.credit.measures import Rollouts
from flowtracer_plugin.credit.outcome_gate import outcome_sensitivity
from flowtracer_plugin.credit.saliency import answer_saliency, check_whole
from flowtracer_plugin.credit.scorers import LATE, Scorer
from flowtracer_plugin.model.layers import select_layers
from flowtracer_plugin.options import FlowOptions, preset_over
from flowtracer_plugin.reading.edges import completions, edge_choice, up_to_answer
from flowtracer_plugin.reading.one_pass import Reading
from flowtracer_plugin.reading.removal import (
    EDGES as CAUSAL,
    asked_texts,
    edge_losses,
    helpful_edges,
)
from flowtracer_plugin.text.matched_spans import SpanFinder, matched_mask
from flowtracer_plugin.text.spans import decode_tokens, target_mask
from flowtracer_plugin.trace.choice import Row, flow_order, removal_order
from flowtracer_plugin.trace.rollouts import (
    RolloutMasks,
    RowErrors,
    asked_edges,
    solve_rollouts,
)
from flowtracer_plugin.trace.tracer import FlowTracer

OWN_PASSES = ("saliency", "swaps", "sensitivity")
"""The parts of `Rollouts` that take passes of their own."""


class Graph(NamedTuple):
    """The graph of rollouts by some options, and the flow along it once it has been solved.

    Attributes:
        attention: The edges; rows are queries.
        target: Where flow ends.
        throughput: Flow through every token.
        reach: Influence of every token on the target.
        jump: Share of each row's flow that goes from the prompt straight to the target; NaN in
            rows without flow.
        errors: The error of each row whose flow cannot be solved, by its number.
    """

    attention: Float[Tensor, "batch query key"]
    target: Bool[Tensor, "batch token"]
    throughput: Float[Tensor, "batch token"] | None = None
    reach: Float[Tensor, "batch token"] | None = None
    jump: Float[Tensor, " batch"] | None = None
    errors: RowErrors = MappingProxyType({})


class Late(NamedTuple):
    """What is known about completion tokens only at the end of a forward pass."""

    entropies: Float[Tensor, "batch completion"] | None = None
    surprisals: Float[Tensor, "batch completion"] | None = None


@dataclass(frozen=True, eq=False)
class ReadRollouts:
    """Rollouts of one batch, from which each scorer gets what it needs.

    Attributes:
        tracer: Reads the model, in evaluation mode, unless `reading` is given.
        ids: Prompts and completions.
        visible: False on padding.
        prompt_length: Columns before the completions.
        masks: Where flow enters and leaves.
        late: Returns entropies and surprisals; called when a scorer needs them.
        oracle: Finds the tokens for the scorer `oracle`.
        seed: Seed of the scorers that draw.
        batch_size: Rows in one pass for the saliency; all by default.
        reading: A forward pass over the tracer's layers that the caller has already made. If it
            holds a map of attention, that is of the tracer's own options.
        sizes: The influence of the heads and rows of the tracer's layers, if it is known.
        graphs: Graphs that are known, by preset; None stands for the tracer's own options.
        orders: The orders of choice that are known, by the name of the scorer.
    """

    tracer: FlowTracer
    ids: Int[Tensor, "batch token"]
    visible: Bool[Tensor, "batch token"]
    prompt_length: int
    masks: RolloutMasks
    late: Callable[[], Late] = Late
    oracle: SpanFinder | None = None
    seed: int = 0
    batch_size: int | None = None
    reading: Reading | None = None
    sizes: Sequence[Float[Tensor, "batch _ _"]] = ()
    graphs: dict[str | None, Graph] = field(default_factory=dict)
    orders: dict[str, tuple[Row, RowErrors]] = field(default_factory=dict)

    def rollouts(self, scorer: Scorer) -> Rollouts:
        """The rollouts with what `scorer` needs.

        Raises:
            ValueError: The scorer `oracle` has no oracle.
        """
        needs, found = scorer.needs, self.plain
        if scorer.graph or "heads" in needs:  # attention rollout needs a target, not a graph
            graph = self.graph(scorer.preset, solved="flow" in needs)
            found = replace(found, target=graph.target)
        if scorer.graph:
            found = replace(
                found,
                attention=graph.attention,
                throughput=graph.throughput,
                reach=graph.reach,
            )
        if "heads" in needs:
            found = replace(found, calls=self.calls(scorer.layers))
        own = {part: getattr(self, part) for part in OWN_PASSES if part in needs}
        found = replace(found, **own)
        for part in scorer.parts:
            found = self.with_order(found, part)
        if "oracle" in needs:
            found = replace(found, oracle=self.oracle_tokens)
        if "tokens" in needs:
            found = replace(found, tokens=self.tokens)
        if needs & LATE:
            entropies, surprisals = self.late_values
            found = replace(found, entropies=entropies, surprisals=surprisals)
        return found

    @cached_property
    def plain(self) -> Rollouts:
        """The rollouts without anything read from the model; every visible token competes."""
        return Rollouts(
            ids=self.ids,
            visible=self.visible,
            prompt_length=self.prompt_length,
            competing=self.visible[:, self.prompt_length :],
            target=self.masks.target,
            answer=self.masks.answer,
            seed=self.seed,
        )

    def part(self, rows: slice, reading: Reading) -> ReadRollouts:
        """Some of the rows, with a forward pass over them."""
        return replace(
            self,
            ids=self.ids[rows],
            visible=self.visible[rows],
            masks=self.masks.rows(rows),
            reading=reading,
            sizes=[size[rows] for size in self.sizes],
            graphs={},
            orders={},
        )

    def graph(self, preset: str | None = None, *, solved: bool = True) -> Graph:
        """The graph with the options of a preset, by default with the tracer's own options."""
        options = self._options(preset)
        graph = self.graphs.get(preset)
        if graph is None:
            # The masks hold the target of the tracer's own options, so training copies nothing.
            target = self.masks.target if preset is None else self._target(options)
            graph = self._graph(options, target)
        if solved and graph.throughput is None:
            masks = replace(self.masks, target=graph.target)
            flow = solve_rollouts(graph.attention, masks, self.prompt_length, options)
            jump = torch.where(flow.found, 1.0 - flow.reasoning_share, torch.nan)
            graph = graph._replace(
                throughput=flow.throughput, reach=flow.reach, jump=jump, errors=flow.errors
            )
        self.graphs[preset] = graph
        return graph

    def _options(self, preset: str | None) -> FlowOptions:
        tracer = self.tracer
        return tracer.options if preset is None else preset_over(preset, tracer.chosen)

    def calls(self, layers: str | Sequence[int]) -> tuple[AttentionCall | AttentionWeights, ...]:
        """The attention calls of a selection of layers; all calls of a given reading."""
        if self.reading is not None:
            return self.reading.calls
        available = [site.layer for site in self.tracer.reader.sites]
        chosen = set(select_layers(layers, available))
        every = zip(available, self._all_calls, strict=True)
        return tuple(call for layer, call in every if layer in chosen)

    @cached_property
    def tokens(self) -> tuple[tuple[str, ...], ...]:
        """The text of every token, empty on padding."""
        tokenizer = self.tracer.require_tokenizer()
        texts = []
        for ids, seen in zip(self.ids.tolist(), self.visible.tolist(), strict=True):
            shown = [token for token, one in zip(ids, seen, strict=True) if one]
            pieces = iter(decode_tokens(tokenizer, shown).pieces)
            texts.append(tuple(next(pieces) if one else "" for one in seen))
        return tuple(texts)

    @cached_property
    def late_values(self) -> Late:
        """Entropies and surprisals."""
        return self.late()

    @cached_property
    def saliency(self) -> Float[Tensor, "batch token"]:
        """Gradient times input for the answer."""
        model, answer = self.tracer.model, self.masks.answer
        with self.tracer.reader.turn():
            return answer_saliency(
                model, self.ids, self.visible, answer, batch_size=self.batch_size
            )

    @cached_property
    def swaps(self) -> Float[Tensor, "batch token"]:
        """What the answer loses by swapping each token."""
        model, answer, start = self.tracer.model, self.masks.answer, self.prompt_length
        with self.tracer.reader.turn():
            return swap_losses(
                model, self.ids, self.visible, answer, start, batch_size=self.batch_size
            )

    @cached_property
    def sensitivity(self) -> Float[Tensor, "batch token"]:
        """How far noise at each token moves the answer."""
        with self.tracer.reader.turn():
            return outcome_sensitivity(
                self.tracer.model,
                self.ids,
                self.visible,
                self.masks.answer,
                self.prompt_length,
                seed=self.seed,
                batch_size=self.batch_size,
            )

    def with_order(self, rollouts: Rollouts, scorer: Scorer) -> Rollouts:
        """The rollouts with the order in which a scorer that hides tokens chooses them."""
        if not scorer.steps:
            return rollouts
        if scorer.name not in self.orders:
            self.orders[scorer.name] = self._order(scorer)
        order, _ = self.orders[scorer.name]
        if "removals" in scorer.needs:
            return replace(rollouts, removals=order)
        return replace(rollouts, flow_removals=order)

    def _order(self, scorer: Scorer) -> tuple[Row, RowErrors]:
        reader, masks, start = self.tracer.reader, self.masks, self.prompt_length
        check_whole(self.tracer.model)
        # On a CPU, a text alone is faster: it continues from the cache of its prompt.
        size = None if self.ids.device.type == "cpu" else self.batch_size
        if "removals" in scorer.needs:
            order = removal_order(
                reader,
                self.ids,
                self.visible,
                masks.answer,
                start,
                steps=scorer.steps,
                batch_size=size,
            )
            return order, {}
        return flow_order(
            reader,
            self.ids,
            self.visible,
            masks,
            start,
            self._options(scorer.preset),
            steps=scorer.steps,
            batch_size=size,
        )

    @property
    def errors(self) -> RowErrors:
        """The error of each row that has failed so far, by its number."""
        found = dict(self.masks.errors)
        for graph in self.graphs.values():
            found = {**graph.errors, **found}
        for _, errors in self.orders.values():
            found = {**errors, **found}
        return {**self.oracle_found[1], **found} if "oracle_found" in vars(self) else found

    @property
    def oracle_tokens(self) -> Bool[Tensor, "batch completion"]:
        """The completion tokens that the oracle finds.

        Raises:
            ValueError: There is no oracle.
        """
        return self.oracle_found[0]

    @cached_property
    def oracle_found(self) -> tuple[Bool[Tensor, "batch completion"], RowErrors]:
        """The tokens that the oracle finds, and the error of each row in which it fails.

        Raises:
            ValueError: There is no oracle.
        """
        if self.oracle is None:
            raise ValueError(
                "the scorer 'oracle' needs oracle, a pattern or a function that finds the tokens "
                "that matter in a completion"
            )
        tokenizer = self.tracer.require_tokenizer()
        return oracle_mask(tokenizer, self.ids, self.visible, self.prompt_length, self.oracle)

    @cached_property
    def _all_calls(self) -> tuple[AttentionCall | AttentionWeights, ...]:
        reader = self.tracer.reader
        every = [site.layer for site in reader.sites]
        return reader.read_in_place(self.ids, self.visible, every, keep=True, average=False).calls

    def _target(self, options: FlowOptions) -> Bool[Tensor, "batch token"]:
        answer = self.masks.answer.cpu().numpy()
        return torch.from_numpy(target_mask(answer, options.target)).to(self.ids.device)

    def _graph(self, options: FlowOptions, target: Bool[Tensor, "batch token"]) -> Graph:
        attention = self._edges(options, target)
        response = completions(self.visible, self.prompt_length)
        return Graph(asked_edges(attention, self.visible, response, options), target)

    def _edges(self, options: FlowOptions, target: Tensor) -> Float[Tensor, "batch query key"]:
        tracer, reading = self.tracer, self.reading
        if options.edges == CAUSAL:  # no scorer reads these edges in the pass that trains
            return helpful_edges(self._losses(options))
        if reading is not None and reading.attention is not None:
            return reading.attention
        response = completions(self.visible, self.prompt_length)
        choice = edge_choice(options, target, response, self.masks.answer)
        layers = select_layers(options.layers, [site.layer for site in tracer.reader.sites])
        calls = self.calls(layers)
        lengths = self._lengths(calls, layers, options.edges)
        sizes = self.influence(layers) if options.edges == "influence" else ()
        rows = tracer.reader.rows_of(calls, layers, lengths, self.visible, choice, sizes)
        return rows.whole()

    def _losses(self, options: FlowOptions) -> Float[Tensor, "batch query key"]:
        reader, answer = self.tracer.reader, self.masks.answer
        layers = select_layers(options.layers, [site.layer for site in reader.sites])
        texts = asked_texts(reader, self.ids, self.visible, answer, self.prompt_length)
        return edge_losses(reader, texts, layers)

    def influence(self, layers: Sequence[int]) -> Sequence[Float[Tensor, "batch _ _"]]:
        """The influence of the heads and rows of these layers on the `decided` tokens."""
        if self.sizes:
            return self.sizes
        return self.tracer.reader.influences(
            self.ids, self.visible, self.decided, layers, batch_size=self.batch_size
        )

    @property
    def decided(self) -> Bool[Tensor, "batch token"]:
        """The sampled tokens on which influence counts: those up to the answer's end."""
        said = completions(self.visible, self.prompt_length)
        return up_to_answer(said, self.masks.answer)

    def _lengths(
        self, calls: Sequence[AttentionCall | AttentionWeights], layers: Sequence[int], edges: str
    ) -> Sequence[Float[Tensor, "batch _ _"]]:
        if edges == "attention":
            return ()
        if self.reading is not None:
            return self.reading.lengths
        reader = self.tracer.reader
        sites = [site for site in reader.sites if site.layer in set(layers)]
        pairs = zip(calls, sites, strict=True)
        maps = reader.projections if edges == "value" else dict.fromkeys(sites)
        return [value_lengths(call, maps[site]) for call, site in pairs]


def oracle_mask(
    tokenizer: PreTrainedTokenizerBase,
    ids: Int[Tensor, "batch token"],
    visible: Bool[Tensor, "batch token"],
    start: int,
    oracle: SpanFinder,
) -> tuple[Bool[Tensor, "batch completion"], RowErrors]:
    """The completion tokens that an oracle finds, and the error of each row in which it fails."""
    said, shown = ids[:, start:].cpu().numpy(), visible[:, start:].cpu().numpy()
    mask, errors = np.zeros_like(shown), dict[int, Exception]()
    for row, seen in enumerate(shown):
        try:
            mask[row, seen] = matched_mask(tokenizer, said[row, seen].tolist(), oracle)
        except (ValueError, TypeError) as error:
            errors[row] = error
    return torch.from_numpy(mask).to(ids.device), errors
