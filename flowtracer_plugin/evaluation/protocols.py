"""Every test of scores against what a model does, on one traced text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

from flowtracer_plugin.credit.token_scores import TOKEN_SCORES, TokenScore, read_text
from flowtracer_plugin.evaluation.curves import measure_curves
from flowtracer_plugin.evaluation.faithfulness import (
    KnockOutOptions,
    checked_scores,
    measure_knock_outs,
)
from flowtracer_plugin.evaluation.lines_and_edges import knock_out_backbone, knock_out_lines
from flowtracer_plugin.evaluation.regeneration import regenerate
from flowtracer_plugin.trace.flow_trace import FlowTrace
from flowtracer_plugin.trace.tracer import FlowTracer

Scores = Mapping[str, TokenScore]


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What a protocol is asked, beside the text.

    Attributes:
        options: What is knocked out.
        scores: By name.
        right: The right answer, if it is known.
        max_new_tokens: Length of what is written anew.
        batch_size: Cuts in one forward pass.
    """

    options: KnockOutOptions
    scores: Scores
    right: str | None = None
    max_new_tokens: int = 256
    batch_size: int | None = None


Protocol = Callable[[FlowTracer, FlowTrace, Question], Any]


def _knock_out(tracer: FlowTracer, trace: FlowTrace, asked: Question) -> Any:
    found = measure_knock_outs(
        tracer, trace, asked.options, scores=asked.scores, batch_size=asked.batch_size
    )
    return asdict(found)


def _curves(tracer: FlowTracer, trace: FlowTrace, asked: Question) -> Any:
    # Without what stands right before the answer, often a template that any answer needs.
    options = replace(asked.options, gaps=(max(asked.options.gaps),))
    found = measure_curves(tracer, trace, options, scores=asked.scores, batch_size=asked.batch_size)
    return [asdict(curve) for curve in found]


def _lines(tracer: FlowTracer, trace: FlowTrace, asked: Question) -> Any:
    rows = asked.options.rows
    found = knock_out_lines(
        tracer, trace, scores=asked.scores, rows=rows, batch_size=asked.batch_size
    )
    return asdict(found)


def _edges(tracer: FlowTracer, trace: FlowTrace, asked: Question) -> Any:
    options = asked.options
    found = knock_out_backbone(
        tracer,
        trace,
        percents=options.percents,
        draws=options.draws,
        seed=options.seed,
        batch_size=asked.batch_size,
    )
    return [asdict(one) for one in found]


def _regeneration(tracer: FlowTracer, trace: FlowTrace, asked: Question) -> Any:
    options = asked.options
    found = regenerate(
        tracer,
        trace,
        scores=asked.scores,
        right=asked.right,
        percent=max(options.percents),
        draws=options.draws,
        seed=options.seed,
        max_new_tokens=asked.max_new_tokens,
    )
    return [asdict(one) for one in found]


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        "knock_out": _knock_out,
        "curves": _curves,
        "lines": _lines,
        "edges": _edges,
        "regeneration": _regeneration,
    }
)
"""What each is, its module says: `faithfulness`, `curves`, `lines_and_edges`, `regeneration`."""

FIRST = "knock_out"
"""Where there are too few tokens for this one, there are for the others."""


def check_protocols(names: Sequence[str]) -> None:
    """Refuse names that no protocol has.

    Raises:
        ValueError: One has not, or there is none.
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
    scores: Scores = TOKEN_SCORES,
    right: str | None = None,
    max_new_tokens: int = 256,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """What each protocol finds, as plain values; of one that cannot be, `{"skipped": why}`.

    Scores are computed once for all of them.

    Raises:
        TooFewTokensError: There are fewer than 10 candidates.
        KnockOutError: The model's attention cannot be cut.
        ValueError: As `measure_knock_outs`, or there is no such protocol.
    """
    check_protocols(protocols)
    text = read_text(tracer, trace)
    values = {name: checked_scores(name, score(text)) for name, score in scores.items()}
    asked = Question(
        options=options,
        scores={name: _constant(score) for name, score in values.items()},
        right=right,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    found: dict[str, Any] = {}
    for name in protocols:
        try:
            found[name] = PROTOCOLS[name](tracer, trace, asked)
        except ValueError as error:  # such as a text of two lines, of which no order can be told
            if name == FIRST:
                raise
            found[name] = {"skipped": str(error)}
    return found


def _constant(values: Any) -> TokenScore:
    return lambda _text: values
