"""`flowtracer report` and `compare`: what saved traces show."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowtracer_plugin.cli.loading import waiting
from flowtracer_plugin.cli.options import AsJson, OutputOptions, PageFile, Traceback, flattened
from flowtracer_plugin.cli.outputs import deliver, print_document, print_table, show, write_file
from flowtracer_plugin.cli.parsing import check_separate, writable

if TYPE_CHECKING:
    from flowtracer_plugin.comparison.traces import ComparedTrace
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


@flattened
def compare(
    files: TraceFiles,
    label: Annotated[
        list[str] | None,
        typer.Option(help="Label of a trace; once for each file, in order."),
    ] = None,
    right: Annotated[
        str | None,
        typer.Option(help="The right answer; traces with any other answer are wrong."),
    ] = None,
    html: PageFile = None,
    json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Compare saved traces, such as right and wrong answers to one question, on one page.

    For example:

    flowtracer compare first.flow second.flow --right 14 --html comparison.html
    """
    _check_files(files, label)
    page = html or (None if json else writable(Path("comparison.html")))
    check_separate([page], files)
    traces = [load_trace(file) for file in files]
    from flowtracer_plugin.comparison.traces import compare as compare_traces
    from flowtracer_plugin.report.pages.comparison_page import write_comparison

    wanted = None if right is None else right.strip()
    truths = None if wanted is None else [trace.spans.answer_text == wanted for trace in traces]
    labels = label or _labels(files)
    if page:
        write_file(lambda path: write_comparison(traces, path, labels=labels, right=truths), page)
    compared = compare_traces(traces, labels=labels, right=truths)
    if json:
        print_document(compared.to_dict())
    else:
        print_table(("trace", "answer", "through the reasoning", ""), map(_row, compared.traces))


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


def _check_files(files: list[Path], label: list[str] | None) -> None:
    if len(files) < 2:
        raise typer.BadParameter(f"wanted two or more files to compare, found {len(files)}")
    if label and len(label) != len(files):
        raise typer.BadParameter(
            f"wanted --label once for each of the {len(files)} files, found it {len(label)} times"
        )


def _labels(files: list[Path]) -> list[str]:
    """The names of the files, or their paths if two have the same name."""
    stems = [file.stem for file in files]
    return stems if len(set(stems)) == len(files) else [str(file) for file in files]


def _row(trace: ComparedTrace) -> tuple[str, ...]:
    from flowtracer_plugin.report.display import percent
    from flowtracer_plugin.text.visible import visible

    standing = {None: "", True: "right", False: "wrong"}[trace.right]
    return trace.label, visible(trace.answer), percent(trace.reasoning_share), standing
