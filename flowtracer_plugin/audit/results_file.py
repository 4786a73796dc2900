"""An audit on disk: settings in the first line, then every group and batch as it is finished.

An interrupted audit continues where it stopped and samples no rollout twice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from flowtracer_plugin.audit.run import BatchAudit
from flowtracer_plugin.audit.sampling import Group
from flowtracer_plugin.evaluation.token_sets import CLASS_NAMES
from flowtracer_plugin.files import RecordFile, typed

FORMAT = "flowtracer.audit"
VERSION = 1


class AuditFile:
    """The finished parts of an audit, kept in a file if there is a path, else in memory only.

    Attributes:
        groups: The groups, by the row of their prompt.
        batches: The batches, by their number.

    Raises:
        ValueError: As `RecordFile`, or a record is damaged.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        read = partial(_finding, scorers=settings.get("scorers"))
        self._file = RecordFile(path, FORMAT, VERSION, settings, read)
        self.groups: dict[int, Group] = {}
        self.batches: dict[int, BatchAudit] = {}
        for found in self._file.records:
            self._keep(found)

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


def _finding(record: Any, scorers: Collection[str] | None) -> Group | BatchAudit:
    kinds = {"group": Group, "batch": BatchAudit}
    name = next(iter(record), None) if isinstance(record, dict) and len(record) == 1 else None
    if name not in kinds:
        raise ValueError(f"wanted a group or a batch of an audit, found {record!r:.80}")
    found: Group | BatchAudit = typed(kinds[name], record[name], name)
    if isinstance(found, Group):
        if not len(found.completions) == len(found.rewards) > 0:
            raise ValueError(
                f"wanted a reward for each completion, found {len(found.completions)} completions "
                f"and {len(found.rewards)} rewards"
            )
        return found
    counts = {len(found.classes), *(len(tilt.classes) for tilt in found.tilts.values())}
    if counts != {len(CLASS_NAMES)}:
        raise ValueError(f"wanted {len(CLASS_NAMES)} classes, found {sorted(counts)}")
    if scorers is not None and found.tilts.keys() != set(scorers):
        raise ValueError(f"wanted the scorers {sorted(scorers)}, found {sorted(found.tilts)}")
    return found
