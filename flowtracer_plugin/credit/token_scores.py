"""Scores of the tokens of one text: every scorer of training under its name, and `recency`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flowtracer_plugin.credit.controls import permute_within, role_and_position
from flowtracer_plugin.credit.own_scorers import Measure, own_sources, path_of
from flowtracer_plugin.credit.read_rollouts import Graph, Late, ReadRollouts, oracle_mask
from flowtracer_plugin.credit.scorers import Rollouts, Scorer, coupled, find_scorer, shuffled
from flowtracer_plugin.model.causal_lm import first_output, input_device
from flowtracer_plugin.model.cutting import plainly
from flowtracer_plugin.text.matched_spans import SpanFinder
from flowtracer_plugin.trace.flow_trace import FlowTrace
from flowtracer_plugin.trace.rollouts import RolloutMasks
from flowtracer_plugin.trace.tracer import FlowTracer

Scores = Float[np.ndarray, " token"]

COUPLED_SHARE = 0.4
"""Share of the tokens that `coupled` chooses as anchors; its score says which it chose."""


class ScoredText:
    """A traced text as scores see it; the model reads it again when a score first needs that.

    Attributes:
        tracer: The tracer that made the trace.
        trace: The trace of the text.
    """

    def __init__(self, tracer: FlowTracer, trace: FlowTrace) -> None:
        self.tracer, self.trace = tracer, trace
        self._ids = self._row(trace.token_ids)

    def rollouts(self, scorer: Scorer, oracle: SpanFinder | None = None) -> Rollouts:
        """The text as a batch of one, with all that a scorer needs."""
        if oracle is None:
            return self._read.rollouts(scorer)
        start, tokenizer = self.trace.spans.prompt_length, self.tracer.require_tokenizer()
        known = self._read.rollouts(find_scorer("uniform"))
        mask, errors = oracle_mask(tokenizer, self._ids, known.visible, start, oracle)
        for error in errors.values():
            raise error
        return replace(known, oracle=mask)

    @cached_property
    def _read(self) -> ReadRollouts:
        trace, spans = self.trace, self.trace.spans
        assert trace.attention is not None, "read_text refuses streamed traces"
        own = Graph(
            attention=self._row(trace.attention),
            target=self._row(spans.target),
            throughput=self._row(trace.throughput),
            reach=self._row(trace.reach),
        )
        masks = RolloutMasks(
            question=self._row(spans.question),
            target=own.target,
            answer=self._row(spans.answer),
            answers=(None,),
        )
        visible = torch.ones_like(self._ids, dtype=torch.bool)
        return ReadRollouts(
            self.tracer,
            self._ids,
            visible,
            spans.prompt_length,
            masks,
            late=self._late,
            graphs={None: own},
        )

    def _late(self) -> Late:
        start = self.trace.spans.prompt_length
        with plainly(self.tracer.model):
            logits = first_output(self.tracer.model(input_ids=self._ids))[:, start - 1 : -1]
        chances = logits.float().log_softmax(-1)
        surprisals = -chances.gather(-1, self._ids[:, start:, None])[..., 0]
        return Late(torch.special.entr(chances.exp()).sum(-1), surprisals)

    def _row(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(values)).to(input_device(self.tracer.model))[None]


TokenScore = Callable[[ScoredText], Scores]


def read_text(tracer: FlowTracer, trace: FlowTrace) -> ScoredText:
    """A traced text as scores see it.

    Raises:
        ValueError: The trace was streamed.
    """
    if trace.attention is None:
        raise ValueError(
            "scores need all attention of a text, and this trace was streamed; make it with "
            "wrap(..., mode='dense')"
        )
    return ScoredText(tracer, trace)


@dataclass(frozen=True, slots=True)
class ScorerScore:
    """The score of a text's tokens by a scorer.

    Attributes:
        scorer: Measures the tokens.
        oracle: Finds the tokens that matter, for the scorer `oracle`.
    """

    scorer: Scorer
    oracle: SpanFinder | None = None

    def __call__(self, text: ScoredText) -> Scores:
        """The scores, 0 for tokens of the prompt.

        Raises:
            InvalidScoreError: One is negative or not finite.
        """
        values = _values(self.scorer, text.rollouts(self.scorer, self.oracle))
        invalid = values[~(np.isfinite(values) & (values >= 0))]
        if invalid.size:
            raise self.scorer.invalid_score(float(invalid[0]))
        return values


def token_score(name: str | Measure, *, oracle: SpanFinder | None = None) -> TokenScore:
    """The score of a scorer, or `recency`. Prompt tokens score 0: they do not compete.

    Args:
        name: As for `scorers.find_scorer`.
        oracle: Finds the tokens that matter in a response, for the scorer `oracle`.

    Raises:
        ValueError: There is no such scorer, or the scorer `oracle` is given no `oracle`.
        ScorerError: An own scorer cannot be found.
    """
    if name == "recency":
        return recency
    scorer = find_scorer(name)
    if "oracle" not in scorer.needs:
        return ScorerScore(scorer)
    if oracle is None:
        raise ValueError(
            "the score 'oracle' needs oracle, a pattern or a function that finds the tokens that "
            "matter in a response"
        )
    return ScorerScore(scorer, oracle)


def score_text(
    tracer: FlowTracer,
    trace: FlowTrace,
    names: Iterable[str | Measure],
    *,
    oracle: SpanFinder | None = None,
) -> dict[str, Scores]:
    """Scores of a traced text by their names, such as for `FlowTrace.to_html(scores=)`.

    The name of a function is its path, such as `package.module:function`.

    Raises:
        ValueError: As `token_score` and `read_text`.
    """
    scores = {
        name if isinstance(name, str) else path_of(name): token_score(name, oracle=oracle)
        for name in names
    }
    text = read_text(tracer, trace)
    return {name: score(text) for name, score in scores.items()}


def own_codes(scores: Mapping[str, TokenScore]) -> dict[str, dict[str, str]]:
    """A setting for files of results, as `own_scorers.own_sources`, of scores of any kind."""
    made = {name: one.scorer for name, one in scores.items() if isinstance(one, ScorerScore)}
    return own_sources(made)


def recency(text: ScoredText) -> Scores:
    """The place of each token: later ones score higher."""
    return np.arange(len(text.trace.token_ids), dtype=np.float64)


def _values(scorer: Scorer, rollouts: Rollouts) -> Scores:
    """The scorer's measure; for `coupled` and the shuffled ones, scores that choose the same."""
    features = scorer.measure(rollouts)
    score = features[0]
    if scorer.choose is coupled:
        tie = score / (score.max() + 1) / 2  # smaller than any difference of boosts
        score = scorer.choose(features, rollouts, COUPLED_SHARE) + tie
    if scorer.choose is shuffled:
        answer = rollouts.answer[:, rollouts.prompt_length :]
        bins = role_and_position(rollouts.competing, answer)
        score = permute_within(bins, score, features[1])
    measured = score[0].double().cpu().numpy()
    return np.concatenate([np.zeros(rollouts.prompt_length), measured])


NAMES = (
    "flow",
    "flow:decision",
    "flow:sharp",
    "flow:derivation",
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
"""The scores that are compared by default."""

TOKEN_SCORES: Mapping[str, TokenScore] = MappingProxyType(
    {name: token_score(name) for name in NAMES}
)
"""The scores of these names."""
