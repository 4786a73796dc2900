"""The result of a trace as plain data: which tokens carried one answer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from flowtracer_plugin.flow import backbone
from flowtracer_plugin.flow.backbone import KEPT_PATHS, Backbone, FlowPath, Outline, StepGraph
from flowtracer_plugin.flow.river import River, river
from flowtracer_plugin.flow.solve import Flow, solve_flow
from flowtracer_plugin.flow.streamed import stream_stored
from flowtracer_plugin.options import FlowOptions
from flowtracer_plugin.result.attention_map import AttentionMap, OnDemand, where_it_is
from flowtracer_plugin.result.standouts import AUTO, is_mark, standing_out
from flowtracer_plugin.text.spans import Region, Spans
from flowtracer_plugin.text.visible import shown_on_stdout


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedToken:
    """A token that stands out.

    Attributes:
        index: Its position in the trace.
        text: Its decoded text.
        region: The part of the text that it lies in.
        throughput: The flow through it, a share of the unit that flows to the answer.
        score: The score by which it was ranked; see `FlowTrace.hubs` and `FlowTrace.checkpoints`.
    """

    index: int
    text: str
    region: Region
    throughput: float
    score: float


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceData:
    """The flow to one answer, token by token.

    Attributes:
        token_ids: The ids of prompt and response, as the model received them.
        tokens: The decoded text of each token; joined, they are `text`. It is empty for a token in
            the middle of a character that several tokens spell.
        spans: Question, response and answer.
        attention: The mean over the heads of the selected layers, as `options` say; rows are
            queries. None for a streamed trace, which has no matrix of all pairs of tokens. If the
            trace was made on an accelerator, it is copied from there when it is first read, or when
            the next trace is made.
        reach: The influence of each token on the answer, `h`.
        throughput: The share `f` of the unit of flow that passes through each token.
        model: The name of the model.
        options: The options with which the trace was made.
        layers: The numbers of the layers that were averaged.
        heads: The layer and the number of each averaged head; empty if all heads were averaged.
        streamed: The strongest edges of a streamed trace; see `backbone`.
        chosen: The fifth of the response that the answer hangs on most, in the order in which the
            tokens were chosen and hidden, with `edges="causal"`; else empty.
    """

    token_ids: Int[np.ndarray, " token"]
    tokens: tuple[str, ...]
    spans: Spans
    if TYPE_CHECKING:
        attention: Float[np.ndarray, "query key"] | None
    else:
        attention: Float[np.ndarray, "query key"] | AttentionMap | None = OnDemand()
    reach: Float[np.ndarray, " token"]
    throughput: Float[np.ndarray, " token"]
    model: str
    options: FlowOptions
    layers: tuple[int, ...]
    heads: tuple[tuple[int, int], ...] = ()
    streamed: Backbone | None = None
    chosen: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """The text of prompt and response."""
        return "".join(self.tokens)

    @property
    def question_text(self) -> str:
        """The text of the question, each of its parts on lines of its own.

        Flow is not injected at a first token, where attention sinks, but its word is shown.
        """
        asked = self.spans.question.copy()
        asked[:1] |= asked[1:2] & (not is_mark(self.tokens[0]))
        edges = np.flatnonzero(np.diff(asked, prepend=False, append=False))
        parts = ("".join(self.tokens[first:stop]) for first, stop in edges.reshape(-1, 2))
        return "\n".join(part.strip() for part in parts)

    @cached_property
    def flow(self) -> Flow:
        """The solved flow with all of its edges.

        Raises:
            ValueError: The trace was streamed.
        """
        return solve_flow(
            self._matrix("all of its edges"),
            self.spans.question,
            self.spans.target,
            **self.options.solving,
        )

    @cached_property
    def backbone(self) -> Backbone:
        """Hubs, checkpoints, likely paths, steps, and the strongest edges of each token."""
        return self.streamed or self._backbone(KEPT_PATHS)

    def _backbone(self, paths: int) -> Backbone:
        stored = where_it_is(self)
        return stream_stored(
            self._matrix(f"more than {KEPT_PATHS} paths") if stored is None else stored,
            self.spans.question,
            self.spans.target,
            self.outline,
            **self.options.solving,
            paths=paths,
        )

    def _matrix(self, wanted: str) -> Float[np.ndarray, "query key"]:
        if self.attention is None:
            raise ValueError(
                f"this trace was streamed and does not have {wanted}: there was no matrix of all "
                "pairs of its tokens. trace.backbone holds the strongest edges; "
                "wrap(..., mode='dense') keeps the matrix"
            )
        return self.attention

    @cached_property
    def outline(self) -> Outline:
        """The bounds of the prompt and of the steps."""
        return backbone.outline(self.tokens, self.spans.prompt_length)

    @cached_property
    def reasoning_share(self) -> float:
        """The share of the flow that enters or begins in the response outside the target's tokens.

        The rest jumps straight from the prompt to the tokens of the target.
        """
        entered = self.spans.response & ~self.spans.target
        found = self.backbone
        return float((found.prompt_inflow + found.source)[entered].sum())

    def hubs(
        self, count: int = 10, *, within: str = "reasoning", skip: str = AUTO
    ) -> tuple[RankedToken, ...]:
        """Tokens with much flow that many later tokens draw on, the strongest first.

        The score is throughput × effective number of outgoing edges, in edges. A hub has more than
        its even share: its score is above the mean score of the tokens that are ranked, so there
        may be fewer than `count`.

        Args:
            count: The most hubs to return.
            within: `"reasoning"` ranks the tokens of the response outside answer and target,
                `"all"` all tokens.
            skip: Tokens that are not ranked: `"blank"` (nothing but spaces and line breaks),
                `"template"` (marks such as `<|im_end|>`, and prompt tokens outside the question),
                `"format"` (marks such as `**` and `##`), or several with commas between. `""` ranks
                them all; `"auto"` only those through which more flow passes than through any
                other token, since they are what the trace has found.

        Raises:
            ValueError: `count` is below 1, or `within` or `skip` is not among the choices.
        """
        return self._ranked(self.backbone.hubs, count, within, skip)

    def checkpoints(
        self, count: int = 10, *, within: str = "reasoning", skip: str = AUTO
    ) -> tuple[RankedToken, ...]:
        """Tokens with much flow that gather it from many earlier tokens, the strongest first.

        The score is throughput × effective number of incoming edges, in edges. Otherwise as `hubs`.

        Raises:
            ValueError: As `hubs`.
        """
        return self._ranked(self.backbone.checkpoints, count, within, skip)

    def paths(self, count: int = 5) -> tuple[FlowPath, ...]:
        """The most probable paths to the answer, the likeliest first.

        Raises:
            ValueError: `count` is below 1, or above 10 and the trace was streamed.
        """
        _check_count(count)
        return (self.backbone if count <= KEPT_PATHS else self._backbone(count)).paths[:count]

    def steps(self) -> StepGraph:
        """The lines or sentences, and the flow between them."""
        return backbone.step_graph(
            self.backbone, self.tokens, self.outline.bounds, self.spans.regions
        )

    def river(self) -> River:
        """The flow across about a hundred cuts of the text, by its origin."""
        return river(self.backbone, self.spans.prompt_length)

    def _ranked(
        self, scores: Float[np.ndarray, " token"], count: int, within: str, skip: str
    ) -> tuple[RankedToken, ...]:
        _check_count(count)
        regions = self.spans.regions
        order = standing_out(
            scores, self.throughput, self.tokens, self.spans, within=within, skip=skip
        )
        return tuple(
            RankedToken(
                index=index,
                text=self.tokens[index],
                region=regions[index],
                throughput=float(self.throughput[index]),
                score=float(scores[index]),
            )
            for index in order[:count].tolist()
        )

    def __str__(self) -> str:
        """The same as `repr`, in characters that standard output can show."""
        return shown_on_stdout(repr(self))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self.tokens)} tokens, answer {self.spans.answer_text!r} "
            f"by {self.spans.rule!r}, layers {list(self.layers)} of {self.model})"
        )


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count!r}")
