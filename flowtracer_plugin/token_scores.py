"""Scores of tokens that are compared by knocking tokens out: flow, and what it must beat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flowtracer_plugin.causal_lm import first_output, input_device
from flowtracer_plugin.cutting import plainly
from flowtracer_plugin.flow import Flow, solve_flow
from flowtracer_plugin.layers import select_layers
from flowtracer_plugin.scorers import SCORERS, Rollouts
from flowtracer_plugin.spans import target_mask
from flowtracer_plugin.trace import FlowTrace
from flowtracer_plugin.tracer import FlowTracer


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class ScoredText:
    """What a score may look at.

    Attributes:
        trace: Of the text.
        attention: Mean over the layers of the trace and their heads.
        rollouts: The same text as a batch of one, for the scorers of training.
        surprisal: Of each token, in nats; 0 at the first, which nothing predicts.
    """

    trace: FlowTrace
    attention: Float[np.ndarray, "query key"]
    rollouts: Rollouts
    surprisal: Float[np.ndarray, " token"]


Scores = Float[np.ndarray, " token"]
TokenScore = Callable[[ScoredText], Scores]


def read_text(tracer: FlowTracer, trace: FlowTrace) -> ScoredText:
    """Run the model on a traced text for what the trace does not hold.

    Raises:
        ValueError: The trace was streamed.
    """
    if trace.attention is None:
        raise ValueError(
            "scores are compared on all attention of a text, and this trace was streamed; make it "
            "with wrap(..., mode='dense')"
        )
    reader, device = tracer.reader, input_device(tracer.model)
    ids = torch.from_numpy(trace.token_ids).to(device)[None]
    visible = torch.ones_like(ids, dtype=torch.bool)
    five = select_layers(SCORERS["fai"].layers, [site.layer for site in reader.sites])
    calls = reader.read_in_place(ids, visible, five, keep=True).calls
    with plainly(tracer.model):
        chances = first_output(tracer.model(input_ids=ids))[0, :-1].float().log_softmax(-1)
    entropy = -(chances.exp() * chances).sum(-1)
    chosen = chances.gather(-1, ids[0, 1:, None])[:, 0]
    start, spans = trace.spans.prompt_length, trace.spans
    rollouts = Rollouts(
        ids=ids,
        visible=visible,
        prompt_length=start,
        competing=visible[:, start:],
        target=_row(spans.target, device),
        answer=_row(spans.answer, device),
        throughput=_row(trace.throughput, device),
        attention=_row(trace.attention, device),
        calls=calls,
        entropies=entropy[None, start - 1 :],
    )
    surprisal = np.concatenate([[0.0], -chosen.cpu().numpy()])
    return ScoredText(
        trace=trace, attention=trace.attention, rollouts=rollouts, surprisal=surprisal
    )


def flow(text: ScoredText) -> Scores:
    """Flow through each token, as it was traced."""
    return text.trace.throughput


def flow_decision(text: ScoredText) -> Scores:
    """Flow to the rows that choose the answer, injected in proportion to reach."""
    return np.asarray(_to_decision(text).throughput)


def reach(text: ScoredText) -> Scores:
    """Influence on the answer, over all paths."""
    return text.trace.reach


def reach_decision(text: ScoredText) -> Scores:
    """Influence on the rows that choose the answer."""
    return np.asarray(_to_decision(text).reach)


def attention(text: ScoredText) -> Scores:
    """What the answer's rows pay to each token: one hop."""
    return _attention(text, "answer")


def attention_decision(text: ScoredText) -> Scores:
    """What the rows that choose the answer pay to each token: one hop."""
    return _attention(text, "decision")


def surprisal(text: ScoredText) -> Scores:
    """How unlikely the model found each token."""
    return text.surprisal


def recency(text: ScoredText) -> Scores:
    """The latest first."""
    return np.arange(len(text.surprisal), dtype=np.float64)


def _of_training(name: str) -> TokenScore:
    return lambda text: _measured(name, text.rollouts)


TOKEN_SCORES: Mapping[str, TokenScore] = MappingProxyType(
    {
        "flow": flow,
        "flow_decision": flow_decision,
        "reach": reach,
        "reach_decision": reach_decision,
        "attention": attention,
        "attention_decision": attention_decision,
        **{name: _of_training(name) for name in ("fai", "waad", "entropy")},
        "surprisal": surprisal,
        "recency": recency,
    }
)
"""Every score by its name. Prompt tokens may score 0: they do not compete."""


def _to_decision(text: ScoredText) -> Flow:
    spans = text.trace.spans
    rows = target_mask(spans.answer, "decision")
    return solve_flow(text.attention, spans.question, rows, question_weights="reach")


def _attention(text: ScoredText, target: str) -> Scores:
    rows = target_mask(text.trace.spans.answer, target)
    rollouts = replace(text.rollouts, target=_row(rows, text.rollouts.target.device))
    return _measured("attention", rollouts)


def _measured(name: str, rollouts: Rollouts) -> Scores:
    """By a scorer of training, which looks at completions only."""
    measured = SCORERS[name].measure(rollouts)[0, 0].double().cpu().numpy()
    return np.concatenate([np.zeros(rollouts.prompt_length), measured])


def _row(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.asarray(values)).to(device)[None]
