"""Scores of the tokens of one text, which knocking tokens out compares: flow, and its rivals.

Every scorer of training is one, by the same name, and so is `recency`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowtracer_plugin.attention import AttentionCall, AttentionWeights
from flowtracer_plugin.causal_lm import first_output, input_device
from flowtracer_plugin.controls import permute_within, role_and_position
from flowtracer_plugin.cutting import plainly
from flowtracer_plugin.edges import EdgeChoice, reasoning_mask
from flowtracer_plugin.flow import solve_flow
from flowtracer_plugin.layers import select_layers
from flowtracer_plugin.matched_spans import SpanFinder, matched_mask
from flowtracer_plugin.options import flow_options
from flowtracer_plugin.saliency import answer_saliency
from flowtracer_plugin.scorers import Rollouts, Scorer, find_scorer
from flowtracer_plugin.spans import target_mask
from flowtracer_plugin.trace import FlowTrace
from flowtracer_plugin.tracer import FlowTracer

Scores = Float[np.ndarray, " token"]

COUPLED_SHARE = 0.4
"""Share of the tokens that `coupled` chooses as anchors: it scores by its choice."""


class Graph(NamedTuple):
    """The graph of a text by some options, and the flow along it."""

    attention: Float[np.ndarray, "query key"]
    target: Bool[np.ndarray, " token"]
    throughput: Scores
    reach: Scores


class ScoredText:
    """A traced text, and what scores look at: it is read when the first score asks for it.

    Attributes:
        tracer: Of its model.
        trace: Of the text.
    """

    def __init__(self, tracer: FlowTracer, trace: FlowTrace) -> None:
        self.tracer, self.trace = tracer, trace
        self._graphs: dict[str | None, Graph] = {}
        self._calls: dict[str, tuple[AttentionCall | AttentionWeights, ...]] = {}
        self._ids = torch.from_numpy(trace.token_ids).to(input_device(tracer.model))[None]
        self._visible = torch.ones_like(self._ids, dtype=torch.bool)

    def rollouts(self, scorer: Scorer) -> Rollouts:
        """The text as a batch of one, with what a scorer needs."""
        spans, needs = self.trace.spans, scorer.needs
        start = spans.prompt_length
        graph = self.graph(scorer.preset)
        rollouts = Rollouts(
            ids=self._ids,
            visible=self._visible,
            prompt_length=start,
            competing=self._visible[:, start:],
            target=self._row(graph.target),
            answer=self._row(spans.answer),
            throughput=self._row(graph.throughput),
            reach=self._row(graph.reach),
            attention=self._row(graph.attention),
        )
        if "heads" in needs:
            rollouts = replace(rollouts, calls=self.calls(scorer.layers))
        if needs & {"entropy", "surprisal"}:
            entropies, surprisals = (part[None, start:] for part in self.uncertainty)
            rollouts = replace(rollouts, entropies=entropies, surprisals=surprisals)
        if "saliency" in needs:
            rollouts = replace(rollouts, saliency=self.saliency)
        return rollouts

    def graph(self, preset: str | None = None) -> Graph:
        """The graph that a preset makes; without one, the trace's own."""
        if preset not in self._graphs:
            self._graphs[preset] = self._own if preset is None else self._by(preset)
        return self._graphs[preset]

    def calls(self, layers: str) -> tuple[AttentionCall | AttentionWeights, ...]:
        """The attention of a selection of layers."""
        if layers not in self._calls:
            reader = self.tracer.reader
            numbers = select_layers(layers, [site.layer for site in reader.sites])
            reading = reader.read_in_place(self._ids, self._visible, numbers, keep=True)
            self._calls[layers] = reading.calls
        return self._calls[layers]

    @cached_property
    def uncertainty(self) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
        """Entropy of the choice of each token and its surprisal, in nats; 0 at the first."""
        with plainly(self.tracer.model):
            logits = first_output(self.tracer.model(input_ids=self._ids))[0, :-1]
        chances = logits.float().log_softmax(-1)
        entropies = -(chances.exp() * chances).sum(-1)
        surprisals = -chances.gather(-1, self._ids[0, 1:, None])[:, 0]
        first = entropies.new_zeros(1)
        return torch.cat([first, entropies]), torch.cat([first, surprisals])

    @cached_property
    def saliency(self) -> Float[Tensor, "1 token"]:
        """Gradient times input, for the answer."""
        answer = self._row(self.trace.spans.answer)
        return answer_saliency(self.tracer.model, self._ids, self._visible, answer)

    @property
    def _own(self) -> Graph:
        trace = self.trace
        assert trace.attention is not None, "read_text refuses streamed traces"
        return Graph(trace.attention, trace.spans.target, trace.throughput, trace.reach)

    def _by(self, preset: str) -> Graph:
        options, spans = flow_options(preset), self.trace.spans
        target = target_mask(spans.answer, options.target)
        reader, layers = self.tracer.reader, self.trace.layers
        if options.plain:
            edges = reader.read(self._ids, self._visible, layers)
        else:
            choice = EdgeChoice(
                heads=options.heads,
                by_value=options.edges == "value",
                target=self._row(target),
                reasoning=reasoning_mask(self._row(spans.response), self._row(spans.answer)),
            )
            edges, _ = reader.read_edges(self._ids, self._visible, layers, choice)
        attention = edges[0].cpu().numpy()
        flow = solve_flow(
            attention,
            spans.question,
            target,
            question_weights=options.question_weights,
            boundary=options.boundary,
        )
        return Graph(attention, target, flow.throughput, flow.reach)

    def _row(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(values)).to(self._ids.device)[None]


TokenScore = Callable[[ScoredText], Scores]


def read_text(tracer: FlowTracer, trace: FlowTrace) -> ScoredText:
    """A traced text as scores see it.

    Raises:
        ValueError: The trace was streamed.
    """
    if trace.attention is None:
        raise ValueError(
            "scores are compared on all attention of a text, and this trace was streamed; make it "
            "with wrap(..., mode='dense')"
        )
    return ScoredText(tracer, trace)


def token_score(name: str, *, oracle: SpanFinder | None = None) -> TokenScore:
    """The score of a scorer's name, or `recency`. Prompt tokens score 0: they do not compete.

    Args:
        name: As for `scorers.find_scorer`.
        oracle: Finds the tokens that matter in a response, for the scorer `oracle`.

    Raises:
        ValueError: There is no such scorer, or the scorer `oracle` is told nothing.
    """
    if name == "recency":
        return recency
    scorer = find_scorer(name)
    if "oracle" not in scorer.needs:
        return lambda text: _values(scorer, text, text.rollouts(scorer))
    if oracle is None:
        raise ValueError(
            "the score 'oracle' needs oracle, a pattern or a function that finds the tokens that "
            "matter in a response"
        )

    def told(text: ScoredText) -> Scores:
        trace, rollouts = text.trace, text.rollouts(scorer)
        said = trace.token_ids[trace.spans.prompt_length :].tolist()
        found = matched_mask(text.tracer.require_tokenizer(), said, oracle)
        mask = torch.from_numpy(found).to(rollouts.ids.device)[None]
        return _values(scorer, text, replace(rollouts, oracle=mask))

    return told


def recency(text: ScoredText) -> Scores:
    """The latest first."""
    return np.arange(len(text.trace.token_ids), dtype=np.float64)


def _values(scorer: Scorer, text: ScoredText, rollouts: Rollouts) -> Scores:
    """What the scorer measures, or where it chooses by more than one number, how it chooses."""
    features = scorer.measure(rollouts)
    score = features[0]
    if scorer.name.startswith("coupled"):
        tie = score / (score.max() + 1) / 2  # less than the boosts differ by
        score = scorer.choose(features, rollouts, COUPLED_SHARE) + tie
    if scorer.name.startswith("shuffled"):
        answer = rollouts.answer[:, rollouts.prompt_length :]
        bins = role_and_position(rollouts.competing, answer)
        score = permute_within(bins, score, features[1])
    measured = score[0].double().cpu().numpy()
    return np.concatenate([np.zeros(rollouts.prompt_length), measured])


NAMES = (
    "flow",
    "flow:decision",
    "flow:sharp",
    "reach",
    "reach:decision",
    "reach:sharp",
    "attention",
    "attention:decision",
    "attention:sharp",
    "attention_power",
    "rollout",
    "fai",
    "waad",
    "grad_x_input",
    "entropy",
    "surprisal",
    "recency",
)
"""What is compared unless somebody asks for others."""

TOKEN_SCORES: Mapping[str, TokenScore] = MappingProxyType(
    {name: token_score(name) for name in NAMES}
)
"""The scores of these names."""
