"""Rollouts of one batch with whatever scorers need of them, read once however many scorers ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flowtracer_plugin.attention.adapter import AttentionCall, AttentionWeights
from flowtracer_plugin.attention.value_lengths import value_lengths
from flowtracer_plugin.credit.saliency import answer_saliency
from flowtracer_plugin.credit.scorers import Rollouts, Scorer
from flowtracer_plugin.model.layers import select_layers
from flowtracer_plugin.options import FlowOptions, flow_options
from flowtracer_plugin.reading.edges import completions, edge_choice
from flowtracer_plugin.text.matched_spans import SpanFinder, matched_mask
from flowtracer_plugin.text.spans import target_mask
from flowtracer_plugin.trace.rollouts import RolloutMasks, drop_first_token, solve_rollouts
from flowtracer_plugin.trace.tracer import FlowTracer


class Graph(NamedTuple):
    """The graph of rollouts by some options, and the flow along it."""

    attention: Float[Tensor, "batch query key"]
    target: Bool[Tensor, "batch token"]
    throughput: Float[Tensor, "batch token"]
    reach: Float[Tensor, "batch token"]


class Late(NamedTuple):
    """What is known of completion tokens only when a forward pass has come to its end."""

    entropies: Float[Tensor, "batch completion"] | None = None
    surprisals: Float[Tensor, "batch completion"] | None = None


class ReadRollouts:
    """Rollouts, and what their scorers need; all of it is read in evaluation mode.

    Args:
        tracer: Of the model.
        ids: Prompts, and completions.
        visible: No padding.
        prompt_length: Columns before the completions.
        masks: Where flow enters and leaves.
        late: Computes entropies and surprisals, when a scorer needs them.
        oracle: What the scorer `oracle` is told.
        graphs: What is known of graphs already, by preset.
        seed: Of scorers that draw.
    """

    def __init__(
        self,
        tracer: FlowTracer,
        ids: Int[Tensor, "batch token"],
        visible: Bool[Tensor, "batch token"],
        prompt_length: int,
        masks: RolloutMasks,
        *,
        late: Callable[[], Late],
        oracle: SpanFinder | None = None,
        graphs: Mapping[str | None, Graph] | None = None,
        seed: int = 0,
    ) -> None:
        self._tracer, self._ids, self._visible = tracer, ids, visible
        self._start, self._masks, self._oracle = prompt_length, masks, oracle
        self._compute_late, self._seed = late, seed
        self._graphs: dict[str | None, Graph] = dict(graphs or {})

    def rollouts(self, scorer: Scorer) -> Rollouts:
        """With what a scorer needs."""
        needs, graph = scorer.needs, None
        if scorer.graph or "heads" in needs:  # rollout has no graph, but a target
            graph = self.graph(scorer.preset)
        found = Rollouts(
            ids=self._ids,
            visible=self._visible,
            prompt_length=self._start,
            competing=self._visible[:, self._start :],
            target=self._masks.target if graph is None else graph.target,
            answer=self._masks.answer,
            saliency=self.saliency if "saliency" in needs else None,
            oracle=self.pointed_at if "oracle" in needs else None,
            calls=self.calls(scorer.layers) if "heads" in needs else (),
            seed=self._seed,
        )
        if graph is not None:
            found = replace(
                found,
                attention=graph.attention,
                throughput=graph.throughput,
                reach=graph.reach,
            )
        if needs & {"entropy", "surprisal"}:
            entropies, surprisals = self.late
            found = replace(found, entropies=entropies, surprisals=surprisals)
        return found

    def graph(self, preset: str | None = None) -> Graph:
        """The graph that a preset makes; without one, by the tracer's options."""
        if preset not in self._graphs:
            self._graphs[preset] = self._solved(
                self._tracer.options if preset is None else flow_options(preset)
            )
        return self._graphs[preset]

    def calls(self, layers: str | Sequence[int]) -> tuple[AttentionCall | AttentionWeights, ...]:
        """The attention of a selection of layers."""
        available = [site.layer for site in self._tracer.reader.sites]
        chosen = set(select_layers(layers, available))
        every = zip(available, self._calls, strict=True)
        return tuple(call for layer, call in every if layer in chosen)

    @cached_property
    def late(self) -> Late:
        """Entropies and surprisals."""
        return self._compute_late()

    @cached_property
    def saliency(self) -> Float[Tensor, "batch token"]:
        """Gradient times input, for the answer."""
        masks, model = self._masks, self._tracer.model
        return answer_saliency(model, self._ids, self._visible, masks.answer)

    @cached_property
    def pointed_at(self) -> Bool[Tensor, "batch completion"]:
        """The completion tokens that the oracle names.

        Raises:
            ValueError: There is no oracle.
        """
        if self._oracle is None:
            raise ValueError(
                "the scorer 'oracle' needs oracle, a pattern or a function that finds the tokens "
                "that matter in a completion"
            )
        tokenizer = self._tracer.require_tokenizer()
        return oracle_mask(tokenizer, self._ids, self._visible, self._start, self._oracle)

    @cached_property
    def _calls(self) -> tuple[AttentionCall | AttentionWeights, ...]:
        reader = self._tracer.reader
        every = [site.layer for site in reader.sites]
        return reader.read_in_place(self._ids, self._visible, every, keep=True, average=False).calls

    def _solved(self, options: FlowOptions) -> Graph:
        answer = self._masks.answer.cpu().numpy()
        target = torch.from_numpy(target_mask(answer, options.target)).to(self._ids.device)
        attention = self._edges(options, target)
        if options.first_token == "drop":
            attention = drop_first_token(attention, self._visible)
        masks = replace(self._masks, target=target)
        flow = solve_rollouts(attention, masks, self._start, options)
        return Graph(attention, target, flow.throughput, flow.reach)

    def _edges(self, options: FlowOptions, target: Tensor) -> Float[Tensor, "batch query key"]:
        tracer, by_value = self._tracer, options.edges == "value"
        calls = self.calls(tracer.layers)
        lengths = []
        if by_value:
            sites = [site for site in tracer.reader.sites if site.layer in set(tracer.layers)]
            projections = tracer.reader.projections
            lengths = [
                value_lengths(call, projections[site])
                for call, site in zip(calls, sites, strict=True)
            ]
        response = completions(self._visible, self._start)
        choice = edge_choice(options, target, response, self._masks.answer)
        rows = tracer.reader.rows_of(calls, tracer.layers, lengths, self._visible, choice)
        return rows.whole()


def oracle_mask(
    tokenizer: PreTrainedTokenizerBase,
    ids: Int[Tensor, "batch token"],
    visible: Bool[Tensor, "batch token"],
    start: int,
    oracle: SpanFinder,
) -> Bool[Tensor, "batch completion"]:
    """The completion tokens that an oracle points at."""
    said, shown = ids[:, start:].cpu().numpy(), visible[:, start:].cpu().numpy()
    mask = np.zeros_like(shown)
    for row, seen in enumerate(shown):
        mask[row, seen] = matched_mask(tokenizer, said[row, seen].tolist(), oracle)
    return torch.from_numpy(mask).to(ids.device)
