"""The result as plain data: which tokens carried one answer, and what follows from that."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from flowtracer_plugin.flow import backbone
from flowtracer_plugin.flow.backbone import KEPT_PATHS, Backbone, FlowPath, Outline, StepGraph
from flowtracer_plugin.flow.river import River, river
from flowtracer_plugin.flow.solve import Flow, solve_flow
from flowtracer_plugin.flow.streamed import stream_stored
from flowtracer_plugin.options import FlowOptions
from flowtracer_plugin.text.spans import Region, Spans


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedToken:
    """A token that stands out.

    Attributes:
        index: Its position in the trace.
        text: What it decodes to.
        region: Where it lies.
        throughput: Flow through it; the question injects 1.
        score: By what it was ranked, see `FlowTrace.hubs` and `FlowTrace.checkpoints`.
    """

    index: int
    text: str
    region: Region
    throughput: float
    score: float


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceData:
    """What carried one answer, token by token.

    Attributes:
        token_ids: Prompt and response as the model saw them.
        tokens: What each decodes to; joined, they are `text`. A token in the middle of a character
            that several tokens spell is empty.
        spans: Question, response and answer.
        attention: Mean over the heads of the selected layers, as `options` say; rows are queries.
            None if the trace was streamed: then there is no matrix of all pairs of tokens.
        reach: Influence of each token on the answer, `h`.
        throughput: Flow through each token, `f`, when the question injects 1.
        model: Name of the model.
        options: How the trace was made.
        layers: Numbers of the layers that were averaged.
        heads: Layer and head of those that were averaged; none if all were.
        streamed: What a streamed trace knows of its edges; see `backbone`.
    """

    token_ids: Int[np.ndarray, " token"]
    tokens: tuple[str, ...]
    spans: Spans
    attention: Float[np.ndarray, "query key"] | None
    reach: Float[np.ndarray, " token"]
    throughput: Float[np.ndarray, " token"]
    model: str
    options: FlowOptions
    layers: tuple[int, ...]
    heads: tuple[tuple[int, int], ...] = ()
    streamed: Backbone | None = None

    @property
    def text(self) -> str:
        """Prompt and response."""
        return "".join(self.tokens)

    @cached_property
    def flow(self) -> Flow:
        """The solved flow, with all of its edges.

        Raises:
            ValueError: The trace was streamed.
        """
        return solve_flow(
            self._matrix("all of its edges"),
            self.spans.question,
            self.spans.target,
            question_weights=self.options.question_weights,
            boundary=self.options.boundary,
        )

    @cached_property
    def backbone(self) -> Backbone:
        """What stands out among the edges, and the strongest of each token."""
        return self.streamed or self._backbone(KEPT_PATHS)

    def _backbone(self, paths: int) -> Backbone:
        return stream_stored(
            self._matrix(f"more than {KEPT_PATHS} paths"),
            self.spans.question,
            self.spans.target,
            self.outline,
            question_weights=self.options.question_weights,
            boundary=self.options.boundary,
            paths=paths,
        )

    def _matrix(self, wish: str) -> Float[np.ndarray, "query key"]:
        if self.attention is None:
            raise ValueError(
                f"this trace was streamed and does not have {wish}: there was no matrix of all "
                "pairs of its tokens. trace.backbone holds what stands out; "
                "wrap(..., mode='dense') keeps the matrix"
            )
        return self.attention

    @cached_property
    def outline(self) -> Outline:
        """Where its parts begin and end."""
        return backbone.outline(self.tokens, self.spans.prompt_length)

    @cached_property
    def reasoning_share(self) -> float:
        """Share of the flow that enters the response at a token other than the target.

        The rest jumps from the prompt straight to the answer's tokens, or to those that decide it.
        """
        entered = self.spans.response & ~self.spans.target
        return float(self.backbone.prompt_inflow[entered].sum())

    def hubs(self, count: int = 10, *, within: str = "reasoning") -> tuple[RankedToken, ...]:
        """Tokens with much flow that many later tokens draw on, the strongest first.

        Score: throughput × effective number of outgoing edges, in edges. Ranked are the response's
        tokens before and around the answer where flow does not end, or with `within="all"` every
        token.
        """
        return self._ranked(self.backbone.hubs, count, within)

    def checkpoints(self, count: int = 10, *, within: str = "reasoning") -> tuple[RankedToken, ...]:
        """Tokens with much flow that gather it from many, the strongest first.

        Score: throughput × effective number of incoming edges, in edges. Ranked as in `hubs`.
        """
        return self._ranked(self.backbone.checkpoints, count, within)

    def paths(self, count: int = 5) -> tuple[FlowPath, ...]:
        """The most probable ways from the question to the answer, the likeliest first.

        Raises:
            ValueError: `count` is below 1, or above 10 and the trace was streamed.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count!r}")
        return (self.backbone if count <= KEPT_PATHS else self._backbone(count)).paths[:count]

    def steps(self) -> StepGraph:
        """Lines or sentences, and the flow between them."""
        return backbone.step_graph(
            self.backbone, self.tokens, self.outline.bounds, self.spans.regions
        )

    def river(self) -> River:
        """The flow across about a hundred cuts of the text, by where it comes from."""
        return river(self.backbone, self.spans.prompt_length)

    def _ranked(
        self, scores: Float[np.ndarray, " token"], count: int, within: str
    ) -> tuple[RankedToken, ...]:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count!r}")
        if within not in ("reasoning", "all"):
            raise ValueError(f"within must be 'reasoning' or 'all', got {within!r}")
        regions = self.spans.regions
        reasoning = (np.array(regions) == "response") & ~self.spans.target
        eligible = (scores > 0) & ((within == "all") | reasoning)
        order = np.argsort(-scores, kind="stable")
        return tuple(
            RankedToken(
                index=index,
                text=self.tokens[index],
                region=regions[index],
                throughput=float(self.throughput[index]),
                score=float(scores[index]),
            )
            for index in order[eligible[order]][:count].tolist()
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self.tokens)} tokens, answer {self.spans.answer_text!r} "
            f"by {self.spans.rule!r}, layers {list(self.layers)} of {self.model})"
        )
