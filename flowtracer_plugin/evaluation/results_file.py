"""Results of an evaluation on disk: settings in the first line, then one example in each.

A run that was interrupted continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flowtracer_plugin.evaluation.examples import Example
from flowtracer_plugin.evaluation.outcomes import Outcome
from flowtracer_plugin.evaluation.protocols import EvaluationSettings
from flowtracer_plugin.files import RecordFile
from flowtracer_plugin.trace.tracer import FlowTracer

FORMAT = "flowtracer.evaluation"
VERSION = 2
"""Version 1 held knock-outs of tokens alone, and was never released."""

Evaluate = Callable[[Iterable[Example]], Iterator[Outcome]]


def plain_settings(
    tracer: FlowTracer, settings: EvaluationSettings, *, model: str, data: str, oracle: str | None
) -> dict[str, Any]:
    """All that the results depend on, as plain values; `oracle` is the pattern of that score."""
    return {
        "model": model,
        "data": data,
        "dtype": str(tracer.model.dtype),
        "layers": list(tracer.layers),
        "answer": tracer.options.answer,
        "setting": settings.setting,
        "protocols": list(settings.protocols),
        "scores": list(settings.scores),
        "oracle": oracle,
        "max_new_tokens": settings.max_new_tokens,
        "predicted_only": settings.predicted_only,
        "options": asdict(settings.options),
    }


def evaluate_to_file(
    evaluate: Evaluate,
    examples: Sequence[Example],
    path: Path | None,
    settings: Mapping[str, Any],
    *,
    progress: bool = False,
) -> tuple[Outcome, ...]:
    """The outcomes of all examples, in their order; each is written as soon as it is measured.

    Examples that the file holds are not measured again. A last line that was cut off, as by a
    crash, is dropped.

    Args:
        evaluate: Measures the examples that are left.
        examples: All of them.
        path: A new file, or one that an earlier run with the same settings wrote. Without a path
            nothing is written.
        settings: All that the results depend on, as `plain_settings`.
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
    for outcome in tqdm(
        evaluate(left),
        total=len(examples),
        initial=len(examples) - len(left),
        desc="evaluating",
        unit="example",
        disable=not progress,
    ):
        file.add(asdict(outcome))
        done[outcome.row] = outcome
    return tuple(done[example.row] for example in examples)


def _outcomes(file: RecordFile, path: Path | None) -> dict[int, Outcome]:
    try:
        found = [Outcome(**record) for record in file.records]
    except TypeError as error:
        raise ValueError(
            f"cannot go on with {str(path)!r}: wanted results that an evaluation wrote, {error}; "
            "write to another file"
        ) from error
    return {outcome.row: outcome for outcome in found}
