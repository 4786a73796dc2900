"""The result: which tokens carried one answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from flowtracer_plugin import backbone
from flowtracer_plugin.backbone import KEPT_PATHS, Backbone, FlowPath, Outline, StepGraph
from flowtracer_plugin.extras import comes_with
from flowtracer_plugin.flow import Flow, solve_flow
from flowtracer_plugin.options import FlowOptions
from flowtracer_plugin.river import River, river
from flowtracer_plugin.spans import Region, Spans

if TYPE_CHECKING:
    import networkx
    from rich.console import RenderableType


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
class FlowTrace:
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
        from flowtracer_plugin.streamed import stream_stored

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

    def save(self, path: str | Path) -> Path:
        """Write the trace to one file, which `flowtracer_plugin.load` reads back exactly."""
        from flowtracer_plugin.storage import save

        return save(self, Path(path))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the attention, as plain values; `json_schema` says what they mean."""
        from flowtracer_plugin.document import document

        return document(self)

    def to_json(self) -> str:
        """`to_dict` as a JSON document."""
        text = json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)
        # Half a surrogate pair, as in an undecodable file name, cannot be written but as an escape.
        return text.encode(errors="backslashreplace").decode()

    def to_html(
        self,
        path: str | Path,
        *,
        drops: Mapping[int, float] | None = None,
        scores: Mapping[str, Float[np.ndarray, " _"]] | None = None,
    ) -> Path:
        """Write one self-contained page and return its path.

        `drops` says by how many nats the answer's log-probability fell when a token was knocked
        out, by the token's number; the page shows it beside the token's throughput. `scores` are
        other numbers of at least 0 for each token, by name, such as
        `token_scores.score_text(tracer, trace, ["attention", "entropy"])`: the page can shade the
        text by these too.

        Raises:
            ValueError: `drops` names a token that the trace does not have, or a score has not one
                such number for each token.
        """
        from flowtracer_plugin.report import write_page

        return write_page(self, Path(path), drops, scores)

    def to_parquet(self, path: str | Path) -> Path:
        """Write a table with one row per token and return its path.

        Its columns are the fields of a token in `json_schema()`; the file's metadata
        "flowtracer.trace" holds the document's other short fields as JSON. Half a surrogate pair
        in a text is U+FFFD.

        Raises:
            ModuleNotFoundError: pyarrow is missing; it comes with the extra `viz`.
        """
        with comes_with("viz", "to_parquet"):
            from flowtracer_plugin.parquet import write_table
        return write_table(self, Path(path))

    def to_networkx(self, *, minimum: float = 0.0) -> networkx.DiGraph[int]:
        """The tokens as nodes and the flow between them as edges, those above `minimum`.

        Nodes have the fields of a token in `json_schema()`, edges have `flow`, and the graph has
        the document's other short fields. Of a streamed trace, the edges are the strongest ones
        of each token.

        Raises:
            ModuleNotFoundError: networkx is missing; it comes with the extra `viz`.
            ValueError: `minimum` is below 0.
        """
        with comes_with("viz", "to_networkx"):
            from flowtracer_plugin.network import token_graph
        return token_graph(self, minimum=minimum)

    def to_graphml(self, path: str | Path, *, minimum: float = 0.0) -> Path:
        """Write the same graph with the strongest edges of each token, and return its path.

        These are the 8 into and the 8 out of each, so that the file grows with the length of the
        text; of them, those above `minimum`. Characters that cannot be seen are spelled out, and
        a token without text is "∅".

        Raises:
            ModuleNotFoundError: networkx is missing; it comes with the extra `viz`.
            ValueError: `minimum` is below 0.
        """
        with comes_with("viz", "to_graphml"):
            from flowtracer_plugin.network import write_graphml
        return write_graphml(self, Path(path), minimum=minimum)

    def to_figure(
        self, path: str | Path, kind: str = "ribbon", *, width: float | None = None
    ) -> Path:
        """Write a figure for a paper, as PNG, SVG or PDF by the suffix of `path`; return the path.

        Args:
            path: Ends in .png, .svg or .pdf. Text stays text in the latter two.
            kind: `"ribbon"`, throughput along the text; `"river"`, the flow across every cut of
                the text by where it comes from; `"steps"`, the strongest flows between lines and
                sentences; or `"overview"`, all three.
            width: In inches; by default 3.3, one column, and of an overview 7, two columns.

        Raises:
            ModuleNotFoundError: matplotlib is missing; it comes with the extra `viz`.
            ValueError: There is no such kind, suffix or width.
        """
        with comes_with("viz", "to_figure"):
            from flowtracer_plugin.report.figures import write_figure
        return write_figure(self, Path(path), kind=kind, width=width)

    def _repr_html_(self) -> str:
        from flowtracer_plugin.report import render_notebook

        return render_notebook(self)

    def __rich__(self) -> RenderableType:
        """What `rich.print(trace)` shows."""
        from flowtracer_plugin.report.terminal import render_trace

        return render_trace(self)

    def __repr__(self) -> str:
        return (
            f"FlowTrace({len(self.tokens)} tokens, answer {self.spans.answer_text!r} "
            f"by {self.spans.rule!r}, layers {list(self.layers)} of {self.model})"
        )
