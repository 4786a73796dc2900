"""`index.html` beside the tables: the rollouts, sortable, with links to their pages."""

from __future__ import annotations

import json
from pathlib import Path

from flowtracer_plugin.bulk.fingerprint import SETTINGS
from flowtracer_plugin.bulk.tables import ANSWERS, Results
from flowtracer_plugin.report.pages.rollout_index import RolloutLine, write_rollout_index

_COLUMNS = (
    "row",
    "id",
    "prompt",
    "answer",
    "correct",
    "response_tokens",
    "reasoning_share",
    "concentration",
    "error",
)


def write_data_index(results: Results) -> Path:
    """Write the list of all finished rollouts to `index.html`, and return its path."""
    folder = results.folder
    pages = {path.stem for path in (folder / "pages").glob("*.html")}
    lines = [
        RolloutLine(
            **row, page=f"pages/{row['row']:08}.html" if f"{row['row']:08}" in pages else None
        )
        for row in results.read(ANSWERS, _COLUMNS).to_pylist()
    ]
    settings = json.loads((folder / SETTINGS).read_text("utf-8"))
    return write_rollout_index(
        folder / "index.html",
        lines,
        title=f"Rollouts of {folder.resolve().name}",
        settings=settings,
    )
