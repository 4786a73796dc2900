"""The page of supported architectures, made from the table of measurements.

python -m tests.conformance.table            write the page again
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill

from tests.conformance.compare import BACKENDS, BOUND, TOKENS
from tests.conformance.results import NO_ATTENTION, Row, read_rows

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
DEFAULT = BACKENDS[0]

_HEAD = """\
# Supported architectures

{summary}

This page is made from [what was measured](../tests/conformance/results.csv); `make conformance`
measures again. For every type, a tiny random model with every kind of its layers is read one layer
at a time, on its default attention implementation, and compared with the probabilities that the
model itself reports in eager attention, on two texts of {tokens} tokens: without padding, padded
left, and padded right. A padded text must be read as the model reports it without padding: padding
moves learned positions and fills windows, which is not what a text means. A type is supported if
every probability, averaged over heads, is within {bound:g}, and the reader's self-check agrees.
Encoders are measured as decoders. Layers whose keys are not tokens (DeepSeek-V4's summaries) are
compared by the sums of their rows here, and by definition in the tests. A dash says that a backend
refuses the type.

Granite's models with sinks report more attention than they pay: their sinks take a share after the
softmax. It is left out of the rows, as for every model with sinks; to read what they report:
`wrap(model, adapter=flowtracer_adapters.OutputSinkAdapter(as_eager=True))`.

| Type | Adapter | Layers compared | {backends} | Remark |
|---|---|--:|{rules}|---|
"""

_NONE = "These carry information in a recurrent state only, and `wrap` says so: {types}."

_UNSUPPORTED = """\

## Not supported

| Type | Adapter | Why |
|---|---|---|
"""


def by_type(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """The rows of each type, by backend."""
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        found[row.type][row.backend] = row
    return {name: found[name] for name in sorted(found)}


def supported(rows: Mapping[str, Row]) -> bool:
    """Whether a type passed on the default backend."""
    return DEFAULT in rows and rows[DEFAULT].status == "passed"


def attends(rows: Mapping[str, Row]) -> bool:
    """Whether a type has attention at all."""
    return not all(row.note.startswith(NO_ATTENTION) for row in rows.values())


def summary(rows: Iterable[Row]) -> str:
    """The sentence about supported types in README."""
    types = by_type(rows)
    versions = {row.transformers for found in types.values() for row in found.values()}
    attending = [found for found in types.values() if attends(found)]
    passed = sum(supported(found) for found in attending)
    return (
        f"{passed} of the {len(attending)} types of causal language models with attention in "
        f"transformers {', '.join(sorted(versions))} are read as the models compute it."
    )


def page(rows: Sequence[Row]) -> str:
    """The page as Markdown."""
    types = by_type(rows)
    head = _HEAD.format(
        summary=fill(summary(rows), width=100),
        tokens=TOKENS,
        bound=BOUND,
        backends=" | ".join(f"Difference, `{backend}`" for backend in BACKENDS),
        rules="|".join(["--:"] * len(BACKENDS)),
    )
    lines = [_supported_line(name, found) for name, found in types.items() if supported(found)]
    recurrent = [f"`{name}`" for name, found in types.items() if not attends(found)]
    rest = [
        f"| `{name}` | {found[DEFAULT].adapter} | {_cell(found[DEFAULT].note)} |\n"
        for name, found in types.items()
        if attends(found) and not supported(found)
    ]
    none = (
        "\n## Without attention\n\n"
        + fill(_NONE.format(types=", ".join(recurrent)), width=100)
        + "\n"
        if recurrent
        else ""
    )
    return head + "".join(lines) + none + (_UNSUPPORTED + "".join(rest) if rest else "")


def _supported_line(name: str, found: Mapping[str, Row]) -> str:
    row = found[DEFAULT]
    cells = [_difference(found.get(backend)) for backend in BACKENDS]
    return (
        f"| `{name}` | {row.adapter} | {row.layers} | {' | '.join(cells)} | {_cell(row.note)} |\n"
    )


def _difference(row: Row | None) -> str:
    """The difference if the type passed, else a sign."""
    if row is None:
        return ""
    return {"passed": row.difference, "refused": "–", "failed": "fails"}[row.status]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def write_page() -> None:
    """Write the page from the table in its file."""
    PAGE.write_text(page(read_rows()), encoding="utf-8")


if __name__ == "__main__":
    write_page()
