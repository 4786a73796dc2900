"""An audit on disk: settings in the first line, then rollouts and batches as they come.

A run that was interrupted goes on where it stopped, and rollouts are sampled once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flowtracer_plugin.credit_audit import BatchAudit, Tilt
from flowtracer_plugin.record_file import RecordFile
from flowtracer_plugin.sampling import Group


class AuditFile:
    """What is known of an audit, in a file if there is a path.

    Attributes:
        groups: By the row of their prompt.
        batches: By their number.

    Raises:
        ValueError: As `RecordFile`.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self._file = RecordFile(path, "flowtracer.audit", 1, settings)
        self.groups: dict[int, Group] = {}
        self.batches: dict[int, BatchAudit] = {}
        for record in self._file.records:
            if "group" in record:
                self._keep(_group(record["group"]))
            else:
                batch = _batch(record["batch"])
                self.batches[batch.number] = batch

    def add(self, found: Group | BatchAudit) -> None:
        """Write down what was found."""
        name = "group" if isinstance(found, Group) else "batch"
        self._file.add({name: asdict(found)})
        if isinstance(found, Group):
            self._keep(found)
        else:
            self.batches[found.number] = found

    def _keep(self, group: Group) -> None:
        self.groups[group.row] = group


def _group(record: Mapping[str, Any]) -> Group:
    return Group(
        row=record["row"],
        prompt_ids=tuple(record["prompt_ids"]),
        completions=tuple(tuple(ids) for ids in record["completions"]),
        rewards=tuple(record["rewards"]),
    )


def _batch(record: Mapping[str, Any]) -> BatchAudit:
    tilts = {
        name: Tilt(**{**tilt, "classes": tuple(tilt["classes"])})
        for name, tilt in record["tilts"].items()
    }
    return BatchAudit(**{**record, "classes": tuple(record["classes"]), "tilts": tilts})
