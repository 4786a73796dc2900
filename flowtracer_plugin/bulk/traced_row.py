"""What became of one row of the data: a trace with its numbers, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from flowtracer_plugin.rewards.flow_reward import concentration
from flowtracer_plugin.trace.flow_trace import FlowTrace


@dataclass(frozen=True, kw_only=True, eq=False)
class TracedRow:
    """The result of one row of the data.

    Attributes:
        row: Its number in the data.
        id: Its `id` in the data, else its number, as text.
        digest: A hash of its texts; empty if the row cannot be read.
        prompt: The prompt as the model got it; as it is in the data if it cannot be read.
        response: The response in the same way; None if the model should give one and cannot.
        right_answer: The right answer, if the data have it.
        columns: The other columns of the data.
        generated: Whether the model gave the response.
        truncated: Whether a generated response breaks off at the limit of tokens; None for given
            ones.
        trace: The trace; None if the row could not be traced.
        scores: The scores that were asked for, by name.
        correct: Whether the answer is the right one; None without a trace or a right answer.
        error: Why the row has no trace or no scores; else None.
    """

    row: int
    id: str
    digest: str = ""
    prompt: str | None = None
    response: str | None = None
    right_answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    generated: bool = False
    truncated: bool | None = None
    trace: FlowTrace | None = None
    scores: Mapping[str, Float[np.ndarray, " token"]] = field(default_factory=dict)
    correct: bool | None = None
    error: str | None = None

    @cached_property
    def concentration(self) -> float | None:
        """How unevenly flow is spread over the reasoning, from 0 to 1, as in `rewards`."""
        if self.trace is None:
            return None
        flow = torch.from_numpy(self.trace.throughput).double()[None]
        counted = torch.from_numpy(self._reasoning(self.trace))[None]
        return float(concentration(flow, counted)[0])

    @staticmethod
    def _reasoning(trace: FlowTrace) -> Bool[np.ndarray, " token"]:
        """The tokens of the response before or between those of the target."""
        last = int(np.flatnonzero(trace.spans.target).max())
        place = np.arange(len(trace.tokens))
        return trace.spans.response & ~trace.spans.target & (place < last)

    @cached_property
    def ranks(self) -> Int[np.ndarray, " token"]:
        """The rank of each response token by throughput, 1 for the most; 0 in the prompt."""
        assert self.trace is not None, "only traces have ranks"
        found = np.zeros(len(self.trace.tokens), np.int32)
        said = np.flatnonzero(self.trace.spans.response)
        order = np.argsort(-self.trace.throughput[said], kind="stable")
        found[said[order]] = np.arange(1, len(said) + 1)
        return found

    def top_tokens(self, count: int = 10) -> tuple[int, ...]:
        """The tokens of the response outside answer and target with the most flow, in order."""
        if self.trace is None:
            return ()
        spans, flow = self.trace.spans, self.trace.throughput
        eligible = np.flatnonzero(spans.response & ~spans.answer & ~spans.target & (flow > 0))
        return tuple(eligible[np.argsort(-flow[eligible], kind="stable")][:count].tolist())
