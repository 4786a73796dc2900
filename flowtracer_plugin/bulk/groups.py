"""Which rollouts of a traced data set belong to which of two groups."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from flowtracer_plugin.bulk.fingerprint import SETTINGS
from flowtracer_plugin.bulk.tables import ANSWERS, Results
from flowtracer_plugin.comparison.different import Different, most_different
from flowtracer_plugin.comparison.groups import ANSWER_MEASURES, FLOW_MEASURES
from flowtracer_plugin.comparison.permutation import Sides
from flowtracer_plugin.comparison.traces import RIGHT_AND_WRONG
from flowtracer_plugin.files import parsed, typed

CORRECT = "correct"
"""The column of the answers that tells right from wrong."""

MOST_VALUES = 1_000
"""A column with more values than this has no groups."""

_LISTED = 10

_TEXTS = ("prompt", "response")


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """The rollouts of two groups. Equal texts in one group count once.

    Attributes:
        by: The column that tells the groups.
        sides: The rollouts of each group, by their place in `rows`.
        rows: The number of each rollout in the data, ascending.
        values: The measures of each rollout, in the order of `ANSWER_MEASURES`.
        prompts: A hash of each rollout's prompt.
        left_out: How many rollouts are in no group, or count with another, by the reason.
        done: The rows of the data that are traced.
    """

    by: str
    sides: Sides
    rows: Int[np.ndarray, " rollout"]
    values: Float[np.ndarray, "rollout measure"]
    prompts: Sequence[bytes]
    left_out: dict[str, int]
    done: int

    def most_different(self, count: int) -> Different:
        """The most different rollouts by a measure of the flow, in at most `count` pairs."""
        flow = self.values[:, : len(FLOW_MEASURES)]
        return most_different(flow, FLOW_MEASURES, self.sides, self.prompts, count)


def read_settings(results: Results) -> dict[str, Any]:
    """What the data set was traced with.

    Raises:
        ValueError: The file with the settings is missing or damaged.
    """
    path = results.folder / SETTINGS
    try:
        return typed(dict[str, Any], parsed(path.read_bytes()))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"wanted {SETTINGS} beside the tables in {str(results.folder)!r}, found none that can "
            f"be read ({reason}); name the folder that flowtracer trace-data wrote"
        ) from error


def group_rollouts(
    results: Results, by: str = CORRECT, groups: tuple[str, str] | None = None
) -> Groups:
    """The rollouts of two groups; the table of answers is read piece by piece.

    Args:
        results: The tables.
        by: A column of the answers with few values: texts, whole numbers or booleans.
        groups: The two values, as text, that are compared; by default the only two that there are.

    Raises:
        ValueError: There is no such column, it has not exactly two values, or the tables lack
            measures.
    """
    _check_columns(results, by)
    read = _Read(by)
    wanted = dict.fromkeys(["row", by, *_TEXTS, *ANSWER_MEASURES])
    for batch in results.batches(ANSWERS, [*wanted]):
        read.add(batch)
    return read.groups(_chosen(read.counts, by, groups))


def name_of(by: str, value: str) -> str:
    """The name of the group with this value."""
    return value if by == CORRECT else f"{by} {value}"


def _check_columns(results: Results, by: str) -> None:
    found = results.columns(ANSWERS)
    if by not in found:
        raise ValueError(
            f"the answers in {str(results.folder)!r} have no column {by!r}; there are "
            + ", ".join(map(repr, found))
        )
    if missing := [name for name in ANSWER_MEASURES if name not in found]:
        raise ValueError(
            f"the answers in {str(results.folder)!r} have no column {missing[0]!r}, which earlier "
            "versions did not write; trace the data into a new folder"
        )


def _chosen(counts: dict[str, int], by: str, groups: tuple[str, str] | None) -> tuple[str, str]:
    """The values of the two groups."""
    listed = ", ".join(f"{value} ({count})" for value, count in [*counts.items()][:_LISTED])
    listed += f" and {len(counts) - _LISTED} more" * (len(counts) > _LISTED)
    if not counts:
        advice = (
            "give right answers with --answer-column" if by == CORRECT else "name another column"
        )
        raise ValueError(f"no traced rollout has a value in the column {by!r}; {advice}")
    if groups is not None:
        absent = [value for value in groups if value not in counts]
        if absent or groups[0] == groups[1]:
            raise ValueError(
                f"wanted two different values of {by!r}, got {groups[0]!r} and {groups[1]!r}; "
                f"there are {listed}"
            )
        return groups
    if len(counts) != 2:
        advice = (
            "two groups are compared"
            if len(counts) == 1
            else "choose two of them with groups, such as --groups " + ",".join([*counts][:2])
        )
        raise ValueError(f"wanted two values of {by!r}, found {len(counts)}: {listed}; {advice}")
    first, second = counts
    return first, second


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """What is kept of each traced rollout: some numbers and hashes."""

    by: str
    rows: array[int] = field(default_factory=lambda: array("q"))
    measures: list[Float[np.ndarray, "rollout measure"]] = field(default_factory=list)
    codes: array[int] = field(default_factory=lambda: array("q"))
    hashes: list[tuple[bytes, bytes]] = field(default_factory=list)
    places: dict[Any, int] = field(default_factory=dict)
    untraced: array[int] = field(default_factory=lambda: array("q"))

    def add(self, batch: Any) -> None:
        """Take over some rows of the answers."""
        columns = {name: batch[name] for name in batch.schema.names}
        traced = columns["response_tokens"].is_valid().to_numpy(zero_copy_only=False)
        self.untraced.extend(np.flatnonzero(~traced).tolist())
        kept = np.flatnonzero(traced)
        taken = {name: column.take(kept) for name, column in columns.items()}
        self.rows.extend(taken["row"].to_pylist())
        self.codes.extend(map(self._code, taken[self.by].to_pylist()))
        texts = (taken[name].to_pylist() for name in _TEXTS)
        self.hashes.extend((_hash(one), _hash(other)) for one, other in zip(*texts, strict=True))
        numbers = [taken[name].to_numpy(zero_copy_only=False) for name in ANSWER_MEASURES]
        self.measures.append(np.array(numbers, float).T)

    def _code(self, value: Any) -> int:
        """The place of the value among those seen; −1 if it is missing."""
        if value is None:
            return -1
        if not isinstance(value, str | int):
            raise ValueError(
                f"wanted texts, whole numbers or booleans in the column {self.by!r}, found "
                f"{value!r:.60}; group by another column"
            )
        if len(self.places) == MOST_VALUES and value not in self.places:
            raise ValueError(
                f"the column {self.by!r} has more than {MOST_VALUES:,} values; group by a column "
                "with few"
            )
        return self.places.setdefault(value, len(self.places))

    @property
    def texts(self) -> dict[str, int]:
        """The code of each value by its text, in order: true before false."""
        if self.by == CORRECT:
            spelled = dict(zip((True, False), RIGHT_AND_WRONG, strict=True))
        else:
            spelled = {True: "true", False: "false"}
        ordered = sorted(
            self.places.items(),
            key=lambda one: -one[0] if isinstance(one[0], bool) else one[0],
        )
        return {
            spelled[value] if isinstance(value, bool) else str(value): code
            for value, code in ordered
        }

    @property
    def counts(self) -> dict[str, int]:
        """The number of rollouts with each value."""
        found = Counter(self.codes)
        return {text: found[code] for text, code in self.texts.items()}

    def groups(self, chosen: tuple[str, str]) -> Groups:
        """The rollouts with these two values."""
        codes = [self.texts[value] for value in chosen]
        known: set[tuple[int, bytes, bytes, int]] = set()
        kept, copies = list[int](), 0
        values = np.concatenate(self.measures)
        lengths = values[:, ANSWER_MEASURES.index("response_tokens")].astype(int).tolist()
        for at, code in enumerate(self.codes):
            key = (code, *self.hashes[at], lengths[at])
            if code not in codes:
                continue
            if key in known:
                copies += 1
                continue
            known.add(key)
            kept.append(at)
        side = np.array(self.codes, np.int64)[kept]
        first, second = (tuple(np.flatnonzero(side == code).tolist()) for code in codes)
        names = name_of(self.by, chosen[0]), name_of(self.by, chosen[1])
        missing = self.codes.count(-1)
        return Groups(
            by=self.by,
            sides=Sides(names=names, first=first, second=second),
            rows=np.array(self.rows, np.int64)[kept],
            values=values[kept],
            prompts=[self.hashes[at][0] for at in kept],
            left_out={
                "not traced": len(self.untraced),
                f"without a value of {self.by}": missing,
                "in other groups": len(self.codes) - missing - len(kept) - copies,
                "equal to another": copies,
            },
            done=len(self.codes) + len(self.untraced),
        )


def _hash(text: str | None) -> bytes:
    return blake2b((text or "").encode(), digest_size=12).digest()
