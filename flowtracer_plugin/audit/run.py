"""Do a score's token weights turn the policy gradient in the right direction?

A large batch of rollouts gives a reference: GRPO's own gradient. In small batches of other prompts,
each score's weights tilt the gradient, and its cosine with the reference says whether they tilt it
towards the gradient of many more rollouts. Credit that tells signal from noise raises the
cosine; credit that only makes steps larger leaves it unchanged.

The gradient is linear in the weights, `g(1 + (gamma − 1) · boost) = g(1) + (gamma − 1) · g(boost)`,
so one backward pass per scorer and batch serves every gamma and also the chosen tokens alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from flowtracer_plugin.audit.policy_gradient import (
    TokenProbabilities,
    gradients_for,
    token_probabilities,
    weighted_gradient,
)
from flowtracer_plugin.audit.sampling import Group, padded
from flowtracer_plugin.credit.read_rollouts import Late, ReadRollouts
from flowtracer_plugin.credit.scorers import SCORERS, Scorer
from flowtracer_plugin.evaluation.progress import Progress, Say
from flowtracer_plugin.evaluation.token_sets import CLASS_NAMES, token_classes
from flowtracer_plugin.model.causal_lm import input_device
from flowtracer_plugin.text.matched_spans import SpanFinder
from flowtracer_plugin.text.spans import decode_tokens
from flowtracer_plugin.trace.rollouts import rollout_masks
from flowtracer_plugin.trace.tracer import FlowTracer
from flowtracer_plugin.trace.troubles import Troubles

logger = logging.getLogger(__name__)

Vector = Float[Tensor, " parameter"]


class NoSignalError(ValueError):
    """The rewards of the rollouts say nothing about which tokens were good."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditOptions:
    """How an audit compares scorers.

    Attributes:
        batches: Number of batches that the prompts are split into; even. The reference of each
            half of the batches is the gradient of the other half.
        top_fraction: Share of a completion's tokens that a scorer chooses.
        temperature: Temperature at which the completions were sampled.
        seed: Seed of scorers that draw at random.
    """

    batches: int = 16
    top_fraction: float = 0.4
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: A value is out of range.
        """
        if self.batches < 4 or self.batches % 2:
            raise ValueError(f"batches must be an even number of at least 4, got {self.batches!r}")
        if not 0 < self.top_fraction <= 1:
            raise ValueError(f"top_fraction must be above 0 and up to 1, got {self.top_fraction!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tilt:
    """What a scorer chose in one batch, and how that tilts the gradient; plain numbers.

    Attributes:
        with_reference: `⟨g(boost), r⟩` with the other half's gradient `r`, scaled to length 1.
        with_uniform: `⟨g(boost), g(1)⟩`.
        squared: `‖g(boost)‖²`.
        chosen: Sum of the boosts.
        entropy: Sum of the boosts times the entropy of each token, in nats.
        classes: Sum of the boosts in each class of tokens, see `token_sets.CLASS_NAMES`.
        answer: Sum of the boosts of the answer's own tokens.
    """

    with_reference: float
    with_uniform: float
    squared: float
    chosen: float
    entropy: float
    classes: tuple[float, ...]
    answer: float


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchAudit:
    """The findings of one batch; plain numbers.

    Attributes:
        number: Number of the batch.
        with_reference: `⟨g(1), r⟩`.
        squared: `‖g(1)‖²`.
        tokens: Number of tokens that scorers could choose, in groups whose rewards differ.
        classes: Number of these tokens in each class.
        entropy: Sum of the entropies of these tokens, in nats.
        tilts: The tilt of every scorer, by its name.
    """

    number: int
    with_reference: float
    squared: float
    tokens: int
    classes: tuple[int, ...]
    entropy: float
    tilts: Mapping[str, Tilt] = field(default_factory=dict)


def split_into_batches(groups: Sequence[Group], batches: int) -> list[list[Group]]:
    """The batches, each without the groups that have no signal.

    Neighbours in the data go to different batches, so that both halves cover all of the data.

    Raises:
        NoSignalError: One half of the batches has no group with signal.
    """
    parts = [[one for one in groups[start::batches] if one.has_signal] for start in range(batches)]
    if not (any(parts[0::2]) and any(parts[1::2])):
        raise NoSignalError(
            f"among {len(groups)} prompts, none in one half got completions with different "
            "rewards, so no token is any better than another; take more prompts or "
            "completions, or prompts that the model sometimes gets right"
        )
    return parts


def audit(
    tracer: FlowTracer,
    groups: Sequence[Group],
    scorers: Sequence[Scorer],
    parameters: Sequence[nn.Parameter],
    options: AuditOptions,
    *,
    oracle: SpanFinder | None = None,
    done: Iterable[int] = (),
    progress: bool = False,
    say: Say | None = None,
) -> Iterator[BatchAudit]:
    """The findings of each batch, first of those with even numbers, then of those with odd ones.

    Batches in which all rewards of each prompt are equal are left out.

    Args:
        tracer: Tracer of the policy.
        groups: Prompts with their completions and rewards.
        scorers: Scorers that are compared with uniform credit.
        parameters: Parameters whose gradient is measured.
        options: How scorers are compared.
        oracle: Finder of the tokens that the scorer `oracle` chooses.
        done: Numbers of batches that need not be measured again.
        progress: Show a progress bar.
        say: Without a bar, gets a line for each prompt.

    Raises:
        NoSignalError: As `split_into_batches`.
        ValueError: A scorer lacks what it needs.
    """
    batches, known = split_into_batches(groups, options.batches), set(done)
    left = {number for number, batch in enumerate(batches) if batch} - known
    if not left:
        return
    # Odd batches run twice, since holding all their gradients would take too much memory: first for
    # the reference of the even ones, whose own sum is then the reference of the odd ones.
    passes = [*batches[0::2], *batches[1::2], *(batches[n] for n in left if n % 2)]
    with (
        gradients_for(tracer.model, parameters),
        Progress("gradient", sum(map(len, passes)), progress=progress, say=say) as shown,
    ):
        policy = _Policy(tracer, scorers, parameters, options, oracle, shown)
        reference = _unit(policy.gradient(chain.from_iterable(batches[1::2])))
        total = policy.zeros()
        for number in range(0, options.batches, 2):
            if number in left:
                yield policy.measure(number, batches[number], reference, total)
                logger.info("batch %d of %d is measured", number, options.batches)
            else:
                total += policy.gradient(batches[number])
        reference = _unit(total)
        for number in sorted(one for one in left if one % 2):
            yield policy.measure(number, batches[number], reference, total)
            logger.info("batch %d of %d is measured", number, options.batches)


def _unit(vector: Vector) -> Vector:
    return vector / vector.norm().clamp_min(torch.finfo(vector.dtype).tiny)


class _GroupPass(NamedTuple):
    """A group as a padded batch, and one forward pass over it."""

    group: Group
    ids: Int[Tensor, "completion whole"]
    visible: Bool[Tensor, "completion whole"]
    probabilities: TokenProbabilities
    advantages: Float[Tensor, "completion token"]


@dataclass(frozen=True)
class _Policy:
    """A policy with the parameters and scorers of an audit; `shown` gets a step per group."""

    tracer: FlowTracer
    scorers: Sequence[Scorer]
    parameters: Sequence[nn.Parameter]
    options: AuditOptions
    oracle: SpanFinder | None
    shown: Progress
    troubles: Troubles = field(default_factory=lambda: Troubles(logger))

    def gradient(self, groups: Iterable[Group]) -> Vector:
        """`Σ A log p` over all tokens of the groups, differentiated; only its direction matters."""
        total = self.zeros()
        for group in groups:
            run = self._run(group)
            total += self._weighted(run, run.advantages)
            self.shown.step(f"row {group.row} in a reference")
        return total

    def measure(
        self, number: int, groups: Sequence[Group], reference: Vector, total: Vector
    ) -> BatchAudit:
        """The findings of one batch, whose uniform gradient is added to `total`."""
        plain = self.zeros()
        tilted = {scorer.name: self.zeros() for scorer in self.scorers}
        sums = {scorer.name: np.zeros(_SUMS) for scorer in self.scorers}
        everything = np.zeros(_SUMS)
        for group in groups:
            run = self._run(group)
            read = self._read(run)
            plain += self._weighted(run, run.advantages)
            uniform = read.rollouts(_UNIFORM)
            tokens = _Tokens(self.tracer, run, uniform.answer)
            everything += tokens.sums(uniform.competing.float())
            with self.shown.inner("scorer", len(self.scorers)) as tick:
                for scorer in self.scorers:
                    boost = self._boost(scorer, read)
                    sums[scorer.name] += tokens.sums(boost)
                    if bool(boost.any()):
                        tilted[scorer.name] += self._weighted(run, run.advantages * boost)
                    tick(1)
            self.shown.step(f"row {group.row} with every scorer")
        total += plain
        return BatchAudit(
            number=number,
            with_reference=float(plain @ reference),
            squared=float(plain @ plain),
            tokens=int(everything[0]),
            entropy=float(everything[1]),
            classes=tuple(int(one) for one in everything[3:]),
            tilts={
                name: Tilt(
                    with_reference=float(vector @ reference),
                    with_uniform=float(vector @ plain),
                    squared=float(vector @ vector),
                    chosen=float(sums[name][0]),
                    entropy=float(sums[name][1]),
                    answer=float(sums[name][2]),
                    classes=tuple(sums[name][3:].tolist()),
                )
                for name, vector in tilted.items()
            },
        )

    def _boost(self, scorer: Scorer, read: ReadRollouts) -> Float[Tensor, "completion token"]:
        """The scorer's choice; a completion in which it fails has none."""
        rollouts = read.rollouts(scorer)
        features, share = scorer.measure(rollouts), self.options.top_fraction
        boost, wrong = scorer.choices(features, rollouts, share)
        for row, error in {**wrong, **read.errors}.items():
            boost[row] = 0.0
            self.troubles.add(f"{scorer.name} chooses nothing in a completion", error)
        return boost

    def zeros(self) -> Vector:
        size = sum(one.numel() for one in self.parameters)
        return torch.zeros(size, device=self.parameters[0].device)

    def _weighted(self, run: _GroupPass, weights: Float[Tensor, "completion token"]) -> Vector:
        return weighted_gradient(run.probabilities.log_probs, weights, self.parameters)

    def _run(self, group: Group) -> _GroupPass:
        model, start = self.tracer.model, len(group.prompt_ids)
        ids, visible = padded(group, input_device(model))
        temperature = self.options.temperature
        probabilities = token_probabilities(model, ids, visible, start, temperature)
        advantages = group.advantages.to(ids.device)[:, None] * visible[:, start:]
        return _GroupPass(group, ids, visible, probabilities, advantages)

    def _read(self, run: _GroupPass) -> ReadRollouts:
        """The group as `ReadRollouts`, from which each scorer gets what it needs."""
        tracer, start = self.tracer, len(run.group.prompt_ids)
        masks = rollout_masks(
            tracer.require_tokenizer(), run.ids, run.visible, start, tracer.options, tracer.answer
        )
        surprisals = -run.probabilities.log_probs.detach()
        return ReadRollouts(
            tracer,
            run.ids,
            run.visible,
            start,
            masks,
            late=partial(Late, run.probabilities.entropies, surprisals),
            oracle=self.oracle,
            seed=self.options.seed,
        )


_UNIFORM = SCORERS["uniform"]
_SUMS = 3 + len(CLASS_NAMES)


class _Tokens:
    """Entropy and class of each completion token of a group, and whether it is in the answer."""

    def __init__(
        self, tracer: FlowTracer, run: _GroupPass, answer: Bool[Tensor, "completion whole"]
    ) -> None:
        self._entropies = run.probabilities.entropies.cpu().double().numpy()
        self._answer = answer[:, len(run.group.prompt_ids) :].cpu().numpy()
        self._classes = np.full(self._answer.shape, -1)
        tokenizer = tracer.require_tokenizer()
        for row, ids in enumerate(run.group.completions):
            pieces = decode_tokens(tokenizer, ids).pieces
            self._classes[row, : len(ids)] = token_classes(pieces)

    def sums(self, boost: Float[Tensor, "completion token"]) -> Float[np.ndarray, " sum"]:
        """Sums of the boost: of all tokens, times entropy, of answer tokens, and of each class."""
        weights = boost.cpu().double().numpy()
        by_class = [float(weights[self._classes == kind].sum()) for kind in range(len(CLASS_NAMES))]
        whole = [weights.sum(), (weights * self._entropies).sum(), weights[self._answer].sum()]
        return np.array([*whole, *by_class])
