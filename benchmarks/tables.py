"""The tables of `benchmarks/README.md`, made of the results."""

from __future__ import annotations


def write_tables() -> None:
    """To be written."""
