"""Does the model come to another answer if it must go on without a score's top?

The paper's causal test: attention to a share of the tokens of a response is cut, and the model
writes the rest again. Where the paper cuts the response off is not known; here it is after a share
of the tokens before the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool

from flowtracer_plugin.credit.token_scores import TOKEN_SCORES, TokenScore, read_text
from flowtracer_plugin.evaluation.faithfulness import (
    Mask,
    candidate_tokens,
    checked_scores,
    matched_draw,
    ranking,
    set_size,
)
from flowtracer_plugin.evaluation.knockout import hidden_edges
from flowtracer_plugin.model.cutting import check_model, cutting
from flowtracer_plugin.model.generation import generate_ids
from flowtracer_plugin.text.answers import same_answer
from flowtracer_plugin.text.spans import answer_mask, decode_tokens, special_ids
from flowtracer_plugin.trace.flow_trace import FlowTrace
from flowtracer_plugin.trace.tracer import FlowTracer


@dataclass(frozen=True, kw_only=True, slots=True)
class Regeneration:
    """What the model answered without some tokens.

    Attributes:
        score: By what they were chosen: a score's name, or `random`.
        side: `"top"` or `"bottom"`.
        answers: One for each set of tokens; None where none was found.
        changed: Share of the answers that are not what the model answers from there with all
            tokens.
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
    """Let the model write the rest of a response again, without the top and bottom of every score.

    Decoding is greedy. New tokens cannot attend to those that are knocked out, nor can later ones
    of the beginning that is kept.

    Args:
        tracer: Of the model that the trace is of; answers are found as it finds them.
        trace: With its attention, `wrap(..., mode="dense")`.
        scores: By name.
        right: The right answer, if it is known.
        percent: How many of the tokens that are kept are knocked out.
        keep: Share of the response before the answer that is kept.
        draws: Of random sets.
        seed: Of the draws.
        max_new_tokens: Length of what is written anew.

    Raises:
        TooFewTokensError: Fewer than 10 tokens of the response are kept.
        KnockOutError: The model's attention cannot be cut.
        ValueError: `keep` is not above 0 and at most 1, or as `measure_knock_outs`.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be above 0 and at most 1, got {keep!r}")
    check_model(tracer.model)
    start, first = trace.spans.prompt_length, int(trace.spans.answer.argmax())
    stop = start + round(keep * (first - start))
    special = np.isin(trace.token_ids, sorted(special_ids(tracer.require_tokenizer())))
    among = candidate_tokens(trace, special, gap=first - stop)
    text = read_text(tracer, trace)
    sets: list[tuple[str, str, list[Mask]]] = []
    count = set_size(int(among.sum()), percent)
    for name, score in scores.items():
        order = ranking(checked_scores(name, score(text)), among)
        sets.append((name, "top", [_chosen(among, order[:count])]))
        sets.append((name, "bottom", [_chosen(among, order[len(order) - count :])]))
    rng = np.random.default_rng([seed, *trace.token_ids.tolist()])
    group, some = among.astype(np.int64) - 1, np.flatnonzero(among)[:count]
    sets.append(("random", "top", [matched_draw(some, group, rng) for _ in range(draws)]))

    known: dict[bytes, str | None] = {}  # scores often agree

    def answer(hidden: Mask) -> str | None:
        key = hidden.tobytes()
        if key not in known:
            known[key] = _answer_without(tracer, trace, stop, hidden, max_new_tokens)
        return known[key]

    usual = answer(np.zeros_like(among))
    return tuple(
        _compared(name, side, tuple(answer(one) for one in masks), usual, right)
        for name, side, masks in sets
    )


def _chosen(among: Mask, places: np.ndarray) -> Bool[np.ndarray, " token"]:
    mask = np.zeros_like(among)
    mask[places] = True
    return mask


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
    tracer: FlowTracer, trace: FlowTrace, stop: int, hidden: Mask, max_new_tokens: int
) -> str | None:
    """What the model answers if it goes on from `stop` and some tokens before are hidden."""
    tokenizer, kept = tracer.require_tokenizer(), trace.token_ids[:stop].tolist()
    tokens = torch.zeros(1, stop + max_new_tokens, dtype=torch.bool)
    tokens[0, :stop] = torch.from_numpy(hidden[:stop])
    edges = hidden_edges(tokens, torch.zeros_like(tokens[0]), rows="future")
    with tracer.reader.exclusive(), cutting(edges):
        said = generate_ids(
            tracer.model,
            kept,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            pad_token_id=tokenizer.pad_token_id or 0,
            progress=False,
        )
    response = kept[trace.spans.prompt_length :] + said
    found = answer_mask(tokenizer, response, tracer.answer)
    if found is None:
        return None
    return decode_tokens(tokenizer, response).text[found[1].start : found[1].end]
