"""Results of an evaluation on disk: settings in the first line, then one example in each.

A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flowtracer_plugin.evaluation import Example, Outcome
from flowtracer_plugin.storage import write_atomically

FORMAT = "flowtracer.evaluation"
VERSION = 1

Evaluate = Callable[[Iterable[Example]], Iterator[Outcome]]


def evaluate_to_file(
    evaluate: Evaluate,
    examples: Sequence[Example],
    path: Path,
    settings: Mapping[str, Any],
    *,
    progress: bool = False,
) -> tuple[Outcome, ...]:
    """Outcomes of all examples, in their order; each is written as soon as it is there.

    Examples that the file holds are not measured again. A last line that was cut off, as by a
    crash, is dropped.

    Args:
        evaluate: What measures the examples that are left.
        examples: All of them.
        path: A new file, or one that an earlier run with the same settings wrote.
        settings: What the results depend on, plain values.
        progress: Show a bar.

    Raises:
        ValueError: The file is something else, holds other settings, or holds an example of the
            same row with other texts.
    """
    done = read_outcomes(path, settings)
    for example in examples:
        if example.row in done and done[example.row].digest != example.digest:
            raise ValueError(
                f"{str(path)!r} holds row {example.row} with other texts: the data have changed; "
                "write to another file"
            )
    left = [example for example in examples if example.row not in done]
    if not (path.exists() and path.stat().st_size):
        write_atomically(path, _line({"format": FORMAT, "version": VERSION, **settings}))
    before = len(examples) - len(left)
    with path.open("ab") as file:
        for outcome in shown(evaluate(left), len(examples), before=before, progress=progress):
            file.write(_line(asdict(outcome)))
            file.flush()
            done[outcome.row] = outcome
    return tuple(done[example.row] for example in examples)


def shown(
    outcomes: Iterable[Outcome], total: int, *, before: int = 0, progress: bool
) -> Iterator[Outcome]:
    """The outcomes, counted by a bar if `progress`."""
    return iter(
        tqdm(
            outcomes,
            total=total,
            initial=before,
            desc="evaluating",
            unit="example",
            disable=not progress,
        )
    )


def read_outcomes(path: Path, settings: Mapping[str, Any]) -> dict[int, Outcome]:
    """The outcomes in a file by their rows; none if there is no file.

    Raises:
        ValueError: As `evaluate_to_file`.
    """
    if not path.exists():
        return {}
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        write_atomically(path, whole)
    if not whole:
        return {}
    lines = whole.splitlines()
    try:
        header, *records = [json.loads(line) for line in lines]
        if header["format"] != FORMAT or header["version"] != VERSION:
            raise ValueError(f"its first line is {lines[0][:80]!r}")
        outcomes = [Outcome(**record) for record in records]
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"cannot go on with {str(path)!r}: wanted results that an evaluation wrote, {error}; "
            "write to another file"
        ) from error
    _check_settings(path, header, json.loads(json.dumps(settings)))
    return {outcome.row: outcome for outcome in outcomes}


def _check_settings(path: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differ = [
        f"{name} is {held.get(name)!r} there and {value!r} now"
        for name, value in wanted.items()
        if held.get(name) != value
    ]
    if differ:
        raise ValueError(
            f"{str(path)!r} holds results with other settings: {'; '.join(differ)}; give the same "
            "ones, or write to another file"
        )


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"
