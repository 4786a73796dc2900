"""One traced text with its scores, which all protocols share and which are computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float

from flowtracer_plugin.credit.choosing import InvalidScoreError
from flowtracer_plugin.credit.token_scores import TokenScore, read_text
from flowtracer_plugin.evaluation.knockout import Baseline
from flowtracer_plugin.evaluation.progress import Tick, inner_bar
from flowtracer_plugin.evaluation.token_sets import Mask, Scores
from flowtracer_plugin.text.spans import special_ids
from flowtracer_plugin.trace.flow_trace import FlowTrace
from flowtracer_plugin.trace.tracer import FlowTracer

FEWEST = 10
"""With fewer candidates, shares of them mean nothing."""


class TooFewTokensError(ValueError):
    """A response has too few tokens before its answer that could be knocked out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredExample:
    """A traced text with its scores; each part is computed when a protocol first needs it.

    Attributes:
        tracer: The tracer that made the trace.
        trace: A trace that holds its attention, as with `wrap(..., mode="dense")`.
        scores: The scores by name. A score maps a `ScoredText` to one number for each token.
        right: The right answer, if it is known.
        batch_size: Cuts in one forward pass; as many as memory allows by default.
        progress: Show a bar for each part that takes long.
    """

    tracer: FlowTracer
    trace: FlowTrace
    scores: Mapping[str, TokenScore]
    right: str | None = None
    batch_size: int | None = None
    progress: bool = False

    @cached_property
    def values(self) -> Mapping[str, Scores]:
        """The value of every token by each score.

        Raises:
            InvalidScoreError: A score is not finite.
            ValueError: The trace was streamed.
        """
        text = read_text(self.tracer, self.trace)
        values = {}
        with self.bar("score", len(self.scores)) as tick:
            for name, score in self.scores.items():
                values[name] = score(text)
                tick(1)
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise InvalidScoreError(f"the score {name!r} is not finite at some tokens")
        return values

    @cached_property
    def baseline(self) -> Baseline:
        """The text as the model reads it without a cut, with a cache that all protocols use.

        Raises:
            KnockOutError: The model's attention cannot be cut.
        """
        ids, answer = self.trace.token_ids, self.trace.spans.answer
        return Baseline.read(self.tracer.model, torch.from_numpy(ids), torch.from_numpy(answer))

    def candidates(self, gap: int) -> Mask:
        """The tokens that could be knocked out, by `candidate_tokens`."""
        special = sorted(special_ids(self.tracer.require_tokenizer()))
        return candidate_tokens(self.trace, np.isin(self.trace.token_ids, special), gap=gap)

    def knock_out(
        self, groups: Sequence[Sequence[Mask]], rows: str
    ) -> list[Float[np.ndarray, "3 mask"]]:
        """Drop, flip and divergence of the sets of each group; equal sets are measured once."""
        masks = np.stack([mask for group in groups for mask in group])
        unique, place = np.unique(masks, axis=0, return_inverse=True)
        sets, size = torch.from_numpy(unique), self.batch_size
        with self.bar("set", len(sets)) as tick:
            found = self.baseline.knock_out(sets, rows=rows, batch_size=size, tick=tick)
        parts = [found.drop, found.flipped, found.divergence]
        numbers = np.stack([part.double().numpy()[place.reshape(-1)] for part in parts])
        return np.split(numbers, np.cumsum([len(group) for group in groups])[:-1], axis=1)

    def bar(self, unit: str, total: int) -> AbstractContextManager[Tick]:
        """A bar for one part of the work, as by `inner_bar`, if `progress` asks for it."""
        return inner_bar(unit, total, shown=self.progress)

    def rng(self, *seed: int) -> np.random.Generator:
        """Random numbers that depend on the seed and on the text alone."""
        return np.random.default_rng([*seed, *self.trace.token_ids.tolist()])


def candidate_tokens(trace: FlowTrace, special: Mask, *, gap: int) -> Mask:
    """Response tokens before the answer that are not special, without the last `gap` before it.

    Raises:
        TooFewTokensError: There are fewer than 10 of them.
    """
    spans, place = trace.spans, np.arange(len(trace.token_ids))
    first = int(spans.answer.argmax())
    among = spans.response & ~special & (place < first - gap)
    if among.sum() < FEWEST:
        raise TooFewTokensError(
            f"only {int(among.sum())} tokens of the response could be knocked out, {gap} before "
            f"the answer {spans.answer_text!r} left out; wanted at least {FEWEST}"
        )
    return among
