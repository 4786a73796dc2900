"""What people hold: a trace that saves, shows and exports itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from flowtracer_plugin.extras import comes_with
from flowtracer_plugin.report.pages.trace_page import render_notebook, write_page
from flowtracer_plugin.report.terminal import render_trace
from flowtracer_plugin.result.document import document
from flowtracer_plugin.result.storage import load_trace, save
from flowtracer_plugin.result.trace_data import RankedToken, TraceData

if TYPE_CHECKING:
    import networkx
    from rich.console import RenderableType

__all__ = ["FlowTrace", "RankedToken", "load"]


class FlowTrace(TraceData):
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

    def save(self, path: str | Path) -> Path:
        """Write the trace to one file, which `flowtracer_plugin.load` reads back exactly."""
        return save(self, Path(path))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the attention, as plain values; `json_schema` says what they mean."""
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
            from flowtracer_plugin.result.parquet import write_table
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
            from flowtracer_plugin.result.network import token_graph
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
            from flowtracer_plugin.result.network import write_graphml
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
            from flowtracer_plugin.report.figures.figure import write_figure
        return write_figure(self, Path(path), kind=kind, width=width)

    def _repr_html_(self) -> str:
        return render_notebook(self)

    def __rich__(self) -> RenderableType:
        """What `rich.print(trace)` shows."""
        return render_trace(self)


def load(path: str | Path) -> FlowTrace:
    """The trace that `FlowTrace.save` wrote to `path`; every number comes back bit for bit.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a trace, is damaged, or was written by a newer version.
    """
    return load_trace(Path(path), FlowTrace)
