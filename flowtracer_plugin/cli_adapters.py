"""`flowtracer adapters`: which adapters there are, and whether one reads a model rightly."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import compress
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from flowtracer_plugin.cli_loading import Device, Precision, Traceback, load_model

if TYPE_CHECKING:
    from rich.table import Table

    from flowtracer_plugin.attention import AdapterEntry
    from flowtracer_plugin.diagnosis import Diagnosis, SiteFinding
    from flowtracer_plugin.reader import AttentionReader


class _ListFirst(TyperGroup):
    """Without a command, the adapters are listed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        command = args and (not args[0].startswith("-") or args[0] == "--help")
        return super().parse_args(ctx, args if command else ["list", *args])


adapters_app = typer.Typer(
    name="adapters",
    cls=_ListFirst,
    help="List the adapters that are installed, or check one on a model.",
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print the same as JSON.")]
Implementation = Annotated[
    str | None, typer.Option(help="Load the model with this: sdpa, eager, flash_attention_2, …")
]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the model code that its files bring along.")
]


@adapters_app.command("list")
def list_adapters(json: AsJson = False, traceback: Traceback = False) -> None:
    """List the adapters that are installed, in the order in which models are shown to them."""
    from flowtracer_plugin.attention import adapter_entries

    entries = adapter_entries()
    if json:
        _print_json([_entry_facts(entry) for entry in entries])
        return
    _print_table(
        ("adapter", "from", "entry point", ""),
        [(e.name, e.source, e.entry_point, _standing(e)) for e in entries],
    )
    for entry in entries:
        if entry.skipped:
            typer.echo(f"\n{entry.name} is skipped: {entry.skipped}")


@adapters_app.command()
def check(
    model: Annotated[str, typer.Argument(help="Folder of a model, or its id on the hub.")],
    adapter: Annotated[
        str | None, typer.Option(help="Name of an adapter; without it, the one that wrap finds.")
    ] = None,
    backend: Annotated[
        Literal["nnsight", "interface"], typer.Option(help="How the model is read.")
    ] = "nnsight",
    attn_implementation: Implementation = None,
    dtype: Precision = "auto",
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Check that an adapter reads a model rightly, layer by layer.

    For example:

    flowtracer adapters check Qwen/Qwen3-0.6B
    """
    chosen = None if adapter is None else _named(adapter)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    loaded = load_model(model, device, dtype, trust_remote_code=trust_remote_code, **options)
    from flowtracer_plugin.attention import UnsupportedArchitectureError
    from flowtracer_plugin.diagnosis import diagnose
    from flowtracer_plugin.reader import AttentionReader

    if chosen is not None and not chosen.matches(loaded):
        raise UnsupportedArchitectureError(
            f"the adapter {adapter!r} is not for {type(loaded).__name__}: its matches() says no; "
            "leave --adapter out, or mend it"
        )
    reader = AttentionReader(loaded, chosen, backend=backend)
    diagnosis = diagnose(reader)
    show = _print_check_json if json else _print_check
    show(reader, diagnosis)
    raise typer.Exit(0 if diagnosis.passed else 1)


def _named(name: str) -> Any:
    from flowtracer_plugin.attention import adapter_entries

    entries = adapter_entries()
    found = [entry for entry in entries if entry.name == name]
    for entry in found:
        if entry.adapter and not entry.skipped:
            return entry.adapter
    known = ", ".join(entry.name for entry in entries if not entry.skipped)
    raise typer.BadParameter(
        f"{name} is skipped: {found[0].skipped}" if found else f"wanted {known}, found {name!r}",
        param_hint="--adapter",
    )


def _standing(entry: AdapterEntry) -> str:
    if entry.skipped:
        return "skipped"
    return "generic" if entry.adapter and entry.adapter.generic else ""


def _entry_facts(entry: AdapterEntry) -> dict[str, Any]:
    named = {f.name: getattr(entry, f.name) for f in fields(entry) if f.name != "adapter"}
    kinds = ("generic", "interface")
    return named | {kind: bool(getattr(entry.adapter, kind, False)) for kind in kinds}


def _entry_of(reader: AttentionReader) -> AdapterEntry:
    from flowtracer_plugin.attention import AdapterEntry, adapter_entries

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
    _print_json(
        _model_facts(reader)
        | {
            "adapter": _entry_facts(_entry_of(reader)),
            "passed": diagnosis.passed,
            "problem": diagnosis.problem,
            "sites": [_site_facts(found) for found in diagnosis.sites],
        }
    )


def _site_facts(found: SiteFinding) -> dict[str, Any]:
    from flowtracer_plugin.diagnosis import ADVICE

    site = {f.name: getattr(found.site, f.name) for f in fields(found.site)}
    numbers = {
        name: getattr(found.report, name, None)
        for name in ("heads", "groups", "difference", "tolerance", "row_sum", "ahead", "padding")
    }
    # JSON has no word for what is not a number.
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
    heads = (
        "layer",
        "module",
        "function",
        "heads",
        "differs",
        "allowed",
        "row sum",
        "ahead",
        "verdict",
    )
    _print_table(heads, map(_row, diagnosis.sites))
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
    """What is wrong, each kind once, and where to look."""
    from flowtracer_plugin.diagnosis import ADVICE

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


def _print_json(document: Any) -> None:
    import json

    typer.echo(json.dumps(document, indent=2))


def _print_table(heads: Sequence[str], rows: Iterable[Sequence[str | None]]) -> None:
    """A table: in a terminal as wide as that, elsewhere as wide as its longest line."""
    from rich.console import Console

    kept, cells = list(heads), [[cell or "" for cell in row] for row in rows]
    console = Console(width=None if sys.stdout.isatty() else 10_000)
    if Console(width=10_000).measure(_table(kept, cells)).maximum > console.width:
        kept, cells = _constants_above(kept, cells)
    with console.capture() as captured:
        console.print(_table(kept, cells))
    for line in captured.get().splitlines():
        typer.echo(line.rstrip())


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        style = "" if row[-1] in {"ok", "", "generic"} else "red"
        table.add_row(*map(Text, row), style=style)
    return table


def _constants_above(heads: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """What is the same in every row is said once, above a table that is too wide."""
    varied = [
        len({row[n] for row in rows}) > 1 or n in {0, len(heads) - 1} for n in range(len(heads))
    ]
    same = [f"{head} {rows[0][n]}" for n, head in enumerate(heads) if not varied[n]]
    if same:
        typer.echo(f"everywhere: {', '.join(same)}")
    return list(compress(heads, varied)), [list(compress(row, varied)) for row in rows]
