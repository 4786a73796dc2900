"""`flowtracer adapters`: which adapters are installed, and does one read a model correctly?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from flowtracer_plugin.cli.loading import load_fitting, named_adapter
from flowtracer_plugin.cli.options import (
    Adapter,
    AsJson,
    Backend,
    ModelArgument,
    ReadingOptions,
    Traceback,
    flattened,
)
from flowtracer_plugin.cli.outputs import print_document, print_table

if TYPE_CHECKING:
    from flowtracer_plugin.attention.adapter import AdapterEntry
    from flowtracer_plugin.reading.diagnosis import Diagnosis, SiteFinding
    from flowtracer_plugin.reading.reader import AttentionReader


class _ListFirst(TyperGroup):
    """A group whose default command is `list`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        command = args and (not args[0].startswith("-") or args[0] == "--help")
        command = command or ctx.resilient_parsing  # a shell asks for completions
        return super().parse_args(ctx, args if command else ["list", *args])


adapters_app = typer.Typer(
    name="adapters",
    cls=_ListFirst,
    help="List the installed adapters, or check one on a model.\n\n"
    "For example:\n\nflowtracer adapters check Qwen/Qwen3-0.6B",
    pretty_exceptions_enable=False,
)


@adapters_app.command("list")
def list_adapters(json: AsJson = False, traceback: Traceback = False) -> None:
    """List the installed adapters, in the order in which they are tried on a model.

    For example:

    flowtracer adapters list --json
    """
    from flowtracer_plugin.attention.adapter import adapter_entries

    entries = adapter_entries()
    if json:
        print_document([_entry_facts(entry) for entry in entries])
        return
    print_table(
        ("adapter", "from", "entry point", ""),
        [(e.name, e.source, e.entry_point, _standing(e)) for e in entries],
    )
    for entry in entries:
        if entry.skipped:
            typer.echo(f"\n{entry.name} is skipped: {entry.skipped}")


@adapters_app.command()
@flattened
def check(
    model: ModelArgument,
    loading: ReadingOptions,
    adapter: Adapter = None,
    backend: Backend = "nnsight",
    json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Check that an adapter reads a model correctly, layer by layer.

    For example:

    flowtracer adapters check Qwen/Qwen3-0.6B
    """
    chosen = named_adapter(adapter)
    loaded = load_fitting(model, loading, chosen)
    from flowtracer_plugin.reading.diagnosis import diagnose
    from flowtracer_plugin.reading.reader import AttentionReader

    reader = AttentionReader(loaded, chosen, backend=backend)
    diagnosis = diagnose(reader)
    show = _print_check_json if json else _print_check
    show(reader, diagnosis)
    raise typer.Exit(0 if diagnosis.passed else 1)


def _standing(entry: AdapterEntry) -> str:
    if entry.skipped:
        return "skipped"
    return "generic" if entry.adapter and entry.adapter.generic else ""


def _entry_facts(entry: AdapterEntry) -> dict[str, Any]:
    named = {f.name: getattr(entry, f.name) for f in fields(entry) if f.name != "adapter"}
    kinds = ("generic", "interface")
    return named | {kind: bool(getattr(entry.adapter, kind, False)) for kind in kinds}


def _entry_of(reader: AttentionReader) -> AdapterEntry:
    from flowtracer_plugin.attention.adapter import AdapterEntry, adapter_entries

    own = AdapterEntry(name=reader.adapter.name, adapter=reader.adapter)
    return next((e for e in adapter_entries() if e.adapter is reader.adapter), own)


def _model_facts(reader: AttentionReader) -> dict[str, Any]:
    model: Any = reader.model
    return {
        "model": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": model.config._attn_implementation,
        "backend": reader.backend.name,
    }


def _print_check_json(reader: AttentionReader, diagnosis: Diagnosis) -> None:
    print_document(
        _model_facts(reader)
        | {
            "adapter": _entry_facts(_entry_of(reader)),
            "passed": diagnosis.passed,
            "problem": diagnosis.problem,
            "sites": [_site_facts(found) for found in diagnosis.sites],
        }
    )


def _site_facts(found: SiteFinding) -> dict[str, Any]:
    from flowtracer_plugin.reading.diagnosis import ADVICE

    site = {f.name: getattr(found.site, f.name) for f in fields(found.site)}
    numbers = {
        name: getattr(found.report, name, None)
        for name in ("heads", "groups", "difference", "tolerance", "row_sum", "ahead", "padding")
    }
    # JSON has no infinity and no NaN.
    finite = {
        name: value if value is None or math.isfinite(value) else str(value)
        for name, value in numbers.items()
    }
    words = {name: getattr(found, name) for name in ("verdict", "problem", "call")}
    return site | finite | words | {"look_at": ADVICE.get(found.verdict)}


def _print_check(reader: AttentionReader, diagnosis: Diagnosis) -> None:
    facts, entry = _model_facts(reader), _entry_of(reader)
    offered = f" ({entry.entry_point})" if entry.entry_point else ""
    typer.echo(f"model    {facts['model']}, {facts['dtype']}, {facts['attn_implementation']}")
    typer.echo(f"adapter  {entry.name} from {entry.source}{offered}")
    typer.echo(f"backend  {facts['backend']}\n")
    numbers = ("heads", "differs", "allowed", "row sum", "ahead")
    heads = ("layer", "module", "function", *numbers, "verdict")
    print_table(heads, map(_row, diagnosis.sites))
    typer.echo()
    for line in _findings(diagnosis):
        typer.echo(line)


def _row(found: SiteFinding) -> tuple[str, ...]:
    site, report = found.site, found.report
    visit = f" #{site.visit}" if site.visit else ""
    named = (str(site.layer), site.module + visit, site.function)
    if report is None:
        return (*named, "", "", "", "", "", found.verdict)
    groups = f"/{report.groups}" if report.groups not in {0, report.heads} else ""
    return (
        *named,
        f"{report.heads}{groups}",
        f"{report.difference:.0e}",
        f"{report.tolerance:.0e}",
        f"{report.row_sum:.2f}",
        f"{report.ahead:.0%}",
        found.verdict,
    )


def _findings(diagnosis: Diagnosis) -> Iterable[str]:
    """The lines that name each kind of problem once, and where to look."""
    from flowtracer_plugin.reading.diagnosis import ADVICE

    for verdict, advice in ADVICE.items():
        of_it = [found for found in diagnosis.sites if found.verdict == verdict]
        if not of_it:
            continue
        more = f" (and {len(of_it) - 1} more)" if len(of_it) > 1 else ""
        yield f"{verdict}: {of_it[0].problem}{more}"
        if of_it[0].call:
            yield f"  the call: {of_it[0].call}"
        yield f"  look at {advice}".replace("`", "")
    if diagnosis.problem:
        yield f"the run as a whole: {diagnosis.problem}"
    good = sum(found.verdict == "ok" for found in diagnosis.sites)
    yield f"{good} of {len(diagnosis.sites)} sites pass"
