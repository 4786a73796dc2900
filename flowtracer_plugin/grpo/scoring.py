"""Scores of a policy's rollouts, from a forward pass of the trainer or from one of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowtracer_plugin.credit.measures import Features, Rollouts
from flowtracer_plugin.credit.read_rollouts import OWN_PASSES, Late, ReadRollouts
from flowtracer_plugin.credit.saliency import check_whole
from flowtracer_plugin.credit.scorers import LATE, Scorer, multiplied
from flowtracer_plugin.model.cutting import check_model
from flowtracer_plugin.reading.one_pass import Reading
from flowtracer_plugin.text.answers import (
    FoundAnswer,
)
from flowtracer_plugin.text.matched_spans import SpanFinder
from flowtracer_plugin.text.values import Span
from flowtracer_plugin.trace.rollouts import (
    OnHost,
    RowErrors,
    join_errors,
    rollout_masks,
    to_host,
)
from flowtracer_plugin.trace.tracer import FlowTracer

_ATTENTIVE = {"flow", "attention", "heads"}
"""What a scorer needs of attention: it is measured as soon as the attention has been read, so that
the map need not be kept. All else is measured when the forward pass has ended, also what needs
entropies beside the flow."""

_IN_STEPS = {"removals", "flow_removals"}


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Scored:
    """Rollouts with the measure by which a scorer chooses among their tokens.

    Attributes:
        rollouts: As the scorer sees them when it chooses; every visible token competes.
        features: The scores by which the scorer chooses.
        jump: Share of each row's flow that goes from the prompt straight to the target; NaN where
            no flow was solved.
        answers: The answer that was found in each row, or None.
        replaced: Number of rows in which the last token stands in for an answer.
        seconds: Time this took beside the forward passes that were made anyway.
        errors: The error of each row that has failed, by its number; such a row gets no boost.
        boost: The boost that the scorer chose; None before its choice.
        wrong: After its choice, True for rows whose scores cannot be used; their boost is 0. The
            host has not read it yet.
        invalid: Makes the error of such a row.
    """

    rollouts: Rollouts
    features: Features
    jump: Float[Tensor, " batch"]
    answers: tuple[FoundAnswer | None, ...]
    replaced: int
    seconds: float
    errors: RowErrors
    boost: Float[Tensor, "batch completion"] | None = None
    wrong: Bool[Tensor, " batch"] | None = None
    invalid: Callable[[], Exception] | None = None

    def chosen(
        self, scorer: Scorer, competing: Bool[Tensor, "batch completion"], top_fraction: float
    ) -> Scored:
        """The same with the scorer's choice among the competing tokens."""
        rollouts = replace(self.rollouts, competing=competing)
        boost, wrong = scorer.choices(self.features, rollouts, top_fraction)
        for row in self.errors:
            boost[row] = 0.0
        invalid = partial(scorer.invalid, self.features, rollouts)
        return replace(self, boost=boost, wrong=wrong, invalid=invalid)

    def read(self, wrong: Sequence[bool]) -> Scored:
        """The same with the errors of the rows that are `wrong`, which the host has now read."""
        rows = [row for row, one in enumerate(wrong) if one]
        if rows and self.invalid is not None:
            errors = {**dict.fromkeys(rows, self.invalid()), **self.errors}
            return replace(self, errors=errors, wrong=None)
        return replace(self, wrong=None)


class RolloutScorer:
    """Scores the tokens of rollouts by what a model attends to in them.

    Args:
        tracer: Reads the model, by the options of the scorer's preset.
        scorer: Measures the tokens and chooses among them.
        last: Whether the last token stands in for an answer where none is found.
        seed: Seed of scorers that draw.
        oracle: Finds the tokens for the scorer `oracle`.
    """

    def __init__(
        self,
        tracer: FlowTracer,
        scorer: Scorer,
        *,
        last: bool = False,
        seed: int = 0,
        oracle: SpanFinder | None = None,
    ) -> None:
        self.tracer, self.scorer = tracer, scorer
        self._last, self._seed, self._oracle = last, seed, oracle
        self._keeps_graph = False
        # The tracer already follows the preset, and the options that override it.
        self._parts = [replace(part, preset=None) for part in scorer.parts]

    @property
    def attends(self) -> bool:
        """Whether the scores depend on attention at all."""
        return bool(self.scorer.needs & _ATTENTIVE)

    def listen(
        self,
        call: Callable[[], Late],
        ids: Int[Tensor, "batch token"],
        visible: Bool[Tensor, "batch token"],
        prompt_length: int,
        batch_size: int,
        chances: Callable[[], Tensor] | None = None,
        host: OnHost | None = None,
    ) -> Scored:
        """Let `call` run the model on every `batch_size` rows, and score the rollouts from that.

        An error in the scores is raised when `call` has returned. If `chances` then gives the
        log-probabilities of the completions with their autograd graph, influence is taken from that
        graph, where it can be, and else from a pass before. `host` holds a copy of the rollouts, if
        there is one.
        """
        if self.tracer.options.edges == "influence" and chances is not None and self._keeps_graph:
            return self._graphed(call, ids, visible, prompt_length, batch_size, chances, host)
        started = perf_counter()
        batch, replaced = self._batch(ids, visible, prompt_length, batch_size, host=host)
        before = perf_counter() - started
        parts: list[_Part] = []

        def take(rows: slice, reading: Reading) -> None:
            parts.append(self._measured(batch.part(rows, reading)))

        late = self._heard(call, batch, take, later=False)
        started = perf_counter()
        scored = self._scored(batch, replaced, parts, late)
        return replace(scored, seconds=before + scored.seconds + perf_counter() - started)

    def _graphed(
        self,
        call: Callable[[], Late],
        ids: Int[Tensor, "batch token"],
        visible: Bool[Tensor, "batch token"],
        prompt_length: int,
        batch_size: int,
        chances: Callable[[], Tensor],
        host: OnHost | None,
    ) -> Scored:
        """What `listen` returns, with influence from the graph of the pass that `call` makes."""
        started = perf_counter()
        batch, replaced = self._batch(
            ids, visible, prompt_length, batch_size, host=host, later=True
        )
        readings: list[tuple[slice, Reading]] = []
        outputs = self.tracer.reader.outputs(self.tracer.layers)
        before = perf_counter() - started
        with outputs.listening():
            late = self._heard(call, batch, lambda *part: readings.append(part), later=True)
        started = perf_counter()
        # Checkpoints or frozen layers may hide some output from the graph; then there are none, and
        # `ReadRollouts.influence` makes a pass of its own.
        batch = replace(batch, sizes=outputs.influences(chances(), visible, batch.decided) or ())
        parts = [self._measured(batch.part(*part)) for part in readings]
        scored = self._scored(batch, replaced, parts, late)
        return replace(scored, seconds=before + perf_counter() - started)

    def _heard(
        self,
        call: Callable[[], Late],
        batch: ReadRollouts,
        take: Callable[[slice, Reading], None],
        *,
        later: bool,
    ) -> Late:
        """What `call` returns; `take` gets the attention of its passes, if the scorer needs it."""
        if not self.attends:
            return call()
        kept = {"sizes": batch.sizes, **self._kept(later=later)}
        size = batch.batch_size
        return self.tracer.reader.listen(
            call, batch.visible, self.tracer.layers, take, batch_size=size, **kept
        )

    def read(
        self,
        ids: Int[Tensor, "batch token"],
        visible: Bool[Tensor, "batch token"],
        prompt_length: int,
        batch_size: int,
        late: Late | None = None,
    ) -> Scored:
        """Run the model on `batch_size` rows at a time, up to the last layer that is read.

        An error in some rows is raised when all rows have been run, since other processes run
        theirs, too. `late` holds what is known of whole passes already.
        """
        started = perf_counter()
        batch, replaced = self._batch(ids, visible, prompt_length, batch_size)
        reader, layers = self.tracer.reader, self.tracer.layers
        parts: list[_Part] = []
        errors: list[Exception] = []
        for start in range(0, len(ids), batch_size) if self.attends else ():
            rows = slice(start, start + batch_size)
            try:
                sizes = [size[rows] for size in batch.sizes]
                kept = {"sizes": sizes, **self._kept(later=False)}
                reading = reader.read_in_place(ids[rows], visible[rows], layers, **kept)
                parts.append(self._measured(batch.part(rows, reading)))
            except Exception as error:  # noqa: BLE001 - raised below
                errors.append(error)
        if errors:
            raise errors[0]
        scored = self._scored(batch, replaced, parts, late)
        return replace(scored, seconds=perf_counter() - started)

    def _kept(self, *, later: bool) -> Mapping[str, Any]:
        """The parts that a reading must hold; `later` says that influence comes after it."""
        options = self.tracer.options
        summed = options.heads == "all" and not later
        keep = "heads" in self.scorer.needs or not summed
        return {"keep": keep, "edges": options.edges, "average": summed}

    def prepare(self) -> None:
        """Make the forward passes that are needed before the pass that is read.

        Raises:
            KnockOutError: The scorer hides tokens, and the model's attention cannot be cut.
            UnsupportedArchitectureError: Values cannot be weighed, or the model is sharded and the
                scorer needs passes of its own.
        """
        if self.scorer.needs.intersection(OWN_PASSES) or self.scorer.needs & _IN_STEPS:
            check_whole(self.tracer.model)
        if self.scorer.needs & _IN_STEPS:
            check_model(self.tracer.model)
            self.tracer.reader.projections  # noqa: B018 - as below
        if self.tracer.options.edges == "influence":
            self._keeps_graph = self.tracer.reader.keeps_graph
        elif self.tracer.options.edges == "value":
            self.tracer.reader.projections  # noqa: B018 - found once, by a run of the model

    def _batch(
        self,
        ids: Int[Tensor, "batch token"],
        visible: Bool[Tensor, "batch token"],
        prompt_length: int,
        batch_size: int,
        *,
        host: OnHost | None = None,
        later: bool = False,
    ) -> tuple[ReadRollouts, int]:
        """The rollouts before the pass, and the number of rows whose last token is the answer.

        `later` says that influence comes from the pass itself.
        """
        tracer = self.tracer
        masks = rollout_masks(
            tracer.require_tokenizer(),
            *(host or to_host(ids, visible)[0]),
            prompt_length,
            tracer.options,
            tracer.answer,
            fallback=last_character if self._last else None,
            device=ids.device,
        )
        batch = ReadRollouts(
            tracer,
            ids,
            visible,
            prompt_length,
            masks,
            oracle=self._oracle,
            seed=self._seed,
            batch_size=batch_size,
        )
        for part in OWN_PASSES:
            if part in self.scorer.needs:
                getattr(batch, part)  # its own passes must come before the one that is read
        if tracer.options.edges == "influence" and not later:  # the same
            batch = replace(batch, sizes=batch.influence(tracer.layers))
        for one in self._parts:
            batch.with_order(batch.plain, one)  # the same
        rules = [answer.rule for answer in masks.answers if answer]
        return batch, rules.count(last_character.__name__)

    @torch.no_grad()
    def _measured(self, part: ReadRollouts) -> _Part:
        """The measures that need attention, of rows whose attention has been read."""
        started = perf_counter()
        features = [one.measure(part.rollouts(one)) for one in self._parts if _is_early(one)]
        if any("flow" in one.needs for one in self._parts):
            part.graph()  # solved, also for what is measured later
        graph = part.graphs.get(None)
        reading = 0.0 if part.reading is None else part.reading.seconds
        return _Part(
            features=features,
            throughput=None if graph is None else graph.throughput,
            reach=None if graph is None else graph.reach,
            jump=None if graph is None else graph.jump,
            errors=(len(part.ids), part.errors),
            seconds=perf_counter() - started + reading,
        )

    @torch.no_grad()
    def _scored(
        self, batch: ReadRollouts, replaced: int, parts: Sequence[_Part], late: Late | None
    ) -> Scored:
        """All rows with all measures. The attention maps have been freed before."""
        flows = [part.throughput for part in parts if part.throughput is not None]
        reaches = [part.reach for part in parts if part.reach is not None]
        jumps = [part.jump for part in parts if part.jump is not None]
        unsolved = torch.full_like(batch.ids[:, 0], torch.nan, dtype=torch.float32)
        entropies, surprisals = late or Late()
        rollouts = replace(
            batch.plain,
            throughput=torch.cat(flows) if flows else None,
            reach=torch.cat(reaches) if reaches else None,
            entropies=entropies,
            surprisals=surprisals,
            **{part: getattr(batch, part) for part in OWN_PASSES if part in self.scorer.needs},
            oracle=batch.oracle_tokens if "oracle" in self.scorer.needs else None,
            tokens=batch.tokens if "tokens" in self.scorer.needs else None,
        )
        early = [torch.cat(rows, 1) for rows in zip(*(p.features for p in parts), strict=True)]
        features = [
            early.pop(0) if _is_early(one) else one.measure(batch.with_order(rollouts, one))
            for one in self._parts
        ]
        errors = {**batch.errors, **join_errors([part.errors for part in parts])}
        return Scored(
            rollouts=rollouts,
            features=features[0] if len(features) == 1 else multiplied(features),
            jump=torch.cat(jumps) if jumps else unsolved,
            answers=batch.masks.answers,
            replaced=replaced,
            seconds=sum((part.seconds for part in parts), 0.0),
            errors=errors,
        )


class _Part(NamedTuple):
    """Measures of some rows; their flow is None where none was solved.

    `errors` are their number and the errors of those that have failed.
    """

    features: list[Features]
    throughput: Float[Tensor, "batch token"] | None
    reach: Float[Tensor, "batch token"] | None
    jump: Float[Tensor, " batch"] | None
    errors: tuple[int, RowErrors]
    seconds: float


def _is_early(scorer: Scorer) -> bool:
    return bool(scorer.needs & _ATTENTIVE) and not scorer.needs & LATE


def last_character(text: str) -> Span | None:
    """The last character of a text that is no space."""
    end = len(text.rstrip())
    return (end - 1, end) if end else None
