"""An audit on disk: settings in the first line, then rollouts and batches as they come.

A run that was interrupted goes on where it stopped, and rollouts are sampled once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flowtracer_plugin.audit.run import BatchAudit, Tilt
from flowtracer_plugin.audit.sampling import Group
from flowtracer_plugin.files import RecordFile


class AuditFile:
    """What is known of an audit, in a file if there is a path.

    Attributes:
        groups: By the row of their prompt.
        batches: By their number.

    Raises:
        ValueError: As `RecordFile`, or a record is damaged.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self._file = RecordFile(path, "flowtracer.audit", 1, settings)
        self.groups: dict[int, Group] = {}
        self.batches: dict[int, BatchAudit] = {}
        try:
            for record in self._file.records:
                self._keep(
                    _group(record["group"]) if "group" in record else _batch(record["batch"])
                )
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"cannot go on with {str(path)!r}: wanted rollouts and batches of an audit, "
                f"got {error!r}; write to another file"
            ) from error

    def add(self, found: Group | BatchAudit) -> None:
        """Write down what was found."""
        name = "group" if isinstance(found, Group) else "batch"
        self._file.add({name: asdict(found)})
        self._keep(found)

    def _keep(self, found: Group | BatchAudit) -> None:
        if isinstance(found, Group):
            self.groups[found.row] = found
        else:
            self.batches[found.number] = found


def _group(record: Any) -> Group:
    return Group(
        row=record["row"],
        prompt_ids=tuple(record["prompt_ids"]),
        completions=tuple(tuple(ids) for ids in record["completions"]),
        rewards=tuple(record["rewards"]),
    )


def _batch(record: Any) -> BatchAudit:
    tilts = {
        name: Tilt(**{**tilt, "classes": tuple(tilt["classes"])})
        for name, tilt in record["tilts"].items()
    }
    return BatchAudit(**{**record, "classes": tuple(record["classes"]), "tilts": tilts})
