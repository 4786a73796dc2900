"""What is measured in a text: the protocols by name, and the settings of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

from flowtracer_plugin.credit.token_scores import TOKEN_SCORES, TokenScore
from flowtracer_plugin.evaluation.curves import Curve, example_curves
from flowtracer_plugin.evaluation.lines_and_edges import (
    EdgeKnockOuts,
    LineKnockOuts,
    example_edges,
    example_lines,
)
from flowtracer_plugin.evaluation.ranked_tokens import (
    Faithfulness,
    KnockOutOptions,
    example_knock_outs,
)
from flowtracer_plugin.evaluation.regeneration import Regeneration, example_regeneration
from flowtracer_plugin.evaluation.scored_example import ScoredExample
from flowtracer_plugin.files import typed
from flowtracer_plugin.trace.flow_trace import FlowTrace
from flowtracer_plugin.trace.tracer import FlowTracer

FIRST = "knock_out"
"""The protocol that needs the fewest tokens: a text that is too short for it is left out."""

SETTINGS = ("given", "compute")
"""Responses as they are, or cut where their answer is computed, by `text.result_cut`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSettings:
    """What is measured in every example, and how; `evaluate` describes each of them."""

    options: KnockOutOptions
    scores: Mapping[str, TokenScore]
    protocols: Sequence[str]
    max_new_tokens: int
    batch_size: int | None
    setting: str = "given"
    predicted_only: bool = True
    progress: bool = False

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            ValueError: There is no such protocol or setting.
        """
        if self.setting not in SETTINGS:
            raise ValueError(f"setting must be one of {', '.join(SETTINGS)}, got {self.setting!r}")
        check_protocols(self.protocols)

    def example(self, tracer: FlowTracer, trace: FlowTrace, right: str | None) -> ScoredExample:
        """A text with the scores that are compared."""
        return ScoredExample(
            tracer=tracer,
            trace=trace,
            scores=self.scores,
            right=right,
            batch_size=self.batch_size,
            progress=self.progress,
        )


Protocol = Callable[[ScoredExample, EvaluationSettings], Any]


def _curves(example: ScoredExample, settings: EvaluationSettings) -> Any:
    # Without the tokens right before the answer, often a template that any answer needs.
    options = replace(settings.options, gaps=(max(settings.options.gaps),))
    return example_curves(example, options)


def _regeneration(example: ScoredExample, settings: EvaluationSettings) -> Any:
    length = settings.max_new_tokens
    return example_regeneration(example, settings.options, max_new_tokens=length)


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        FIRST: lambda example, settings: example_knock_outs(example, settings.options),
        "curves": _curves,
        "lines": lambda example, settings: example_lines(example, settings.options),
        "edges": lambda example, settings: example_edges(example, settings.options),
        "regeneration": _regeneration,
    }
)
"""The protocols of the modules `faithfulness`, `curves`, `lines_and_edges` and `regeneration`."""


_FINDINGS: Mapping[str, Any] = {
    FIRST: Faithfulness,
    "curves": tuple[Curve, ...],
    "lines": LineKnockOuts,
    "edges": tuple[EdgeKnockOuts, ...],
    "regeneration": tuple[Regeneration, ...],
}
"""What each protocol finds, before `measure` turns it into plain values."""


def check_findings(measured: Mapping[str, Any]) -> None:
    """Check plain values that are said to be those of `measure`.

    Raises:
        ValueError: They are not.
    """
    for name, found in measured.items():
        if name not in _FINDINGS:
            raise ValueError(f"wanted protocols of {', '.join(_FINDINGS)}, found {name!r:.40}")
        skipped = isinstance(found, dict) and set(found) == {"skipped"}
        typed(dict[str, str] if skipped else _FINDINGS[name], found, name)


def check_protocols(names: Sequence[str]) -> None:
    """Check names of protocols.

    Raises:
        ValueError: A name is not a key of `PROTOCOLS`, or there is none.
    """
    unknown = [name for name in names if name not in PROTOCOLS]
    if unknown or not names:
        raise ValueError(
            f"protocols must be some of {', '.join(PROTOCOLS)}, got {', '.join(unknown) or 'none'}"
        )


def measure(
    tracer: FlowTracer,
    trace: FlowTrace,
    options: KnockOutOptions,
    *,
    protocols: Sequence[str] = (FIRST,),
    scores: Mapping[str, TokenScore] = TOKEN_SCORES,
    right: str | None = None,
    max_new_tokens: int = 256,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """What each protocol finds, as plain values; `{"skipped": why}` for one that cannot be run.

    All protocols share one set of scores.

    Raises:
        TooFewTokensError: There are fewer than 10 candidates.
        KnockOutError: The model's attention cannot be cut.
        ValueError: As `measure_knock_outs`, or there is no such protocol.
    """
    settings = EvaluationSettings(
        options=options,
        scores=scores,
        protocols=protocols,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    return measure_example(settings.example(tracer, trace, right), settings)


def measure_example(example: ScoredExample, settings: EvaluationSettings) -> dict[str, Any]:
    """`measure` for an example and settings."""
    _ = example.values  # a score that fails is an error, and no reason to skip a protocol
    found: dict[str, Any] = {}
    for name in settings.protocols:
        try:
            found[name] = _plain(PROTOCOLS[name](example, settings))
        except ValueError as error:  # such as a text of two lines, whose order says nothing
            if name == FIRST:
                raise
            found[name] = {"skipped": str(error)}
    return found


def _plain(found: Any) -> Any:
    return [asdict(one) for one in found] if isinstance(found, tuple) else asdict(found)
