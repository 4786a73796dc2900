"""Credit for the tokens of rollouts, for trainers other than TRL's."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowtracer_plugin.credit.read_rollouts import Late
from flowtracer_plugin.credit.scorers import LATE
from flowtracer_plugin.credit.weights import credit_weights
from flowtracer_plugin.flow.validation import read_checks
from flowtracer_plugin.grpo.options import CreditOptions
from flowtracer_plugin.grpo.scoring import RolloutScorer
from flowtracer_plugin.model.causal_lm import first_output, text_inputs
from flowtracer_plugin.model.cutting import plainly
from flowtracer_plugin.model.padding import moved_back, text_first
from flowtracer_plugin.options import preset_over
from flowtracer_plugin.text.spans import AnswerNotFoundError
from flowtracer_plugin.trace.rollouts import check_rollouts
from flowtracer_plugin.trace.tracer import FlowTracer


def rollout_credit(
    tracer: FlowTracer,
    prompt_ids: Int[Tensor, "batch prompt"],
    completion_ids: Int[Tensor, "batch completion"],
    prompt_mask: Int[Tensor, "batch prompt"] | Bool[Tensor, "batch prompt"],
    completion_mask: Int[Tensor, "batch completion"] | Bool[Tensor, "batch completion"],
    options: CreditOptions | None = None,
    *,
    advantages: Float[Tensor, " batch"] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> Float[Tensor, "batch completion"]:
    """The weights by which a trainer multiplies the advantages of its tokens.

    Outside the completions, and in rows without an answer, they are 1. The tracer's model reads the
    rollouts in a forward pass without a gradient; it may be the policy or another model.

    Args:
        tracer: What `wrap(model, tokenizer)` returns. Where the scorer has a preset
            (`flow:decided`), the graph is made by that; else by the tracer's own options, or as in
            the paper if neither a preset nor an option of the graph was passed to `wrap`.
        prompt_ids: The prompts, padded on the left.
        completion_ids: The completions, padded on the right.
        prompt_mask: 1 for tokens of the prompts, 0 for padding.
        completion_mask: 1 for the tokens that compete for credit, 0 for others.
        options: Scorer, share and factor; by default those of `CreditOptions`. Those that concern
            a training run (pass, steps, pages) do not count.
        advantages: The rollouts' advantages, for `CreditOptions(sign="positive")`.
        batch_size: Rollouts in one forward pass; all by default.
        seed: Seed of scorers that draw.

    Raises:
        AnswerNotFoundError: A completion has no answer, with `CreditOptions(no_answer="raise")`.
        ValueError: Shapes differ, prompts are padded on the right, the tracer has no tokenizer,
            `sign` needs advantages, or, with `on_error="raise"`, a row cannot be read.
        UnsupportedArchitectureError: The scorer needs a pass that the model cannot make.
    """
    options = options or CreditOptions()
    read_checks(check_rollouts(prompt_ids, completion_ids, prompt_mask, completion_mask))
    if options.sign != "both" and advantages is None:
        raise ValueError(
            f"sign={options.sign!r} needs the sign of each rollout's advantage; pass advantages="
        )
    scorer, start = options.chosen_scorer, prompt_ids.shape[1]
    ids = torch.cat([prompt_ids, completion_ids], 1)
    competing = completion_mask.bool()
    visible = torch.cat([prompt_mask.bool(), competing], 1)
    scoring = RolloutScorer(
        _following(tracer, options),
        scorer,
        last=options.no_answer == "last",
        seed=seed,
        oracle=options.oracle,
    )
    with tracer.reader.exclusive():
        tracer.reader.verify()
        scoring.prepare()
        late = _late(tracer, ids, visible, start) if scorer.needs & LATE else None
        found = scoring.read(ids, visible, start, batch_size or len(ids), late)
    found = found.chosen(scorer, competing, options.top_fraction)
    assert found.wrong is not None
    found = found.read(found.wrong.tolist())
    missing = [row for row, answer in enumerate(found.answers) if answer is None]
    if options.on_error == "raise":
        for row, error in found.errors.items():
            error.add_note(f"in completion {row}")
            raise error
    if missing and options.no_answer == "raise":
        raise AnswerNotFoundError(
            f"no answer found in completions {missing}; set CreditOptions(answer=...) to a finder "
            "that matches, or no_answer='uniform'"
        )
    assert found.boost is not None
    weights = credit_weights(
        found.boost, competing, gamma=options.gamma, normalize=options.normalize
    )
    if options.sign == "both" or advantages is None:
        return weights
    signed = advantages > 0 if options.sign == "positive" else advantages < 0
    return torch.where(signed.to(weights.device)[:, None], weights, 1.0)


def _following(tracer: FlowTracer, options: CreditOptions) -> FlowTracer:
    """A tracer of the same model with the scorer's preset, and the answers of the options."""
    # What `wrap` chooses where nobody did is for looking; credit is the paper's by default.
    preset = options.chosen_scorer.preset or ("paper" if tracer.by_default else None)
    own = tracer.options
    made = own if preset is None else preset_over(preset, tracer.chosen)
    if options.layers != "auto":
        chosen = options.layers
        made = replace(made, layers=chosen if isinstance(chosen, str) else tuple(chosen))
    if options.target is not None:
        made = replace(made, target=options.target)
    answer = tracer.answer if options.answer == "auto" else options.answer
    if made == own and answer is tracer.answer:
        return tracer
    return FlowTracer(
        tracer.reader, tracer.require_tokenizer(), made, answer, "dense", tracer.chosen
    )


def _late(tracer: FlowTracer, ids: Tensor, visible: Tensor, start: int) -> Late:
    """Entropies and surprisals of the completions' tokens, by a forward pass."""
    ordered_ids, ordered = text_first(ids, visible)
    with torch.no_grad(), plainly(tracer.model):
        inputs = text_inputs(tracer.model, ordered_ids, ordered)
        logits = first_output(tracer.model(**inputs))
    chances = logits[:, :-1].float().log_softmax(-1)
    told = torch.zeros(2, *ordered.shape, device=chances.device)
    told[0, :, 1:] = torch.special.entr(chances.exp()).sum(-1)
    told[1, :, 1:] = -chances.gather(-1, ordered_ids[:, 1:, None])[..., 0]
    return Late(*(moved_back(one, visible)[:, start:] for one in told))
