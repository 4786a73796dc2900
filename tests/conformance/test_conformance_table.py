"""The table and its page cover every type, and the page says only what was measured."""

from __future__ import annotations

import re
from dataclasses import replace

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.conformance.compare import BACKENDS, BOUND
from tests.conformance.results import Row, merged, read_rows, write_rows
from tests.conformance.table import PAGE, by_type, page, summary, supported
from tests.conformance.tiny_configs import ALL_TYPES
from tests.conformance.type_table import GAINS, NOTES, ONE_ROW, PARTS, TYPES

ROWS = read_rows()
PASSED = Row(
    type="a",
    adapter="x",
    backend=BACKENDS[0],
    layers=2,
    difference="1.0e-07",
    status="passed",
    note="",
    transformers="5",
)
RECURRENT = replace(PASSED, type="b", status="refused", note="NoAttentionError: none")
FAILED = replace(PASSED, type="c", status="failed", difference="2.0e-01", note="differs")


def test_the_page_is_what_the_table_says():
    assert PAGE.read_text(encoding="utf-8") == page(ROWS), "run `make conformance`"


def test_the_readme_says_the_same():
    words = " ".join((PAGE.parents[1] / "README.md").read_text(encoding="utf-8").split())
    assert summary(ROWS).rstrip(".") in words


def test_every_type_was_measured_on_every_backend():
    measured = {(row.type, row.backend) for row in ROWS}
    assert measured == {(name, b) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES for b in BACKENDS}
    assert len(measured) == len(ROWS)


def test_the_table_was_measured_with_the_installed_transformers():
    assert {row.transformers for row in ROWS} == {transformers.__version__}


def proves_its_status(row):
    if row.status == "passed":
        return float(row.difference) < BOUND and row.layers > 0 and row.adapter and row.transformers
    if row.status == "refused":
        return re.match(r"(NoAttention|UnsupportedArchitecture)Error: ", row.note)
    return row.status == "failed" and row.note


def test_every_row_proves_its_status():
    assert [row for row in ROWS if not proves_its_status(row)] == []


def test_only_what_passed_is_called_supported():
    part = page(ROWS).partition("## ")[0]
    listed = re.findall(r"^\| `([^`]+)` \|", part, flags=re.MULTILINE)
    assert listed == [name for name, found in by_type(ROWS).items() if supported(found)]
    assert not supported({BACKENDS[0]: FAILED})
    assert not supported({BACKENDS[-1]: replace(PASSED, backend=BACKENDS[-1])})


def test_the_summary_counts_types_with_attention():
    assert summary([PASSED, RECURRENT, FAILED]).startswith("1 of the 2 types")


def test_rows_that_are_measured_again_take_the_place_of_the_old(tmp_path):
    again = replace(PASSED, difference="3.0e-07")
    path = tmp_path / "rows.csv"
    write_rows(merged([PASSED, FAILED], [RECURRENT, again]), path)
    assert read_rows(path) == (again, RECURRENT, FAILED)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.csv"]


def test_exceptions_are_about_types_that_exist():
    assert {*TYPES, *GAINS, *NOTES, *ONE_ROW, *PARTS} <= set(ALL_TYPES)
