"""Evaluate a data set: every example is measured, or left out with the reason.

Results can go to a file, with the settings in its first line and an example in each further line; a
run that was interrupted continues where it stopped.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flowtracer_plugin.bulk.examples import Example
from flowtracer_plugin.bulk.row_errors import EVERY_ROW, NUMBERS, ONE_ROW, in_words
from flowtracer_plugin.credit.choosing import InvalidOwnScoreError, InvalidScoreError
from flowtracer_plugin.credit.token_scores import TOKEN_SCORES, TokenScore, own_codes
from flowtracer_plugin.evaluation.outcomes import REASONS, Outcome
from flowtracer_plugin.evaluation.progress import Progress, Say
from flowtracer_plugin.evaluation.protocols import (
    FIRST,
    EvaluationSettings,
    check_findings,
    measure_example,
)
from flowtracer_plugin.evaluation.ranked_tokens import KnockOutOptions
from flowtracer_plugin.evaluation.scored_example import TooFewTokensError
from flowtracer_plugin.files import RecordFile, read_records, typed
from flowtracer_plugin.text.answers import same_answer
from flowtracer_plugin.text.result_cut import NotComputedError, cut_at_result
from flowtracer_plugin.text.spans import AnswerNotFoundError, FinderError
from flowtracer_plugin.trace.flow_trace import FlowTrace
from flowtracer_plugin.trace.memory import TooLittleMemoryError
from flowtracer_plugin.trace.tracer import FlowTracer

logger = logging.getLogger(__name__)

FORMAT = "flowtracer.evaluation"
VERSION = 2
"""Version 1 held knock-outs of tokens alone, and was never released."""

Evaluate = Callable[[Iterable[Example]], Iterator[Outcome]]


def evaluate(
    tracer: FlowTracer,
    examples: Iterable[Example],
    options: KnockOutOptions | None = None,
    *,
    scores: Mapping[str, TokenScore] = TOKEN_SCORES,
    protocols: Sequence[str] = (FIRST,),
    setting: str = "given",
    max_new_tokens: int = 256,
    predicted_only: bool = True,
    batch_size: int | None = None,
) -> Iterator[Outcome]:
    """The outcome of each example, one by one.

    Args:
        tracer: Made with `wrap(..., mode="dense")`.
        examples: The model answers those without a response, greedily.
        options: Which tokens are knocked out, and how.
        scores: The scores that are compared, by name.
        protocols: Keys of `protocols.PROTOCOLS`.
        setting: `"given"`, or `"compute"`: every response is cut where its answer is computed.
        max_new_tokens: Length of the model's answers.
        predicted_only: Leave out given responses whose answer the model would not have chosen,
            token by token: a knock-out cannot take from the model what it would not say.
        batch_size: Cuts in one forward pass.

    Raises:
        KnockOutError: The model's attention cannot be cut.
        ValueError: There is no such protocol or setting, or as `measure_knock_outs`, for options
            and scores.
    """
    settings = EvaluationSettings(
        options=options or KnockOutOptions(),
        scores=scores,
        protocols=protocols,
        setting=setting,
        max_new_tokens=max_new_tokens,
        predicted_only=predicted_only,
        batch_size=batch_size,
    )
    return (evaluate_example(tracer, example, settings) for example in examples)


def evaluate_example(tracer: FlowTracer, example: Example, settings: EvaluationSettings) -> Outcome:
    """The outcome of one example; what fails in it costs no other.

    Raises:
        KnockOutError: The model's attention cannot be cut.
        InvalidOwnScoreError, ScorerError: An own scorer fails, or gives what is no score.
        NoAttentionError, UnsupportedArchitectureError: The tracer cannot read the model.
    """
    outcome = Outcome(row=example.row, digest=example.digest)
    try:
        trace = _traced(tracer, example, settings)
    except EVERY_ROW:
        raise
    except AnswerNotFoundError as error:
        return replace(outcome, left_out="no_answer", detail=str(error))
    except NotComputedError as error:
        return replace(outcome, left_out="not_computed", detail=str(error))
    except TooLittleMemoryError:
        return replace(outcome, left_out="not_traced", detail=_TOO_LONG)
    except ONE_ROW as error:
        return replace(outcome, left_out="not_traced", detail=in_words(error))
    right, answer = example.right_answer, trace.spans.answer_text
    if right is not None:
        outcome = replace(outcome, correct=same_answer(answer, right))
    scored = settings.example(tracer, trace, right)
    if not math.isfinite(scored.baseline.log_prob):
        detail = f"the log-probability of {answer!r} is {scored.baseline.log_prob}"
        return replace(outcome, left_out="not_traced", detail=detail)
    if settings.predicted_only and not scored.baseline.predicted:
        doubt = (
            f"the tokens of {answer!r} have a mean log-probability of "
            f"{scored.baseline.log_prob:.2f}, and one is not the likeliest"
        )
        return replace(outcome, left_out="not_predicted", detail=doubt)
    try:
        return replace(outcome, measured=measure_example(scored, settings))
    except TooFewTokensError as error:
        return replace(outcome, left_out="few_tokens", detail=str(error))
    except InvalidOwnScoreError:
        raise
    except InvalidScoreError as error:
        return replace(outcome, left_out="invalid_score", detail=str(error))
    except (FinderError, *NUMBERS) as error:
        return replace(outcome, left_out="not_traced", detail=in_words(error))


_TOO_LONG = (
    "scores need the attention between all pairs of its tokens, which takes more memory than is "
    "free"
)


def _traced(tracer: FlowTracer, example: Example, settings: EvaluationSettings) -> FlowTrace:
    arguments = example.template_kwargs or None
    if example.response is not None:
        trace = tracer.trace(example.prompt, example.response, template_kwargs=arguments)
    else:
        trace = tracer.generate(
            example.prompt,
            max_new_tokens=settings.max_new_tokens,
            progress=settings.progress,
            template_kwargs=arguments,
        )
    if settings.setting == "given":
        return trace
    response = example.response
    if response is None:
        response = "".join(trace.tokens[trace.spans.prompt_length :])
    response = cut_at_result(response, trace.spans.answer_text)
    return tracer.trace(example.prompt, response, answer=_LAST_NUMBER, template_kwargs=arguments)


# The number that ends a text; a search begins only where digits do, and so takes linear time.
_LAST_NUMBER = re.compile(r"(-?(?<![\d,.])[\d,.]*\d)\Z")


def plain_settings(
    tracer: FlowTracer, settings: EvaluationSettings, *, model: str, data: str, oracle: str | None
) -> dict[str, Any]:
    """All that the results depend on, as plain values; `oracle` is the pattern of that score."""
    return {
        **own_codes(settings.scores),
        **chosen_settings(settings, model=model, data=data, oracle=oracle),
        "dtype": str(tracer.model.dtype),
        "layers": list(tracer.layers),
        "answer": tracer.options.answer,
        "scores": list(settings.scores),
    }


def chosen_settings(
    settings: EvaluationSettings, *, model: str, data: str, oracle: str | None
) -> dict[str, Any]:
    """Those of `plain_settings` that are known before the model is loaded."""
    return {
        "model": model,
        "data": data,
        "setting": settings.setting,
        "protocols": list(settings.protocols),
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
    parts: Sequence[Path] = (),
    progress: bool = False,
    say: Say | None = None,
) -> tuple[Outcome, ...]:
    """The outcomes of all examples, in their order; each is written as soon as it is measured.

    Examples that the file or a part of it holds are not measured again. A last line that was cut
    off, as by a crash, is dropped; a file that is not of an evaluation with these settings is left
    untouched.

    Args:
        evaluate: Measures the examples that are left, in any order.
        examples: All examples.
        path: A new file, or one that an earlier run with the same settings wrote. Without a path
            nothing is written.
        settings: All that the results depend on, as `plain_settings`.
        parts: Files of other runs with the same settings, which may still be written to. What
            they hold of the examples is taken over.
        progress: Show a bar.
        say: Without a bar, gets a line for each example.

    Raises:
        ValueError: The file has another format, holds other settings, is damaged, or holds an
            example of the same row with other texts.
        OSError: The file cannot be read or written.
    """
    file = RecordFile(path, FORMAT, VERSION, settings, _outcome)
    done = _of_these(examples, file.records, path)
    for part in parts:
        found = read_records(part, FORMAT, VERSION, settings, _outcome)
        for row, outcome in _of_these(examples, found, part).items():
            if row not in done:
                file.add(asdict(outcome))
                done[row] = outcome
    left = [example for example in examples if example.row not in done]
    known = len(examples) - len(left)
    with Progress("example", len(examples), done=known, progress=progress, say=say) as shown:
        for outcome in evaluate(left):
            file.add(asdict(outcome))
            done[outcome.row] = outcome
            logger.info("row %d: %s", outcome.row, outcome.left_out or "measured")
            shown.step(f"row {outcome.row} {_in_words(outcome)}")
    return tuple(done[example.row] for example in examples)


def _in_words(outcome: Outcome) -> str:
    return "measured" if outcome.left_out is None else f"left out, {REASONS[outcome.left_out]}"


def kept_in(path: Path | None, settings: Mapping[str, Any], examples: Sequence[Example]) -> int:
    """How many of the examples a file of `evaluate_to_file` holds; none without a file."""
    if path is None:
        return 0
    found = read_records(path, FORMAT, VERSION, settings, _outcome)
    return len(_of_these(examples, found, path))


def _of_these(
    examples: Sequence[Example], outcomes: Iterable[Outcome], path: Path | None
) -> dict[int, Outcome]:
    """The outcomes of these examples that a file holds, by their row."""
    digests, found = {one.row: one.digest for one in examples}, {}
    for outcome in outcomes:
        if digests.get(outcome.row, outcome.digest) != outcome.digest:
            raise ValueError(
                f"{str(path)!r} holds row {outcome.row} with other texts: the data have changed, "
                "or how the model gets them; write to another file"
            )
        if outcome.row in digests:
            found[outcome.row] = outcome
    return found


def part_file(path: Path, number: int, count: int) -> Path:
    """The file beside `path` for the results of one of several parts."""
    return path.with_name(f"{path.stem}-{number}-of-{count}{path.suffix}")


def part_files(path: Path) -> list[Path]:
    """All files that `part_file` names and that are there, in the order of their names."""
    pattern = re.compile(rf"{re.escape(path.stem)}-\d+-of-\d+{re.escape(path.suffix)}")
    return sorted(one for one in path.parent.glob("*") if pattern.fullmatch(one.name))


def _outcome(record: Any) -> Outcome:
    outcome: Outcome = typed(Outcome, record)
    if outcome.left_out is not None and outcome.left_out not in REASONS:
        known = ", ".join(REASONS)
        raise ValueError(f"left_out must be one of {known}, found {outcome.left_out!r:.40}")
    if outcome.measured is not None:
        check_findings(outcome.measured)
    return outcome
