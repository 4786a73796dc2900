"""`flowtracer compare`: what right and wrong answers do differently."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowtracer_plugin.cli.loading import waiting
from flowtracer_plugin.cli.options import AsJson, PageFile, Traceback, flattened
from flowtracer_plugin.cli.outputs import print_document, print_results, print_table, write_file
from flowtracer_plugin.cli.parsing import check_separate, names, writable
from flowtracer_plugin.cli.report import SUFFIX, load_trace, saved_traces

if TYPE_CHECKING:
    from flowtracer_plugin.comparison.groups import GroupComparison
    from flowtracer_plugin.comparison.traces import ComparedTrace

PAGE = "comparison.html"
ANSWERS = "answers"
"""The folder of the answers' table in a folder that trace-data wrote."""


@dataclass(frozen=True, kw_only=True)
class TraceGroups:
    """Which traces, or which rollouts of a data set, are compared."""

    label: Annotated[
        list[str] | None,
        typer.Option(help="Label of a trace; once for each file, in order."),
    ] = None
    right: Annotated[
        str | None,
        typer.Option(help="The right answer; traces with any other answer are wrong."),
    ] = None
    by: Annotated[
        str | None,
        typer.Option(
            help="For a folder: the column of the answers that tells the groups; by default "
            "correct."
        ),
    ] = None
    groups: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="For a folder: two values of that column, if it has more."
        ),
    ] = None


@flattened
def compare(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...|FOLDER",
            help="Traces saved with --save, a folder of them, or the folder that trace-data wrote.",
        ),
    ],
    chosen: TraceGroups,
    html: PageFile = None,
    json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Compare right and wrong answers on one page: saved traces, or a whole traced data set.

    For example:

    flowtracer compare first.flow second.flow --right 14 --html comparison.html

    flowtracer compare traced/ --by correct
    """
    if len(files) == 1 and not (files[0] / ANSWERS).is_dir() and any(files[0].glob(f"*{SUFFIX}")):
        files = saved_traces(files)
    if len(files) == 1:
        _compare_folder(files[0], chosen, html, as_json=json)
        return
    folders = [file for file in files if file.is_dir()]
    if folders:
        raise typer.BadParameter(
            f"wanted files of traces, or one folder alone, found {len(files)} paths, of which "
            f"{str(folders[0])!r} is a folder"
        )
    if chosen.by is not None or chosen.groups is not None:
        raise typer.BadParameter("--by and --groups are for a folder that trace-data wrote")
    _compare_files(files, chosen, html, as_json=json)


def _compare_files(
    files: list[Path], chosen: TraceGroups, html: Path | None, *, as_json: bool
) -> None:
    label, right = chosen.label, chosen.right
    if label and len(label) != len(files):
        raise typer.BadParameter(
            f"wanted --label once for each of the {len(files)} files, found it {len(label)} times"
        )
    page = html or (None if as_json else writable(Path(PAGE)))
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
    if as_json:
        print_document(compared.to_dict())
    else:
        print_table(("trace", "answer", "through the reasoning", ""), map(_row, compared.traces))


def _compare_folder(folder: Path, chosen: TraceGroups, html: Path | None, *, as_json: bool) -> None:
    if not folder.is_dir():
        found = "is one file" if folder.exists() else "is not there"
        raise typer.BadParameter(
            "wanted two or more files of traces, or a folder that trace-data wrote; "
            f"{str(folder)!r} {found}"
        )
    if chosen.label or chosen.right is not None:
        raise typer.BadParameter(
            "--label and --right are for files of traces; a folder has its column correct, and "
            "--by names another"
        )
    groups = _pair(chosen.groups)
    page = html or (None if as_json else writable(folder / PAGE))
    with waiting("importing pyarrow"):
        from flowtracer_plugin.bulk.compared import compare_results
        from flowtracer_plugin.report.pages.groups_page import write_group_comparison
    with waiting(f"comparing the rollouts in {folder}"):
        compared = compare_results(folder, chosen.by or "correct", groups=groups)
    if page:
        write_file(lambda path: write_group_comparison(compared, path), page)
    if compared.done < compared.total:
        typer.echo(
            f"note: {compared.done} of {compared.total} rows are traced so far; rerun trace-data "
            "to trace the others",
            err=True,
        )
    if as_json:
        print_document(compared.to_dict())
    else:
        _print_groups(compared)


def _pair(groups: str | None) -> tuple[str, str] | None:
    if groups is None:
        return None
    found = names(groups)
    if len(found) != 2:
        raise typer.BadParameter(
            f"wanted two values such as a,b, found {groups!r}", param_hint="--groups"
        )
    return found[0], found[1]


def _print_groups(compared: GroupComparison) -> None:
    from flowtracer_plugin.report.pages.groups_page import measure_lines
    from flowtracer_plugin.text.visible import visible

    first, second = map(visible, compared.names)
    sizes = compared.sizes
    left_out = [f"{count} {reason}" for reason, count in compared.left_out.items() if count]
    beside = f" ({', '.join(left_out)})" if left_out else ""
    title = f"{sizes[0]} {first} against {sizes[1]} {second}{beside}"
    heads = ("measure", first, second, "difference", "in SD", "p", "p (corrected)")
    print_results(title, heads, map(_cells, measure_lines(compared)), numbers="right")


def _cells(line: Any) -> tuple[str, ...]:
    from flowtracer_plugin.report.display import p_value, signed

    p = ("–", "–") if line.p is None else (p_value(line.p[0]), p_value(line.p[1]))
    return (
        line.title,
        line.first[1],
        line.second[1],
        line.difference[1],
        signed(round(line.effect, 2)),
        *p,
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
