"""`flowtracer report`: what saved traces show."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

import typer

from flowtracer_plugin.cli.loading import waiting
from flowtracer_plugin.cli.mistakes import MISTAKES, sentence
from flowtracer_plugin.cli.options import OutputOptions, Traceback, flattened
from flowtracer_plugin.cli.outputs import deliver, show, write_file
from flowtracer_plugin.cli.parsing import check_separate, writable

if TYPE_CHECKING:
    from flowtracer_plugin.report.pages.rollout_index import RolloutLine
    from flowtracer_plugin.trace.flow_trace import FlowTrace

SUFFIX = ".flow"
"""What the names of traces in a folder end with."""

_BRAND = "traces"
"""What the head of the list says; a file without it is not replaced."""

TraceFiles = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILE|FOLDER", help="Traces saved with --save, or folders of them (*.flow)."
    ),
]
IndexFile = Annotated[
    Path | None,
    typer.Option(
        dir_okay=False,
        callback=writable,
        rich_help_panel="Output",
        help="For several traces: the page that lists them; by default index.html in the folder "
        "that holds them all.",
    ),
]


@flattened
def report(
    files: TraceFiles, outputs: OutputOptions, index: IndexFile = None, traceback: Traceback = False
) -> None:
    """Show saved traces, and write a page beside each, or the files that the options name.

    Several traces, or a folder of them, also get a page that lists them.

    For example:

    flowtracer report apples.flow --html apples.html

    flowtracer report traces/
    """
    found = saved_traces(files)
    asked = outputs != OutputOptions()
    if found == files and len(found) == 1:
        if index is not None:
            raise typer.BadParameter("--index lists several traces, and this is one: leave it out")
        pages = outputs.files if asked else [writable(page_beside(found[0]))]
        check_separate(pages, found)
        deliver(load_trace(found[0]), outputs if asked else OutputOptions(html=pages[0]))
        return
    if asked:
        raise typer.BadParameter(
            f"--json and the names of files are for one trace, found {len(found)}; without them "
            "each trace gets a page beside its file"
        )
    _report_all(found, index or _index_of(found))


def _report_all(files: Sequence[Path], index: Path) -> None:
    """Show each trace and write its page, then the list of all; one bad file costs no other."""
    from rich.rule import Rule
    from rich.text import Text

    from flowtracer_plugin.report.pages.rollout_index import RolloutLine, write_rollout_index
    from flowtracer_plugin.text.visible import visible

    pages = [writable(page_beside(file)) for file in files]
    check_separate([*pages, index], files)
    lines: list[RolloutLine] = []
    models: dict[str, None] = {}
    for number, (file, page) in enumerate(zip(files, pages, strict=True), start=1):
        show(Rule(Text(visible(str(file)))))
        name = os.path.relpath(file, index.parent)
        try:
            trace = load_trace(file)
            deliver(trace, OutputOptions(html=page))
        except MISTAKES as error:
            typer.echo(f"{file}: {sentence(error)}", err=True)
            lines.append(RolloutLine(row=number, id=name, error=sentence(error)))
        else:
            lines.append(_line(number, name, trace, _link(page_beside(file), index.parent)))
            models[trace.model] = None
    title, made = f"Traces in {index.resolve().parent.name}", {"model": ", ".join(models)}
    listed = partial(write_rollout_index, lines=lines, title=title, settings=made, brand=_BRAND)
    write_file(listed, index)
    bad = [line for line in lines if line.error is not None]
    if bad:
        raise ValueError(f"{len(bad)} of {len(files)} files could not be shown, as said above")


def _line(number: int, name: str, trace: FlowTrace, page: str) -> RolloutLine:
    """A trace as the list shows it; of the prompt it has the question."""
    from flowtracer_plugin.bulk.traced_row import TracedRow
    from flowtracer_plugin.report.pages.rollout_index import RolloutLine

    return RolloutLine(
        row=number,
        id=name,
        prompt=trace.question_text,
        answer=trace.spans.answer_text,
        response_tokens=len(trace.tokens) - trace.spans.prompt_length,
        reasoning_share=trace.reasoning_share,
        concentration=TracedRow(row=number, id=name, trace=trace).concentration,
        page=page,
    )


def _link(page: Path, folder: Path) -> str:
    return quote(os.fsencode(Path(os.path.relpath(page, folder)).as_posix()))


def saved_traces(paths: Sequence[Path]) -> list[Path]:
    """The files among the paths, and those of the folders among them by name.

    Raises:
        typer.BadParameter: A folder holds no traces.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
        if not inside:
            deeper = next(iter(sorted(path.rglob(f"*{SUFFIX}"))), None)
            hint = f"; did you mean {str(deeper.parent)!r}?" if deeper else ", which --save writes"
            raise typer.BadParameter(f"there are no files *{SUFFIX} in {str(path)!r}{hint}")
        found += inside
    return list(dict.fromkeys(found))


def _index_of(files: Sequence[Path]) -> Path:
    """`index.html` in the folder that holds all files.

    Raises:
        typer.BadParameter: It cannot be written there, or holds something else.
    """
    folder = Path(os.path.commonpath([file.parent.resolve() for file in files]))
    index = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    index /= "index.html"
    held = index.read_text("utf-8", errors="replace") if index.is_file() else None
    if held is not None and f"FlowTracer · {_BRAND}" not in held:
        raise typer.BadParameter(
            f"{str(index)!r} holds something else than a list of traces, and would be replaced: "
            "name another file with --index"
        )
    writable(index)
    return index


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
    return file.with_name(f"{file.stem if file.suffix == SUFFIX else file.name}.html")
