"""Does the model come to another answer if it must continue without a score's top tokens?

The paper's causal test: attention to a share of the tokens of a response is cut, and the model
writes the rest again. The paper does not say where it cuts the response off; here it is after a
share of the tokens before the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from flowtracer_plugin.credit.token_scores import TOKEN_SCORES, TokenScore
from flowtracer_plugin.evaluation.knockout import hidden_edges
from flowtracer_plugin.evaluation.ranked_tokens import KnockOutOptions
from flowtracer_plugin.evaluation.scored_example import ScoredExample
from flowtracer_plugin.evaluation.token_sets import (
    ChosenSets,
    Mask,
    matched_draw,
    set_size,
    tops_and_bottoms,
)
from flowtracer_plugin.model.cutting import check_model, cutting
from flowtracer_plugin.model.generation import generate_ids
from flowtracer_plugin.text.answers import same_answer
from flowtracer_plugin.text.spans import answer_mask, decode_tokens
from flowtracer_plugin.trace.flow_trace import FlowTrace
from flowtracer_plugin.trace.tracer import FlowTracer


@dataclass(frozen=True, kw_only=True, slots=True)
class Regeneration:
    """The model's answers without some tokens.

    Attributes:
        score: The score that chose the tokens, or `random`.
        side: `"top"` or `"bottom"`.
        answers: The answer without each set of tokens; None where no answer was found.
        changed: Share of the answers that differ from the one that the model gives with all tokens.
        reversed: Share of the answers that are right where that one is wrong, or wrong where it is
            right; None if the right answer is not known.
    """

    score: str
    side: str
    answers: tuple[str | None, ...]
    changed: float
    reversed: float | None


def regenerate(
    tracer: FlowTracer,
    trace: FlowTrace,
    *,
    scores: Mapping[str, TokenScore] = TOKEN_SCORES,
    right: str | None = None,
    percent: int = 20,
    keep: float = 0.5,
    draws: int = 5,
    seed: int = 0,
    max_new_tokens: int = 256,
) -> tuple[Regeneration, ...]:
    """The model's answers if it writes the rest of a response again without some tokens.

    The hidden tokens are a score's top or bottom, or random ones. Decoding is greedy. Neither
    new tokens nor later ones of the part that is kept can attend to them.

    Args:
        tracer: The tracer that made the trace; answers are found by its rule.
        trace: A trace that holds its attention, as with `wrap(..., mode="dense")`.
        scores: The scores by name.
        right: The right answer, if it is known.
        percent: Share of the kept tokens that is knocked out.
        keep: Share of the response before the answer that is kept.
        draws: Number of random sets.
        seed: Seed of the draws.
        max_new_tokens: The most tokens that are written again.

    Raises:
        TooFewTokensError: Fewer than 10 tokens of the response are kept.
        KnockOutError: The model's attention cannot be cut.
        ValueError: `keep` is not above 0 and at most 1, or as `measure_knock_outs`.
    """
    options = KnockOutOptions(percents=(percent,), draws=draws, seed=seed)
    example = ScoredExample(tracer=tracer, trace=trace, scores=scores, right=right)
    return example_regeneration(example, options, keep=keep, max_new_tokens=max_new_tokens)


def example_regeneration(
    example: ScoredExample, options: KnockOutOptions, *, keep: float = 0.5, max_new_tokens: int
) -> tuple[Regeneration, ...]:
    """`regenerate` for an example that other protocols share; the largest percent counts."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be above 0 and at most 1, got {keep!r}")
    check_model(example.tracer.model)
    start, first = example.trace.spans.prompt_length, int(example.trace.spans.answer.argmax())
    stop = start + round(keep * (first - start))
    among = example.candidates(first - stop)
    count = set_size(int(among.sum()), max(options.percents))
    sets = tops_and_bottoms(example.values, among, [count])
    rng, group = example.rng(options.seed), among.astype(np.int64) - 1
    some = np.flatnonzero(among)[:count]
    draws = [matched_draw(some, group, rng) for _ in range(options.draws)]
    sets.append(ChosenSets("random", "top", draws))
    nothing = np.zeros_like(among)
    every = [nothing, *(mask for one in sets for mask in one.masks)]
    different = {mask.tobytes(): mask for mask in every}  # scores often agree
    answers: dict[bytes, str | None] = {}
    with example.bar("answer", len(different)) as tick:
        for key, mask in different.items():
            answers[key] = _answer_without(example, stop, mask, max_new_tokens)
            tick(1)
    usual = answers[nothing.tobytes()]
    return tuple(
        _compared(
            name, side, tuple(answers[mask.tobytes()] for mask in masks), usual, example.right
        )
        for name, side, masks in sets
    )


def _compared(
    name: str, side: str, answers: tuple[str | None, ...], usual: str | None, right: str | None
) -> Regeneration:
    changed = [not same_answer(one, usual) for one in answers]
    turned = [same_answer(one, right) != same_answer(usual, right) for one in answers]
    return Regeneration(
        score=name,
        side=side,
        answers=answers,
        changed=sum(changed) / len(changed),
        reversed=None if right is None else sum(turned) / len(turned),
    )


def _answer_without(
    example: ScoredExample, stop: int, hidden: Mask, max_new_tokens: int
) -> str | None:
    """The model's answer if it continues from `stop` and cannot see some tokens before it."""
    tracer, trace = example.tracer, example.trace
    tokenizer, kept = tracer.require_tokenizer(), trace.token_ids[:stop].tolist()
    tokens = torch.zeros(1, stop + max_new_tokens, dtype=torch.bool)
    tokens[0, :stop] = torch.from_numpy(hidden[:stop])
    edges = hidden_edges(tokens, torch.zeros_like(tokens[0]), rows="future")
    with tracer.reader.exclusive(), cutting(edges):
        said = generate_ids(
            tracer.model,
            kept,
            tokenizer=tokenizer,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            progress=False,
        )
    response = kept[trace.spans.prompt_length :] + said
    found = answer_mask(tokenizer, response, tracer.answer)
    if found is None:
        return None
    return decode_tokens(tokenizer, response).text[found[1].start : found[1].end]
