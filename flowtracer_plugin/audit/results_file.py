"""An audit on disk: settings in the first line, then every group and batch as it is finished.

An interrupted audit continues where it stopped and samples no rollout twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flowtracer_plugin.audit.run import BatchAudit, Tilt
from flowtracer_plugin.audit.sampling import Group
from flowtracer_plugin.files import RecordFile


class AuditFile:
    """The finished parts of an audit, kept in a file if there is a path, else in memory only.

    Attributes:
        groups: The groups, by the row of their prompt.
        batches: The batches, by their number.

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

    def has_group(self, row: int, prompt_ids: Sequence[int]) -> bool:
        """Whether the completions of this prompt are known.

        Raises:
            ValueError: The row is known with another prompt.
        """
        known = self.groups.get(row)
        if known is not None and known.prompt_ids != tuple(prompt_ids):
            raise ValueError(
                f"the file holds row {row} with another prompt: the data have changed; "
                "write to another file"
            )
        return known is not None

    def add(self, found: Group | BatchAudit) -> None:
        """Write a group or a batch to the file."""
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
