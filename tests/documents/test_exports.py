"""The tables of docs/exports.md match the schema."""

import flowtracer_plugin as ft
from flowtracer_plugin.report.figures.figure import KINDS
from flowtracer_plugin.result.document import token_fields
from tests.test_layout import ROOT

DOCUMENT = (ROOT / "docs" / "exports.md").read_text("utf-8")


def rows(title):
    part = DOCUMENT.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return [line for line in part.splitlines() if line.startswith("| `")]


def test_the_tables_match_the_schema():
    assert rows("Fields of a token") == [
        f"| `{name}` | {kind} | {text} |" for name, (kind, text) in token_fields().items()
    ]
    fields = ft.json_schema()["properties"]
    assert rows("JSON") == [
        f"| `{name}` | {field['description']} |" for name, field in fields.items()
    ]
    assert [row.split("`")[1] for row in rows("Figures")] == list(KINDS)
