"""Does weighing tokens by a score turn the policy gradient where it should go? Before training.

A large batch of rollouts gives a reference, GRPO's own gradient. In small batches of other prompts,
each score's weights tilt the gradient, and the cosine with the reference says whether they tilt it
towards what many more rollouts would have said: credit that tells signal from noise raises it, and
credit that only makes steps larger leaves it.

The gradient is linear in the weights, `g(1 + (gamma − 1) · boost) = g(1) + (gamma − 1) · g(boost)`,
so that one backward pass for each scorer and batch serves every gamma, and the chosen tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from flowtracer_plugin.audit.policy_gradient import Chances, chances_of, only, weighted_gradient
from flowtracer_plugin.audit.sampling import Group, padded
from flowtracer_plugin.credit.read_rollouts import Late, ReadRollouts
from flowtracer_plugin.credit.scorers import SCORERS, Scorer
from flowtracer_plugin.evaluation.token_sets import CLASS_NAMES, token_classes
from flowtracer_plugin.model.causal_lm import input_device
from flowtracer_plugin.text.matched_spans import SpanFinder
from flowtracer_plugin.text.spans import decode_tokens
from flowtracer_plugin.trace.rollouts import rollout_masks
from flowtracer_plugin.trace.tracer import FlowTracer

Vector = Float[Tensor, " parameter"]


class NoSignalError(ValueError):
    """The rewards of the rollouts say nothing about which tokens were good."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditOptions:
    """What is compared.

    Attributes:
        batches: Into how many the prompts are cut; an even number. Those of each half have the
            other half as their reference.
        top_fraction: Share of a completion's tokens that a scorer chooses.
        temperature: That completions were sampled with.
        seed: Of scorers that draw.
    """

    batches: int = 16
    top_fraction: float = 0.4
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that no option has.

        Raises:
            ValueError: A value is out of range.
        """
        if self.batches < 4 or self.batches % 2:
            raise ValueError(f"batches must be an even number of at least 4, got {self.batches!r}")
        if not 0 < self.top_fraction <= 1:
            raise ValueError(f"top_fraction must be above 0 and up to 1, got {self.top_fraction!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tilt:
    """What a scorer's choice does to the gradient of one batch, and what it chose; plain numbers.

    Attributes:
        with_reference: `⟨g(boost), r⟩` with the other half's gradient `r`, scaled to length 1.
        with_uniform: `⟨g(boost), g(1)⟩`.
        squared: `‖g(boost)‖²`.
        chosen: Sum of the boosts.
        entropy: The same, times the entropy of each token, in nats.
        classes: The same, by the class of the token, see `faithfulness.CLASS_NAMES`.
        answer: The same, of the answer's own tokens.
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
    """What was found in one batch; plain numbers.

    Attributes:
        number: Of the batch.
        with_reference: `⟨g(1), r⟩`.
        squared: `‖g(1)‖²`.
        tokens: That competed, in groups whose rewards differ.
        classes: The same, by class.
        entropy: Sum of their entropies, in nats.
        tilts: Of every scorer.
    """

    number: int
    with_reference: float
    squared: float
    tokens: int
    classes: tuple[int, ...]
    entropy: float
    tilts: Mapping[str, Tilt] = field(default_factory=dict)


def cut(groups: Sequence[Group], batches: int) -> tuple[tuple[Group, ...], ...]:
    """The groups in so many batches, neighbours apart, so that both halves see all of the data.

    Raises:
        NoSignalError: No group has rewards that differ, in a whole half.
    """
    parts = tuple(tuple(groups[start::batches]) for start in range(batches))
    for half in (0, 1):
        if not any(group.tells for part in parts[half::2] for group in part):
            raise NoSignalError(
                f"of {len(groups)} prompts, none in one half got completions with different "
                "rewards, so no token is any better than another; take more prompts or "
                "completions, or ones that the model gets right sometimes"
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
) -> Iterator[BatchAudit]:
    """Audit batch by batch. Batches without any signal, as all rewards are equal, are left out.

    Args:
        tracer: Of the policy.
        groups: Prompts with their completions and rewards.
        scorers: What is compared with uniform credit.
        parameters: Whose gradient is looked at.
        options: How.
        oracle: What the scorer `oracle` is told.
        done: Numbers of batches that are known already.
        progress: Show a bar.

    Raises:
        NoSignalError: As `cut`.
        ValueError: A scorer lacks what it needs.
    """
    parts, known = cut(groups, options.batches), set(done)
    every = [group for part in parts for group in part if group.tells]
    wanted = [group for number, part in enumerate(parts) if number not in known for group in part]
    steps = len(every) + sum(group.tells for group in wanted)
    with (
        only(tracer.model, parameters),
        tqdm(total=steps, desc="auditing", unit="prompt", disable=not progress) as bar,
    ):
        policy = _Policy(tracer, parameters, options, bar.update)
        references = [
            _unit(policy.gradient([group for part in parts[half::2] for group in part]))
            for half in (0, 1)
        ]
        for number, part in enumerate(parts):
            if number not in known and any(group.tells for group in part):
                reference = references[1 - number % 2]
                yield policy.audited(number, part, scorers, reference, oracle)


def _unit(vector: Vector) -> Vector:
    return vector / vector.norm().clamp_min(torch.finfo(vector.dtype).tiny)


class _Policy:
    """The gradients of a policy by some of its parameters."""

    def __init__(
        self,
        tracer: FlowTracer,
        parameters: Sequence[nn.Parameter],
        options: AuditOptions,
        finished: Callable[[], object],
    ) -> None:
        self._tracer, self._parameters = tracer, parameters
        self._options, self._finished = options, finished

    def gradient(self, groups: Sequence[Group]) -> Vector:
        """`Σ A log p` over all tokens of the groups; of the direction alone anything is asked."""
        total = self._nothing()
        for group in groups:
            if group.tells:
                _, _, chances, advantages = self._run(group)
                total += weighted_gradient(chances, advantages, self._parameters)
                self._finished()
        return total

    def audited(
        self,
        number: int,
        groups: Sequence[Group],
        scorers: Sequence[Scorer],
        reference: Vector,
        oracle: SpanFinder | None,
    ) -> BatchAudit:
        """What each scorer does to the gradient of a batch."""
        plain = self._nothing()
        tilted = {scorer.name: self._nothing() for scorer in scorers}
        counts = {scorer.name: np.zeros(_COUNTS) for scorer in scorers}
        total = np.zeros(_COUNTS)
        for group in groups:
            if not group.tells:
                continue
            ids, visible, chances, advantages = self._run(group)
            read = self._read(group, ids, visible, chances, oracle)
            plain += weighted_gradient(chances, advantages, self._parameters)
            kinds = _Kinds(self._tracer, group, read, chances)
            total += kinds.counted(read.rollouts(_UNIFORM).competing.float())
            for scorer in scorers:
                rollouts = read.rollouts(scorer)
                boost = scorer.boost(rollouts, self._options.top_fraction)
                counts[scorer.name] += kinds.counted(boost)
                if bool(boost.any()):
                    tilted[scorer.name] += weighted_gradient(
                        chances, advantages * boost, self._parameters
                    )
            self._finished()
        return BatchAudit(
            number=number,
            with_reference=float(plain @ reference),
            squared=float(plain @ plain),
            tokens=int(total[0]),
            entropy=float(total[1]),
            classes=tuple(int(one) for one in total[3:]),
            tilts={
                name: Tilt(
                    with_reference=float(vector @ reference),
                    with_uniform=float(vector @ plain),
                    squared=float(vector @ vector),
                    chosen=float(counts[name][0]),
                    entropy=float(counts[name][1]),
                    answer=float(counts[name][2]),
                    classes=tuple(counts[name][3:].tolist()),
                )
                for name, vector in tilted.items()
            },
        )

    def _nothing(self) -> Vector:
        size = sum(one.numel() for one in self._parameters)
        return torch.zeros(size, device=self._parameters[0].device)

    def _run(
        self, group: Group
    ) -> tuple[
        Int[Tensor, "completion whole"],
        Bool[Tensor, "completion whole"],
        Chances,
        Float[Tensor, "completion token"],
    ]:
        """A group's ids and mask, what the policy thought of it, and each token's advantage."""
        model, start = self._tracer.model, len(group.prompt_ids)
        ids, visible = padded(group, input_device(model))
        chances = chances_of(model, ids, visible, start, self._options.temperature)
        return ids, visible, chances, group.advantages.to(ids.device)[:, None] * visible[:, start:]

    def _read(
        self,
        group: Group,
        ids: Int[Tensor, "completion whole"],
        visible: Bool[Tensor, "completion whole"],
        chances: Chances,
        oracle: SpanFinder | None,
    ) -> ReadRollouts:
        """A group as scorers see it."""
        tracer, start = self._tracer, len(group.prompt_ids)
        masks = rollout_masks(
            tracer.require_tokenizer(), ids, visible, start, tracer.options, tracer.answer
        )
        late = partial(Late, chances.entropies, -chances.log_probs.detach())
        return ReadRollouts(
            tracer,
            ids,
            visible,
            start,
            masks,
            late=late,
            oracle=oracle,
            seed=self._options.seed,
        )


_UNIFORM = SCORERS["uniform"]
_COUNTS = 3 + len(CLASS_NAMES)


class _Kinds:
    """What kinds of tokens a group has."""

    def __init__(
        self, tracer: FlowTracer, group: Group, read: ReadRollouts, chances: Chances
    ) -> None:
        plain = read.rollouts(_UNIFORM)
        start = len(group.prompt_ids)
        self._entropies = chances.entropies.cpu().double().numpy()
        self._answer = plain.answer[:, start:].cpu().numpy()
        self._classes = np.full(self._answer.shape, -1)
        tokenizer = tracer.require_tokenizer()
        for row, ids in enumerate(group.completions):
            pieces = decode_tokens(tokenizer, ids).pieces
            self._classes[row, : len(ids)] = token_classes(pieces)

    def counted(self, boost: Float[Tensor, "completion token"]) -> Float[np.ndarray, " count"]:
        """Sums of the boost: in all, times entropy, of the answers, and of each class."""
        weights = boost.cpu().double().numpy()
        by_class = [float(weights[self._classes == kind].sum()) for kind in range(len(CLASS_NAMES))]
        whole = [weights.sum(), (weights * self._entropies).sum(), weights[self._answer].sum()]
        return np.array([*whole, *by_class])
