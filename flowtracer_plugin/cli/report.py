"""`flowtracer report`: what saved traces show."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowtracer_plugin.cli.loading import waiting
from flowtracer_plugin.cli.options import OutputOptions, Traceback, flattened
from flowtracer_plugin.cli.outputs import deliver, show
from flowtracer_plugin.cli.parsing import check_separate, writable

if TYPE_CHECKING:
    from flowtracer_plugin.trace.flow_trace import FlowTrace

TraceFiles = Annotated[list[Path], typer.Argument(metavar="FILE", help="Traces saved with --save.")]


@flattened
def report(files: TraceFiles, outputs: OutputOptions, traceback: Traceback = False) -> None:
    """Show saved traces, and write a page beside each, or the files that the options name.

    For example:

    flowtracer report apples.flow --html apples.html
    """
    from rich.rule import Rule
    from rich.text import Text

    from flowtracer_plugin.text.visible import visible

    asked = outputs != OutputOptions()
    if asked and len(files) > 1:
        raise typer.BadParameter(
            f"--json and the names of files are for one trace, found {len(files)}; without them "
            "each trace gets a page beside its file"
        )
    pages = outputs.files if asked else [writable(page_beside(file)) for file in files]
    check_separate(pages, files)
    for file in files:
        if len(files) > 1:
            show(Rule(Text(visible(str(file)))))
        deliver(load_trace(file), outputs if asked else OutputOptions(html=page_beside(file)))


def load_trace(file: Path) -> FlowTrace:
    """A saved trace."""
    import flowtracer_plugin as ft

    with waiting(f"loading {file}"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trace = ft.load(file)
    for one in said:
        typer.echo(f"note: {one.message}", err=True)
    return trace


def page_beside(file: Path) -> Path:
    """The page `x.html` of `x.flow`; other files keep their whole name, so none is overwritten."""
    return file.with_name(f"{file.stem if file.suffix == '.flow' else file.name}.html")
