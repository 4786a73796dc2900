"""Measure the types of models again, and write the results into the table.

python -m tests.conformance                  every type
python -m tests.conformance --types a,b      only these rows
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from tqdm import tqdm

from tests.conformance.compare import BACKENDS, measure
from tests.conformance.results import Row, merged, read_rows, write_rows
from tests.conformance.table import summary, write_page
from tests.conformance.tiny_configs import ALL_TYPES
from tests.families import quiet_transformers


def main(
    types: Annotated[str, typer.Option(help="Names with commas between; all if empty.")] = "",
    backends: Annotated[str, typer.Option(help="Names with commas between.")] = ",".join(BACKENDS),
) -> None:
    """Measure, write the table and the page of supported architectures, and sum up."""
    chosen = types.split(",") if types else ALL_TYPES
    unknown = sorted(set(chosen) - set(ALL_TYPES))
    if unknown:
        raise typer.BadParameter(f"transformers has no causal model of type {', '.join(unknown)}")
    torch.set_num_threads(1)  # the models are tiny, and test machines share their cores
    pairs = [(model_type, backend) for model_type in chosen for backend in backends.split(",")]
    rows = []
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other people's models
        for model_type, backend in (bar := tqdm(pairs, unit="type")):
            bar.set_postfix_str(model_type)
            rows.append(measure(model_type, backend))
    write_rows(merged([row for row in read_rows() if row.type in ALL_TYPES], rows))
    write_page()
    _sum_up(rows)


def _sum_up(rows: list[Row]) -> None:
    """Print the counts, and the types that failed."""
    console = Console(highlight=False, soft_wrap=True)
    for (backend, status), count in sorted(Counter((r.backend, r.status) for r in rows).items()):
        console.print(f"{backend:>12} {status:<8} {count}")
    for row in rows:
        if row.status == "failed":
            console.print(f"[bold]{row.type}[/] ({row.backend}): {escape(row.note)}")
    console.print(summary(read_rows()))


if __name__ == "__main__":
    typer.run(main)
