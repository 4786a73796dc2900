"""The page `benchmarks/README.md`, made from the results: tables, targets and notes."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from benchmarks import harness
from benchmarks.harness import Report, Row, Target, name_of, question_of

PAGE = Path(__file__).with_name("README.md")

_HEAD = """\
# Benchmarks

`python -m benchmarks --tables` writes this page from the results in `benchmarks/results/`.

**How it is measured.** Several ways to do the same thing run side by side, on one thread. Seconds:
all ways take turns in one process, so that other load hits all of them; the median of the rounds
after a run to warm up. Memory: each way runs in its own process; we count how far its second run
rises above what the process held before, on the GPU if it uses one, so weights and inputs are not
included. Seconds depend on the machine. Targets are about ratios within one run, and a missed
target is shown as missed.

**To measure again**, on Linux, with nothing else running:

```bash
make bench                    # all of them, in two hours
make bench ONLY="flow_stage"  # one of them
```

`data_sets`, `flashtrace` and `grpo_step` run SmolLM2-135M-Instruct, from the folder that
`FLOWTRACER_MODELS` names.

A cell holds seconds and megabytes (2^20 bytes). Columns with a colon hold the ratios of both, ours
to the other: below 1 is better. An empty cell means that a way was left out, for the reason given
above the table; a dash, that the other way took less than a megabyte.
"""

_ELSEWHERE = """\

## Elsewhere

Results of other runs, which other pages describe:

"""

_PROFILE = """\

## Where the time goes

Profiles (torch's and Python's, one thread) of the benchmarks above, and what they led to:

- `trace`, 2,048 tokens: 90 % is the model's own forward pass (linear layers 55 %, its attention
  27 %), 10 % the head mean, 0.4 % the flow, 1 % the text. The head mean took half as long again
  when it masked whole blocks instead of the square on the diagonal, and copied them twice.
- flow stage, 8,192 tokens: nearly all time went into copies of the matrix (lower triangle,
  negation, masks of the checks). Now only squares of 256 tokens are copied; 22 of 37 ms go into
  one look at every number.
- `streamed`, 8,192 tokens of SmolLM2-135M-Instruct: forward pass 65 %, attention rows twice 33 %,
  edges 1 %, paths 1 %. Half of the rows' time was the second time. Now those that fit below the
  peak of the forward pass are kept, and all do here: forward pass 76 %, rows 21 %. Of what a row
  takes, two thirds are products of queries and keys. From 16,384 tokens on, 64 rows at a time took
  twice as long as 16, because the C library returns tensors of this size to the system, which has
  to clear them again ([before and after](results/streamed_profile.json); the table of
  `long_sequences` is from before). Beside the forward pass a trace takes 0.53 of before at 4,096
  tokens, 0.57 at 8,192 and 0.73 at 16,384. A half is not reached for longer texts: their rows do
  not fit, and 40 % of them, at 32,768 tokens two thirds, are computed twice. There it takes 0.81 of
  a forward pass.
- credit in a step of the reasoner: half was decoding token by token to find answers; now most texts
  are joined from the tokens' names at once. The other half is the head mean, with padding masks.
- a batch of rollouts: 76 % linear layers, which take the same time in any batch. Our part is 6 %.
  Columns in which all rows of a batch are padding are no longer run.
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
    """The results of a benchmark, or None if it was not measured."""
    path = harness.RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def page(names: Sequence[str]) -> str:
    """The page as Markdown."""
    sections = [section(module_of(name), read(name)) for name in names]
    return _HEAD + "".join(sections) + _PROFILE + elsewhere(names)


def section(module: ModuleType, report: Report | None) -> str:
    """One benchmark: its question, its setting, and its results."""
    _, _, setting = (module.__doc__ or "").partition("\n")
    parts = [f"## {name_of(module)}", f"**{question_of(module)}**", setting.strip()]
    if report is None:
        return _paragraphs([*parts, "Not measured yet."])
    remarks = module.remarks(report["rows"]) if hasattr(module, "remarks") else []
    figures = module.plots(report) if hasattr(module, "plots") else {}
    return _paragraphs(
        [
            *parts,
            getattr(module, "table", table)(report),
            _list(verdict(target, report) for target in module.TARGETS),
            _list(remarks),
            _list(notes(report)),
            *(f"![{title}](plots/{title}.svg)" for title in figures),
            origin(report),
        ]
    )


def table(report: Report) -> str:
    """A row for each case: every way, then the ratios of ours to each other way."""
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
    taken = [seconds(row["seconds"][way])]
    if way in row["peak_mb"]:  # a row that was added by hand may lack it
        taken.append(megabytes(row["peak_mb"][way]))
    return ", ".join(taken)


def _ratios(row: Row, other: str) -> str:
    if other not in row["seconds"]:
        return ""
    return ", ".join(
        number(row["ratios"][measure][other]) if other in row["ratios"][measure] else "–"
        for measure in ("seconds", "peak_mb")
    )


def notes(report: Report) -> Iterator[str]:
    """Notes on single cases, each once with all cases that it is about."""
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
    """The command, machine and versions that the figures come from."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    rounds = f", median of {report['rounds']}" if "rounds" in report else ""
    return (
        f"`{report['command']}`{rounds}, on {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gb']} GB, {machine['gpu'] or 'no GPU'}; {machine['system']}; {versions}."
    )


def elsewhere(names: Sequence[str]) -> str:
    """Links to results that no benchmark of the harness wrote."""
    paths = [path for path in sorted(harness.RESULTS.glob("*.json")) if path.stem not in names]
    lines = [
        f"{json.loads(path.read_text(encoding='utf-8'))['question']}: "
        f"[{path.name}](results/{path.name})"
        for path in paths
    ]
    return _ELSEWHERE + _list(lines) + "\n" if lines else ""


def seconds(value: float) -> str:
    """A time with its unit, to two or three digits."""
    if value >= 1:
        return f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"
    return f"{number(1000 * value)} ms"


def megabytes(value: float) -> str:
    return f"{value:.0f} MB" if value >= 10 else f"{value:.1f} MB"


def number(value: float) -> str:
    """A number with three digits from 10 on and two below: 123, 12.3, 1.2, 0.21, 0.010."""
    if value >= 10:
        return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
    return f"{value:#.2g}".rstrip(".")


def _list(items: Iterator[str] | Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _paragraphs(parts: Sequence[str]) -> str:
    return "".join(f"\n{part}\n" for part in parts if part)
