"""The hubs and checkpoints that a trace's page marks."""

from __future__ import annotations

from dataclasses import dataclass

from flowtracer_plugin.report.display import ShownTrace, Unit, standouts
from flowtracer_plugin.result.standouts import AUTO

_MARKS, _LEAST_MARKS, _TOKENS_A_MARK = 10, 3, 6
"""The limits of the number of marked hubs, and of marked checkpoints, in long and short texts."""


@dataclass(frozen=True, kw_only=True)
class Marks:
    """The units that a page marks, the strongest first."""

    hubs: tuple[Unit, ...]
    checkpoints: tuple[Unit, ...]

    @property
    def units(self) -> tuple[Unit, ...]:
        """All of them."""
        return self.hubs + self.checkpoints

    @property
    def places(self) -> dict[str, list[int]]:
        """The number of each unit, by what it is."""
        kinds = {"hub": self.hubs, "checkpoint": self.checkpoints}
        return {kind: [unit.index for unit in units] for kind, units in kinds.items()}

    @property
    def ranks(self) -> dict[int, dict[str, int]]:
        """The rank of each unit among the hubs and among the checkpoints."""
        found: dict[int, dict[str, int]] = {}
        for kind, units in self.places.items():
            for rank, unit in enumerate(units, start=1):
                found.setdefault(unit, {})[kind] = rank
        return found


def marks_of(shown: ShownTrace, skip: str = AUTO) -> Marks:
    """The hubs and checkpoints that a page marks; `skip` is that of `TraceData.hubs`."""
    count = min(_MARKS, max(_LEAST_MARKS, len(shown.response) // _TOKENS_A_MARK))
    hubs = standouts(shown, "hubs", count, skip)
    checkpoints = standouts(shown, "checkpoints", count, skip)
    return Marks(
        hubs=tuple(unit for unit, _ in hubs), checkpoints=tuple(unit for unit, _ in checkpoints)
    )
