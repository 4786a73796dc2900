"""`FlowTrace`, the trace that users hold: it saves, shows and exports itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from flowtracer_plugin.extras import comes_with
from flowtracer_plugin.report.pages.trace_page import render_notebook, write_page
from flowtracer_plugin.report.terminal import render_trace
from flowtracer_plugin.result.document import document
from flowtracer_plugin.result.storage import load_trace, save
from flowtracer_plugin.result.token_heads import TokenHeads
from flowtracer_plugin.result.trace_data import RankedToken, TraceData

if TYPE_CHECKING:
    import networkx
    from rich.console import RenderableType

__all__ = ["FlowTrace", "RankedToken", "load"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FlowTrace(TraceData):  # noqa: D101
    __doc__ = TraceData.__doc__

    def save(self, path: str | Path) -> Path:
        """Write the trace to one file that `flowtracer_plugin.load` reads, and return its path."""
        return save(self, Path(path))

    def to_dict(self) -> dict[str, Any]:
        """The trace without its attention as plain values, which `json_schema` describes."""
        return document(self)

    def to_json(self) -> str:
        """The values of `to_dict` as a JSON document."""
        text = json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)
        # Half a surrogate pair, as in an undecodable file name, can only be written as an escape.
        return text.encode(errors="backslashreplace").decode()

    def to_html(
        self,
        path: str | Path,
        *,
        drops: Mapping[int, float] | None = None,
        scores: Mapping[str, Float[np.ndarray, " _"]] | None = None,
        heads: TokenHeads | None = None,
    ) -> Path:
        """Write one self-contained HTML page and return its path.

        Args:
            path: The file to write.
            drops: By token number, the nats by which the answer's log-probability fell when the
                token was knocked out; the page shows them beside the throughput.
            scores: By name, other scores of at least 0 for every token, for example from
                `credit.score_text(tracer, trace, ["attention", "entropy"])`; the page can shade the
                text by them.
            heads: What each head pays into one token, from `tracer.heads(trace, token)`; the page
                shows it as a map of layers and heads.

        Raises:
            ValueError: `drops` or `heads` name a token that the trace does not have, or a score
                does not have one finite number of at least 0 for each token.
        """
        return write_page(self, Path(path), drops, scores, heads)

    def to_parquet(self, path: str | Path) -> Path:
        """Write a Parquet table with one row per token and return its path.

        The columns are the fields of a token in `json_schema()`; the metadata "flowtracer.trace"
        holds the other short fields of the document as JSON. Half a surrogate pair in a text
        becomes U+FFFD.

        Raises:
            ModuleNotFoundError: pyarrow is missing; the extra `viz` installs it.
        """
        with comes_with("viz", "to_parquet"):
            from flowtracer_plugin.result.parquet import write_table
        return write_table(self, Path(path))

    def to_dataframe(self) -> Any:
        """The table of `to_parquet` as a pandas DataFrame.

        Raises:
            ModuleNotFoundError: pyarrow or pandas is missing; the extra `viz` installs them.
        """
        with comes_with("viz", "to_dataframe"):
            from flowtracer_plugin.result.parquet import token_frame

            return token_frame(self)

    def to_networkx(self, *, minimum: float = 0.0) -> networkx.DiGraph[int]:
        """The trace as a graph: tokens are nodes, flows above `minimum` are edges.

        Nodes have the fields of a token in `json_schema()`, edges have `flow`, and the graph has
        the other short fields of the document. A streamed trace has the strongest edges of each
        token only.

        Raises:
            ModuleNotFoundError: networkx is missing; the extra `viz` installs it.
            ValueError: `minimum` is below 0.
        """
        with comes_with("viz", "to_networkx"):
            from flowtracer_plugin.result.network import token_graph
        return token_graph(self, minimum=minimum)

    def to_graphml(self, path: str | Path, *, minimum: float = 0.0) -> Path:
        """Write the graph with the strongest edges of each token as GraphML and return its path.

        For each token these are the 8 edges into it and the 8 out of it above `minimum`, so that
        the file grows linearly with the text. Invisible characters are spelled out, and a token
        without text is "∅".

        Raises:
            ModuleNotFoundError: networkx is missing; the extra `viz` installs it.
            ValueError: `minimum` is below 0.
        """
        with comes_with("viz", "to_graphml"):
            from flowtracer_plugin.result.network import write_graphml
        return write_graphml(self, Path(path), minimum=minimum)

    def to_figure(
        self, path: str | Path, kind: str = "ribbon", *, width: float | None = None
    ) -> Path:
        """Write a figure for a paper and return its path.

        Args:
            path: The file to write, in .png, .svg or .pdf. SVG and PDF keep text as text.
            kind: `"ribbon"`, the throughput along the text; `"river"`, the flow across every cut of
                the text by its origin; `"steps"`, the strongest flows between lines and sentences;
                or `"overview"`, all three.
            width: Width in inches; by default 3.3 (one column), for an overview 7 (two columns).

        Raises:
            ModuleNotFoundError: matplotlib is missing; the extra `viz` installs it.
            ValueError: The kind, suffix or width is not supported.
        """
        with comes_with("viz", "to_figure"):
            from flowtracer_plugin.report.figures.figure import write_figure
        return write_figure(self, Path(path), kind=kind, width=width)

    def _repr_html_(self) -> str:
        return render_notebook(self)

    def __rich__(self) -> RenderableType:
        """The view that `rich.print(trace)` shows."""
        return render_trace(self)


def load(path: str | Path) -> FlowTrace:
    """The trace that `FlowTrace.save` wrote to `path`; every number comes back bit for bit.

    The file's checksum is compared, and every size in it is checked before anything is loaded. A
    file of an earlier version has no checksum, and a `UserWarning` says so.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a trace, is damaged, or was written by a newer version.
    """
    return load_trace(Path(path), FlowTrace)
