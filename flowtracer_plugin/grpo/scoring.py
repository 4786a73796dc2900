"""What a policy attends to in its rollouts, as scores of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowtracer_plugin.credit.read_rollouts import Late, oracle_mask
from flowtracer_plugin.credit.saliency import answer_saliency, check_whole
from flowtracer_plugin.credit.scorers import LATE, Rollouts, Scorer, multiplied
from flowtracer_plugin.reading.edges import completions, edge_choice
from flowtracer_plugin.reading.one_pass import Reading
from flowtracer_plugin.text.answers import AnswerFinder, FoundAnswer, Span, find_answer
from flowtracer_plugin.text.matched_spans import SpanFinder
from flowtracer_plugin.trace.rollouts import RolloutMasks, rollout_masks, solve_rollouts
from flowtracer_plugin.trace.tracer import FlowTracer


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Scored:
    """Rollouts with what a scorer chooses among their tokens by.

    Attributes:
        rollouts: As the scorer sees them when it chooses; every visible token competes.
        features: What it chooses by.
        jump: Share of each row's flow that goes from the prompt straight to the target; NaN where
            no flow was solved.
        answers: What was found in each row; `None` where nothing was.
        replaced: Rows in which the last token stands in for an answer.
        seconds: That it took, beside the forward passes that were made anyway.
        boost: What the scorer chose, once it has.
    """

    rollouts: Rollouts
    features: Float[Tensor, "feature batch completion"]
    jump: Float[Tensor, " batch"]
    answers: tuple[FoundAnswer | None, ...]
    replaced: int
    seconds: float
    boost: Float[Tensor, "batch completion"] | None = None


class RolloutReader:
    """Scores the tokens of rollouts by what a model attends to in them.

    Args:
        tracer: Of the model.
        scorer: What the scores mean.
        last: Whether the last token stands in for an answer where none is found.
        seed: Of scorers that draw.
        oracle: What the scorer `oracle` is told.
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

    @property
    def attends(self) -> bool:
        """Whether the scores depend on attention at all."""
        return bool(self.scorer.needs & {"flow", "attention", "heads"})

    def listen(
        self,
        call: Callable[[], Late],
        ids: Int[Tensor, "batch token"],
        visible: Bool[Tensor, "batch token"],
        prompt_length: int,
        batch_size: int,
    ) -> Scored:
        """Let `call` run the model on every `batch_size` rows, and return what is known then.

        What goes wrong with the scores is raised when `call` has returned.
        """
        started = perf_counter()
        batch = self._batch(ids, visible, prompt_length, batch_size)
        before = perf_counter() - started
        parts: list[_Part] = []

        def take(rows: slice, reading: Reading) -> None:
            parts.append(self._part(batch.rows(rows), reading))

        if self.attends:
            tracer = self.tracer
            late = tracer.reader.listen(
                call, visible, tracer.layers, take, batch_size=batch_size, **self._kept
            )
        else:
            late = call()
            parts.append(self._part(batch, None))
        scored = batch.scored(parts, self.scorer, late)
        return replace(scored, seconds=before + scored.seconds)

    def read(
        self,
        ids: Int[Tensor, "batch token"],
        visible: Bool[Tensor, "batch token"],
        prompt_length: int,
        batch_size: int,
        late: Late | None = None,
    ) -> Scored:
        """Run the model on `batch_size` rows at a time, up to the last layer that is read.

        What goes wrong with some rows is raised when all have been run, as on other processes.
        `late` is what is known of whole passes already.
        """
        started = perf_counter()
        batch = self._batch(ids, visible, prompt_length, batch_size)
        if not self.attends:
            return batch.scored([self._part(batch, None)], self.scorer, late)
        reader, layers = self.tracer.reader, self.tracer.layers
        parts: list[_Part] = []
        errors: list[Exception] = []
        for start in range(0, len(ids), batch_size):
            rows = slice(start, start + batch_size)
            try:
                reading = reader.read_in_place(ids[rows], visible[rows], layers, **self._kept)
                parts.append(self._part(batch.rows(rows), reading))
            except Exception as error:  # noqa: BLE001 - raised below
                errors.append(error)
        if errors:
            raise errors[0]
        scored = batch.scored(parts, self.scorer, late)
        return replace(scored, seconds=perf_counter() - started)

    @property
    def _kept(self) -> Mapping[str, Any]:
        """What a reading must bring."""
        options = self.tracer.options
        heads = "heads" in self.scorer.needs or not options.plain
        value = options.edges == "value"
        return {"keep": heads, "by_value": value, "average": options.plain}

    def prepare(self) -> None:
        """Run the model as often as it takes, before it is listened to.

        Raises:
            UnsupportedArchitectureError: Its values cannot be weighed, or it is sharded and the
                scorer needs passes of its own.
        """
        if "saliency" in self.scorer.needs:
            check_whole(self.tracer.model)
        if self._kept["by_value"]:
            self.tracer.reader.projections  # noqa: B018 - found once, and by a run of the model

    def _edges(self, batch: _Batch, reading: Reading) -> Float[Tensor, "batch query key"]:
        """The edges of the flow: the mean attention, or those that the options choose."""
        tracer, rollouts, masks = self.tracer, batch.rollouts, batch.masks
        response = completions(rollouts.visible, rollouts.prompt_length)
        choice = edge_choice(tracer.options, masks.target, response, masks.answer)
        if choice is None:
            return reading.mean
        rows = tracer.reader.rows_of(
            reading.calls, tracer.layers, reading.lengths, rollouts.visible, choice
        )
        return rows.whole()

    def _batch(
        self,
        ids: Int[Tensor, "batch token"],
        visible: Bool[Tensor, "batch token"],
        prompt_length: int,
        batch_size: int,
    ) -> _Batch:
        tracer, needs = self.tracer, self.scorer.needs
        finder = _FinderOrLast(tracer.answer) if self._last else None
        masks = rollout_masks(
            tracer.require_tokenizer(),
            ids,
            visible,
            prompt_length,
            tracer.options,
            finder or tracer.answer,
        )
        rollouts = Rollouts(
            ids=ids,
            visible=visible,
            prompt_length=prompt_length,
            competing=visible[:, prompt_length:],
            target=masks.target,
            answer=masks.answer,
            saliency=answer_saliency(
                tracer.model, ids, visible, masks.answer, batch_size=batch_size
            )
            if "saliency" in needs
            else None,
            oracle=self._pointed_at(ids, visible, prompt_length) if "oracle" in needs else None,
            seed=self._seed,
        )
        return _Batch(rollouts, masks, 0 if finder is None else finder.fallbacks)

    def _pointed_at(
        self, ids: Int[Tensor, "batch token"], visible: Bool[Tensor, "batch token"], start: int
    ) -> Bool[Tensor, "batch completion"]:
        """The completion tokens that the oracle names."""
        assert self._oracle is not None, "CreditOptions refuses an oracle that nobody told"
        return oracle_mask(self.tracer.require_tokenizer(), ids, visible, start, self._oracle)

    @torch.no_grad()
    def _part(self, batch: _Batch, reading: Reading | None) -> _Part:
        started, rollouts = perf_counter(), batch.rollouts
        edges = None if reading is None else self._edges(batch, reading)
        jump = torch.full((len(rollouts.ids),), torch.nan, device=rollouts.ids.device)
        if reading is not None:
            rollouts = replace(rollouts, attention=edges, calls=reading.calls)
        if edges is not None and "flow" in self.scorer.needs:
            flow = solve_rollouts(edges, batch.masks, rollouts.prompt_length, self.tracer.options)
            rollouts = replace(rollouts, throughput=flow.throughput, reach=flow.reach)
            jump = torch.where(flow.found, 1.0 - flow.reasoning_share, torch.nan)
        features = [one.measure(rollouts) for one in self.scorer.parts if not one.needs & LATE]
        seconds = perf_counter() - started + (0.0 if reading is None else reading.seconds)
        return _Part(features, rollouts.throughput, jump, seconds)


class _Batch(NamedTuple):
    """Rollouts before they are scored."""

    rollouts: Rollouts
    masks: RolloutMasks
    replaced: int

    def rows(self, rows: slice) -> _Batch:
        """Some of them."""
        rollouts = replace(
            self.rollouts,
            **{
                name: part[rows]
                for name in _BY_ROW
                if (part := getattr(self.rollouts, name)) is not None
            },
        )
        return self._replace(rollouts=rollouts, masks=self.masks.rows(rows))

    @torch.no_grad()
    def scored(self, parts: Sequence[_Part], scorer: Scorer, late: Late | None) -> Scored:
        """These rollouts with the scores of their parts. The maps of attention have served."""
        entropies, surprisals = late or Late()
        flows = [part.throughput for part in parts if part.throughput is not None]
        rollouts = replace(
            self.rollouts,
            throughput=torch.cat(flows) if flows else None,
            entropies=entropies,
            surprisals=surprisals,
        )
        early = iter(
            [torch.cat(found, dim=1) for found in zip(*(p.features for p in parts), strict=True)]
        )
        features = [
            one.measure(rollouts) if one.needs & LATE else next(early) for one in scorer.parts
        ]
        return Scored(
            rollouts=rollouts,
            features=features[0] if len(features) == 1 else multiplied(features),
            jump=torch.cat([part.jump for part in parts]),
            answers=self.masks.answers,
            replaced=self.replaced,
            seconds=sum(part.seconds for part in parts),
        )


_BY_ROW = ("ids", "visible", "competing", "target", "answer", "saliency", "oracle")


class _Part(NamedTuple):
    """Scores of some rows."""

    features: list[Float[Tensor, "_ batch completion"]]
    throughput: Float[Tensor, "batch token"] | None
    jump: Float[Tensor, " batch"]
    seconds: float


class _FinderOrLast:
    """An answer finder, and where it finds nothing, the last character that is no space."""

    def __init__(self, finder: AnswerFinder) -> None:
        self.fallbacks = 0
        self._finder = finder

    def __call__(self, text: str) -> Span | None:
        found = find_answer(text, self._finder)
        if found is not None:
            return found.start, found.end
        end = len(text.rstrip())
        self.fallbacks += end > 0
        return (end - 1, end) if end else None
