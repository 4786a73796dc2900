"""`benchmarks/README.md`, made of the results: what came out, and which targets were reached."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import harness
from benchmarks.harness import Target

PAGE = Path(__file__).with_name("README.md")

Row = Mapping[str, Any]
Report = Mapping[str, Any]

_HEAD = """\
# Benchmarks

This page is made from what was measured, in `benchmarks/results/`; `python -m benchmarks --tables`
makes it anew.

**How it is measured.** Ways of doing one thing, side by side, on one thread. Seconds: all ways in
one process, in turn, so that what else the machine does hits all of them; the median of the rounds
after a run to warm up. Memory: each way in a process of its own, how far its second run rises above
what the process held before, on the GPU if it uses one; so weights and inputs are not in it.
Seconds belong to one machine. The ratios within one run are what targets are about, and a target
that is missed is shown as missed.

**To measure again**, on Linux, with nothing else running:

```bash
make bench                    # all of them, in two hours
make bench ONLY="flow_stage"  # one of them
```

`flashtrace` and `grpo_step` run SmolLM2-135M-Instruct, from the folder that `FLOWTRACER_MODELS`
names.

A cell holds seconds and megabytes (2^20 bytes). Columns with a colon are the ratios of both, ours
to the other: below 1 is better. Where a cell is empty, a way was left out, as is said above the
table; a dash would compare with less than a megabyte.
"""

_ELSEWHERE = """\

## Elsewhere

Results of other runs, which are told where they belong:

"""

_PROFILE = """\

## Where the time goes

Profiles (torch's and Python's, one thread) of the paths above, and what they led to:

- `trace`, 2,048 tokens: 90 % is the model's own forward pass (linear layers 55 %, its attention
  27 %), 10 % the head mean, 0.4 % the flow, 1 % the text. The head mean took half as long again
  when it masked whole blocks instead of the square on the diagonal, and copied them twice.
- flow stage, 8,192 tokens: nearly all was copies of the matrix (lower triangle, negation, masks of
  the checks). Now only squares of 256 tokens are copied; 22 of 37 ms look at every number once.
- `streamed`, 8,192 tokens: forward pass 39 %, attention rows twice 35 %, edges 13 %, paths 12 %,
  text 1 %. Block sizes from 64 to 512 make no difference, so that memory decides: 64 rows of
  attention at a time, 256 rows of the flow.
- credit in a step of the reasoner: half was decoding token by token to find answers; names now
  spell most texts at once. The other half is the head mean, with masks for padding.
- a batch of rollouts: 76 % linear layers, which take the same time however rows are put together.
  What is ours is 6 %. Columns in which all rows of a batch are padding are no longer run.
"""


def write_tables(names: Sequence[str]) -> None:
    """Write the page and the plots."""
    from benchmarks import plots

    for name in names:
        report, module = read(name), module_of(name)
        if report is not None and hasattr(module, "plots"):
            for title, figure in module.plots(report).items():
                plots.write(figure, title)
    PAGE.write_text(page(names), encoding="utf-8")


def module_of(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


def read(name: str) -> Report | None:
    """What was measured, if it was."""
    path = harness.RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def page(names: Sequence[str]) -> str:
    """The page as Markdown."""
    sections = [section(module_of(name), read(name)) for name in names]
    return _HEAD + "".join(sections) + _PROFILE + elsewhere(names)


def section(module: ModuleType, report: Report | None) -> str:
    """One benchmark: its question, how it was asked, and what came out."""
    name = module.__name__.rpartition(".")[2]
    _, _, setting = (module.__doc__ or "").partition("\n")
    parts = [f"## {name}", f"**{module.QUESTION}**", setting.strip()]
    if report is None:
        return _paragraphs([*parts, "Not measured yet."])
    remarks = module.remarks(report["rows"]) if hasattr(module, "remarks") else []
    figures = module.plots(report) if hasattr(module, "plots") else {}
    return _paragraphs(
        [
            *parts,
            table(report),
            _list(verdict(target, report) for target in module.TARGETS),
            _list(remarks),
            _list(notes(report)),
            *(f"![{title}](plots/{title}.svg)" for title in figures),
            origin(report),
        ]
    )


def table(report: Report) -> str:
    """A row per case: every way, then ours to each other way."""
    rows, ours = report["rows"], report["ours"]
    varied = list(rows[0]["case"])
    ways = list(dict.fromkeys(way for row in rows for way in row["seconds"]))
    others = [way for way in ways if way != ours]
    head = [*varied, *ways, *(f"{ours} : {other}" for other in others)]
    lines = [head, ["--:"] * len(head)]
    for row in rows:
        case = [f"{row['case'][name]}" for name in varied]
        lines.append([*case, *(_cell(row, w) for w in ways), *(_ratios(row, o) for o in others)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: Row, way: str) -> str:
    if way not in row["seconds"]:
        return ""
    return f"{seconds(row['seconds'][way])}, {megabytes(row['peak_mb'][way])}"


def _ratios(row: Row, other: str) -> str:
    if other not in row["seconds"]:
        return ""
    return ", ".join(
        number(row["ratios"][measure][other]) if other in row["ratios"][measure] else "–"
        for measure in ("seconds", "peak_mb")
    )


def notes(report: Report) -> Iterator[str]:
    """What is to be said of single cases, each once with the cases that it is said of."""
    said: dict[str, list[str]] = {}
    for row in report["rows"]:
        case = ", ".join(str(value) for value in row["case"].values())
        for note in row.get("notes", []):
            said.setdefault(note, []).append(case)
    for note, cases in said.items():
        yield f"{'; '.join(cases)}: {note}"


def verdict(target: Target, report: Report) -> str:
    """Whether a target was reached, in the worst of its cases."""
    where = ", ".join(f"{value} {name}" for name, value in (target.where or {}).items())
    found = [
        row["ratios"][target.measure][target.other]
        for row in report["rows"]
        if target.concerns(row["case"]) and target.other in row["ratios"].get(target.measure, {})
    ]
    measure = {"peak_mb": "memory"}.get(target.measure, target.measure)
    subject = f"{report['ours']} : {target.other}, {measure}" + (f", {where}" if where else "")
    promised = f"{subject}: target ≤ {number(target.ratio)}"
    if not found:
        return f"{promised}: not measured"
    worst = max(found)
    reached = "reached" if worst <= target.ratio else "**not reached**:"
    return f"{promised}: {reached} {number(worst)}"


def origin(report: Report) -> str:
    """Where the figures come from."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    rounds = f", median of {report['rounds']}" if "rounds" in report else ""
    return (
        f"`{report['command']}`{rounds}, on {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gb']} GB, {machine['gpu'] or 'no GPU'}; {machine['system']}; {versions}."
    )


def elsewhere(names: Sequence[str]) -> str:
    """What lies among the results and is no benchmark of the harness: named, not tabulated."""
    paths = [path for path in sorted(harness.RESULTS.glob("*.json")) if path.stem not in names]
    lines = [
        f"{json.loads(path.read_text(encoding='utf-8'))['question']}: "
        f"[{path.name}](results/{path.name})"
        for path in paths
    ]
    return _ELSEWHERE + _list(lines) + "\n" if lines else ""


def seconds(value: float) -> str:
    """With its unit, to two or three digits."""
    if value >= 1:
        return f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"
    return f"{number(1000 * value)} ms"


def megabytes(value: float) -> str:
    return f"{value:.0f} MB" if value >= 10 else f"{value:.1f} MB"


def number(value: float) -> str:
    """Three digits from 10 on, two below: 123, 12.3, 1.2, 0.21, 0.010."""
    if value >= 10:
        return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
    return f"{value:#.2g}".rstrip(".")


def _list(items: Iterator[str] | Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _paragraphs(parts: Sequence[str]) -> str:
    return "".join(f"\n{part}\n" for part in parts if part)
