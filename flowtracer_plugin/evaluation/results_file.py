"""Results of an evaluation on disk: settings in the first line, then one example in each.

A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flowtracer_plugin.evaluation.run import Example, Outcome
from flowtracer_plugin.files import RecordFile

FORMAT = "flowtracer.evaluation"
VERSION = 2
"""1 held knock-outs of tokens alone, and was never released."""

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
    file = RecordFile(path, FORMAT, VERSION, settings)
    done = _outcomes(file, path)
    for example in examples:
        if example.row in done and done[example.row].digest != example.digest:
            raise ValueError(
                f"{str(path)!r} holds row {example.row} with other texts: the data have changed; "
                "write to another file"
            )
    left = [example for example in examples if example.row not in done]
    before = len(examples) - len(left)
    for outcome in shown(evaluate(left), len(examples), before=before, progress=progress):
        file.add(asdict(outcome))
        done[outcome.row] = outcome
    return tuple(done[example.row] for example in examples)


def _outcomes(file: RecordFile, path: Path) -> dict[int, Outcome]:
    try:
        found = [Outcome(**record) for record in file.records]
    except TypeError as error:
        raise ValueError(
            f"cannot go on with {str(path)!r}: wanted results that an evaluation wrote, {error}; "
            "write to another file"
        ) from error
    return {outcome.row: outcome for outcome in found}


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
