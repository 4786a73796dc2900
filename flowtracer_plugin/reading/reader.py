"""Read the attention of a model: which layers, on which inputs, checked on first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowtracer_plugin.attention.adapter import (
    AdapterMismatchError,
    AttentionCall,
    AttentionSite,
    AttentionWeights,
    UnsupportedArchitectureError,
)
from flowtracer_plugin.attention.rounding import difference, rounding
from flowtracer_plugin.attention.value_lengths import Projections, find_projections
from flowtracer_plugin.model.causal_lm import (
    first_output,
)
from flowtracer_plugin.model.padding import put_back, text_first
from flowtracer_plugin.model.parallel import tensor_parallel_group
from flowtracer_plugin.reading.backend import Receive, Result
from flowtracer_plugin.reading.edges import EdgeChoice, chosen_rows
from flowtracer_plugin.reading.one_pass import Reading, ReadingSum
from flowtracer_plugin.reading.rows import AttentionRows, KeptCalls, check_causal
from flowtracer_plugin.reading.runner import ModelRunner
from flowtracer_plugin.reading.self_check import (
    SiteReport,
    check_report,
    report_site,
    worst,
)
from flowtracer_plugin.reading.site_check import check_runs, counted_runs

More = Callable[[Int[Tensor, "1 token"]], Mapping[str, Any]]


class AttentionReader(ModelRunner):
    """Reads the head-averaged attention of one model.

    The model keeps its weights, configuration and attention implementation.
    """

    _known_projections: Projections | None = None

    def read(
        self,
        input_ids: Int[Tensor, "batch query"],
        attention_mask: Bool[Tensor, "batch key"],
        layers: Sequence[int],
        *,
        heads: Mapping[int, Int[Tensor, " chosen"]] | None = None,
        model_inputs: Mapping[str, Any] | None = None,
        progress: bool = False,
    ) -> Float[Tensor, "batch query key"]:
        """Mean over `layers` and their heads, float32, rows and columns of padding zero.

        The forward pass ends at the last of the layers. `heads` restricts layers to some query
        heads; `model_inputs` are passed on to the model. There are more keys than queries if they
        hold a cache, which stays as it is.
        """
        seen = attention_mask
        if not model_inputs:  # what else the model is given is not moved with the tokens
            input_ids, attention_mask = text_first(input_ids, attention_mask)
        found = self.read_in_place(
            input_ids,
            attention_mask,
            layers,
            heads=heads,
            model_inputs=model_inputs,
            progress=progress,
        ).mean
        return found if torch.equal(attention_mask, seen) else put_back(found, seen)

    def read_rows(
        self,
        input_ids: Int[Tensor, "batch token"],
        attention_mask: Bool[Tensor, "batch token"],
        layers: Sequence[int],
        *,
        choice: EdgeChoice | None = None,
        maps: bool = False,
        progress: bool = False,
    ) -> tuple[AttentionRows, Bool[Tensor, "batch most"]]:
        """What `read` returns, row by row when it is asked for, with all padding behind the text.

        As wide as the longest text; the mask of that comes too. With `choice`, other edges than the
        plain mean. With `maps`, calls that hand over all their probabilities are kept as they are.

        Raises:
            UnsupportedArchitectureError: The model computes its probabilities itself, and does not
                hand over queries and keys, or values cannot be weighed.
            ValueError: Chosen are heads that the layers do not have.
        """
        seen = attention_mask
        input_ids, attention_mask = text_first(input_ids, attention_mask)
        sites, projections = self._chosen(layers), self._projections_of(choice)
        kept = KeptCalls(self.model, self.adapter, maps=maps, projections=projections)
        inputs = self._inputs(input_ids, attention_mask, {})
        self._run(inputs, sites, kept.receive, progress)
        visible, calls = attention_mask.to(input_ids.device), kept.calls()
        check_causal(calls)
        choice = None if choice is None else choice.behind(seen, visible)
        return self.rows_of(calls, layers, kept.lengths, visible, choice), visible

    def read_edges(
        self,
        input_ids: Int[Tensor, "batch token"],
        attention_mask: Bool[Tensor, "batch token"],
        layers: Sequence[int],
        choice: EdgeChoice,
        *,
        progress: bool = False,
    ) -> tuple[Float[Tensor, "batch query key"], AttentionRows]:
        """What `read` returns for chosen edges, and the rows that it was put together of.

        Raises:
            As `read_rows`.
        """
        rows, ordered = self.read_rows(
            input_ids, attention_mask, layers, choice=choice, maps=True, progress=progress
        )
        found = rows.whole()
        same = torch.equal(ordered, attention_mask.to(ordered.device))
        return (found if same else put_back(found, attention_mask)), rows

    def rows_of(
        self,
        calls: Sequence[AttentionCall | AttentionWeights],
        layers: Sequence[int],
        lengths: Sequence[Float[Tensor, "batch _ _"]],
        visible: Bool[Tensor, "batch token"],
        choice: EdgeChoice | None,
    ) -> AttentionRows:
        """The chosen edges of calls of `layers`, or their plain mean, wherever the padding is.

        Raises:
            UnsupportedArchitectureError: The model is tensor parallel: no process has all heads.
            ValueError: There are no such heads.
        """
        if choice is None:
            return AttentionRows(self.model, calls, visible, block=self.block)
        if tensor_parallel_group(self.model) is not None:
            raise UnsupportedArchitectureError(
                "heads are chosen among all, and a tensor parallel model has only some of them in "
                "each process; use heads='all' and edges='attention'"
            )
        numbers = [site.layer for site in self._chosen(layers)]
        return chosen_rows(self.model, calls, numbers, lengths, visible, choice, block=self.block)

    def _projections_of(self, choice: EdgeChoice | None) -> Projections | None:
        return self.projections if choice is not None and choice.by_value else None

    @property
    def projections(self) -> Projections:
        """What the attention output of each site goes through; found by a run, once.

        Raises:
            UnsupportedArchitectureError: For some site, no linear layer takes it as it is.
        """
        if self._known_projections is None:
            ids, mask = self.check_text(0)
            inputs = self._inputs(ids, mask, {})

            def run(receive: Receive) -> None:
                with self._running():
                    self.backend.listen(lambda: self.model(**inputs), self.sites, receive, runs=1)

            self._known_projections = find_projections(run, self._read, self.model, self.sites)
        return self._known_projections

    def read_in_place(
        self,
        input_ids: Int[Tensor, "batch query"],
        attention_mask: Bool[Tensor, "batch key"],
        layers: Sequence[int],
        *,
        heads: Mapping[int, Int[Tensor, " chosen"]] | None = None,
        model_inputs: Mapping[str, Any] | None = None,
        keep: bool = False,
        by_value: bool = False,
        average: bool = True,
        progress: bool = False,
    ) -> Reading:
        """`read` with the padding where it is, as whoever passes it to the model sees it.

        With `keep`, the calls come too, and with `by_value` the lengths of their values. Without
        `average` there is no mean.
        """
        sites, projections = self._chosen(layers), self.projections if by_value else None
        shape = (*input_ids.shape, attention_mask.shape[1])
        total = self._sum(
            sites,
            shape,
            input_ids.device,
            heads=heads,
            keep=keep,
            projections=projections,
            average=average,
        )
        inputs = self._inputs(input_ids, attention_mask, model_inputs or {})
        self._run(inputs, sites, total.receive, progress)
        return total.reading(attention_mask)

    def listen(
        self,
        call: Callable[[], Result],
        attention_mask: Bool[Tensor, "batch token"],
        layers: Sequence[int],
        take: Callable[[slice, Reading], None],
        *,
        batch_size: int | None = None,
        keep: bool = False,
        by_value: bool = False,
        average: bool = True,
    ) -> Result:
        """Let `call` run the model, and pass on what it attended to.

        The model runs as `call` runs it: with gradients, dropout and autocast, if it has them, and
        to the end. It is run once on each `batch_size` rows of `attention_mask`, in their order.
        As soon as the last of `layers` has been read, `take` gets the rows and their attention, as
        `read_in_place` returns it. What goes wrong with that is raised when `call` has returned.
        """
        sites, rows = self._chosen(layers), len(attention_mask)
        projections = self.projections if by_value else None
        size = batch_size or rows
        parts = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
        waiting = iter(parts)
        current: tuple[slice, ReadingSum] | None = None
        errors: list[Exception] = []

        def receive(site: AttentionSite, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal current
            if current is None:
                part = next(waiting)
                mask = attention_mask[part]
                shape = (*mask.shape, mask.shape[1])
                current = (
                    part,
                    self._sum(sites, shape, mask.device, keep=keep, projections=projections),
                )
            part, total = current
            total.receive(site, args, kwargs, output)
            if total.complete:
                current = None  # a map has served when it has been taken
                try:
                    take(part, total.reading(attention_mask[part]))
                except Exception as error:  # noqa: BLE001 - the forward pass is somebody else's
                    errors.append(error)

        with nullcontext() if self.backend.threads else self._lock:
            returned = self.backend.listen(call, sites, receive, runs=len(parts))
        if errors:
            raise errors[0]
        return returned

    def _sum(
        self, sites: Sequence[AttentionSite], shape: Sequence[int], device: Any, **options: Any
    ) -> ReadingSum:
        return ReadingSum(
            self.model,
            self.adapter,
            shape,
            device,
            sites=len(sites),
            block=self.block,
            **options,
        )

    def verify(self, more: More | None = None) -> None:
        """Check once, on a short input, that what is read is what the model computes.

        At every site the probabilities, times the values, must give the attention output that the
        model itself went on with, whatever implementation computed it; no token may attend to later
        ones; and a read forward pass must give the logits of a plain one. `more` says what the
        model is given beside the ids, by whoever runs it in a way of its own.

        Raises:
            AdapterMismatchError: They differ.
            UnsupportedArchitectureError: Tokens attend to later tokens.
        """
        if not self.verified:
            for report in self.inspect(more):
                check_report(report, self.adapter.name)
            self.verified = True

    def inspect(self, more: More | None = None) -> tuple[SiteReport, ...]:
        """What the self-check finds at each site, on texts without and with padding.

        Raises:
            AdapterMismatchError: Reading changes the logits, or the model runs an attention module
                another number of times than the adapter lists it.
            ValueError: The model computes logits that are not finite.
        """
        found = [self._inspect(padding, more) for padding in self.check_padding]
        return tuple(worst(reports) for reports in zip(*found, strict=True))

    def _inspect(self, padding: int, more: More | None) -> list[SiteReport]:
        visible = self.check_text(padding)[1][0]
        reports: list[SiteReport] = []

        def receive(site: AttentionSite, args: Any, kwargs: Any, output: Any) -> None:
            call = self._read(site, args, kwargs)
            reports.append(report_site(site, call, output, visible))

        self.probe(self.sites, receive, padding=padding, more=more)
        return reports

    def probe(
        self,
        sites: Sequence[AttentionSite],
        receive: Receive,
        *,
        padding: int,
        more: More | None = None,
    ) -> None:
        """The self-check's run: pass on the calls of some sites, and check the model as a whole.

        Raises:
            AdapterMismatchError: As `inspect`.
            ValueError: As `inspect`.
        """
        ids, mask = self.check_text(padding)
        inputs = self._inputs(ids, mask, {} if more is None else more(ids))
        with self._running():
            read = first_output(self.backend.run(inputs, sites, receive, whole=True))
            with counted_runs(self.model, self.sites) as visits:
                plain = first_output(self.model(**inputs))
        check_runs(self.model, self.adapter, self.sites, visits)
        if not torch.isfinite(plain).all():
            raise ValueError(
                f"{type(self.model).__name__} computes logits that are not finite on a short text: "
                "its weights are damaged, or too large for its dtype; load it in another dtype"
            )
        if not difference(read, plain) <= rounding(plain):
            raise AdapterMismatchError("a traced forward pass does not give the model's own logits")

    def check_calls(self, layers: Sequence[int]) -> tuple[AttentionCall | AttentionWeights, ...]:
        """The calls of some layers on the self-check's text."""
        return self.read_in_place(*self.check_text(0), layers, keep=True).calls
