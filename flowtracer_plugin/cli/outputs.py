"""The output of results: to files, then to the terminal or into one JSON document."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal

import typer

from flowtracer_plugin.cli.loading import waiting
from flowtracer_plugin.cli.options import OutputOptions

if TYPE_CHECKING:
    from rich.table import Table

    from flowtracer_plugin.result.token_heads import TokenHeads
    from flowtracer_plugin.trace.flow_trace import FlowTrace


def deliver(
    trace: FlowTrace,
    outputs: OutputOptions,
    scores: Mapping[str, Any] | None = None,
    drops: Mapping[int, float] | None = None,
    heads: TokenHeads | None = None,
) -> None:
    """Write the files of a trace, then show it.

    `scores` are for the page, `drops` of knocked out tokens and `heads` for the page and the
    terminal.
    """
    # Files first, and the trace before all others: what was computed must not be lost to a full
    # disk, a missing extra, or a closed standard output.
    given: dict[str, dict[str, Any]] = {"figure": {"kind": outputs.figure_kind}}
    if scores or drops or heads is not None:
        given["html"] = {"scores": scores, "drops": drops, "heads": heads}
    for name in ("save", "html", "parquet", "graphml", "figure"):
        path = vars(outputs).get(name)  # nnsight adds an attribute "save" to every object
        if path is not None:
            write = getattr(trace, name if name == "save" else f"to_{name}")
            write_file(partial(write, **given.get(name, {})), path)
    if outputs.json:
        print_document(trace.to_dict())
    else:
        from flowtracer_plugin.report.terminal import render_trace

        show(render_trace(trace, drops, heads))


def write_file(write: Callable[[Path], object], path: Path) -> None:
    """Write one file, and name it on stderr.

    Raises:
        OSError: The file cannot be written; the message names it and says what to do.
    """
    try:
        with waiting(f"writing {path}"):
            write(path)
    except OSError as error:
        raise OSError(
            f"cannot write {str(path)!r}: {error.strerror or error}; name a file in a folder that "
            "you may write to, with room left on its disk"
        ) from error
    typer.echo(f"wrote {path}", err=True)


@contextmanager
def saying_what_is_kept(output: Path | None, kept: Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C, say on stderr what is `kept` in the file, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if output is None:
            said = "nothing is kept; with --output, the same command goes on where it stopped"
        else:
            said = f"{kept()} kept in {output}; the same command goes on from there"
        typer.echo(f"\nstopped: {said}", err=True)
        raise


def print_document(document: Any) -> None:
    """Print one JSON document on one line, in UTF-8 whatever the encoding of the terminal."""
    import json

    text = json.dumps(document, ensure_ascii=False, allow_nan=False)
    # Half a surrogate pair, as in an undecodable file name, can only be written as an escape.
    typer.echo(text.encode(errors="backslashreplace"))


def show(renderable: Any) -> None:
    """Show something in the terminal."""
    from rich.console import Console

    Console().print(renderable)


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str | None]]) -> None:
    """Print a table no wider than the terminal; without one, as wide as its longest line."""
    from rich.console import Console

    kept, cells = list(heads), [[cell or "" for cell in row] for row in rows]
    console = Console(width=None if sys.stdout.isatty() else 10_000)
    if Console(width=10_000).measure(_table(kept, cells)).maximum > console.width:
        kept, cells = _constants_above(kept, cells)
    with console.capture() as captured:
        console.print(_table(kept, cells))
    for line in captured.get().splitlines():
        typer.echo(line.rstrip())


Cell = str | tuple[str, str]
"""The text of a cell, or a text with its uncertainty and one without."""


def print_results(
    title: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    *,
    numbers: Literal["left", "right"] = "left",
    spare: Sequence[str] = (),
) -> None:
    """Print a table with a title, a first column of names, and columns of numbers.

    Of a table that is too wide for the terminal, the `spare` columns lose their uncertainty, then
    names get a line for each of their parts, then the spare columns are left out, in their order.
    A last line says so. What is still too long is folded, never cut.
    """
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 10_000)
    for view in _views(heads, [*rows], spare):
        table = view.table(title, numbers)
        if Console(width=10_000).measure(table).maximum <= console.width:
            break
    console.print()
    console.print(table)
    if view.lacks:
        console.print(view.lacks, style="dim", highlight=False)


@dataclass(frozen=True, kw_only=True)
class _View:
    """A table of results, or what is left of it in a narrow terminal."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    lacks: str = ""

    def table(self, title: str, numbers: Literal["left", "right"]) -> Table:
        from rich.table import Table

        table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for place, head in enumerate(self.heads):
            table.add_column(head, justify=numbers if place else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row, style="dim" if row[0] == "uniform" else None)
        return table


def _views(
    heads: Sequence[str], rows: Sequence[Sequence[Cell]], spare: Sequence[str]
) -> Iterator[_View]:
    """The whole table, then less and less of it."""
    spare = [head for head in spare if head in heads]
    yield _view(heads, rows)
    yield _view(heads, rows, short=spare)
    for count in range(len(spare) + 1):
        yield _view(heads, rows, short=spare, gone=spare[:count], folded=True)
    yield _view(heads, rows, short=heads, gone=spare, folded=True)


def _view(
    heads: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    short: Sequence[str] = (),
    gone: Sequence[str] = (),
    folded: bool = False,
) -> _View:
    def shown(head: str, cell: Cell) -> str:
        return cell if isinstance(cell, str) else cell[head in short]

    kept = [head not in gone for head in heads]
    texts = [list(compress(map(shown, heads, row), kept)) for row in rows]
    names = ["\n".join(_parts(name)) for name, *_ in texts]
    widest = max((len(part) for name in names for part in name.splitlines()), default=0)
    for row, name in zip(texts if folded else (), names, strict=False):
        row[0] = name if len(row[0]) > widest else row[0]
    places = [n for n, head in enumerate(heads) if head in short and head not in gone]
    cut = [heads[n] for n in places if any(isinstance(row[n], tuple) for row in rows)]
    lacks = [f"the columns {', '.join(gone)}"] if gone else []
    lacks += [f"the uncertainty of {', '.join(cut)}"] if cut else []
    return _View(
        heads=list(compress(heads, kept)),
        rows=texts,
        lacks=f"a wider terminal and --json also show {' and '.join(lacks)}" if lacks else "",
    )


def _parts(name: str) -> Iterator[str]:
    """The lines of a name: `package.module:` and `function`, none longer than 20 characters."""
    module, colon, function = name.rpartition(":")
    for part in (module + colon, function):
        yield from wrap(part, 20)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        style = "" if row[-1] in {"ok", "right", "generic", ""} else "red"
        table.add_row(*map(Text, row), style=style)
    return table


def _constants_above(heads: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The columns that vary; what all rows share is printed once, above the table."""
    varied = [
        len({row[n] for row in rows}) > 1 or n in {0, len(heads) - 1} for n in range(len(heads))
    ]
    same = [f"{head} {rows[0][n]}" for n, head in enumerate(heads) if not varied[n]]
    if same:
        typer.echo(f"everywhere: {', '.join(same)}")
    return list(compress(heads, varied)), [list(compress(row, varied)) for row in rows]
