"""Read the attention of a model: some of its layers, on some inputs, after a self-check."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
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
from flowtracer_plugin.attention.head_mean import query_tensor
from flowtracer_plugin.attention.rounding import difference, rounding
from flowtracer_plugin.attention.value_lengths import Projections, find_projections
from flowtracer_plugin.flow.torch_arrays import sent
from flowtracer_plugin.model.causal_lm import first_output
from flowtracer_plugin.model.padding import is_in_front, put_back, text_first
from flowtracer_plugin.model.parallel import tensor_parallel_group
from flowtracer_plugin.reading.backend import Receive, Result, Sites
from flowtracer_plugin.reading.edges import EdgeChoice, chosen_rows
from flowtracer_plugin.reading.influence import (
    Outputs,
    check_backward,
    graph_bytes,
    influences,
    keeps_graph,
)
from flowtracer_plugin.reading.one_pass import Reading, ReadingSum, Wanted
from flowtracer_plugin.reading.rows import AttentionRows, KeptCalls, check_causal
from flowtracer_plugin.reading.runner import ModelRunner, counted
from flowtracer_plugin.reading.self_check import SiteReport, check_report, report_site, worst
from flowtracer_plugin.reading.site_check import check_runs, counted_runs

logger = logging.getLogger(__name__)

More = Callable[[Int[Tensor, "1 token"]], Mapping[str, Any]]


class AttentionReader(ModelRunner):
    """Reads the head-averaged attention of one model.

    The model keeps its weights, configuration and attention implementation.
    """

    _known_keeping: bool | None = None
    _known_projections: Projections | None = None
    _known_heads: Mapping[AttentionSite, int] = MappingProxyType({})

    def read(
        self,
        input_ids: Int[Tensor, "batch query"],
        attention_mask: Bool[Tensor, "batch key"],
        layers: Sequence[int],
        *,
        choice: EdgeChoice | None = None,
        model_inputs: Mapping[str, Any] | None = None,
        progress: bool = False,
    ) -> Float[Tensor, "batch query key"]:
        """The mean over `layers` and their heads, float32, with 0 in rows and columns of padding.

        The forward pass ends at the last of the layers. `model_inputs` are passed on to the model.
        If they hold a cache, there are more keys than queries, and the cache stays unchanged. With
        `choice`, which must be of all heads, it is the mean of its edges.

        Raises:
            UnsupportedArchitectureError: The edges of `choice` cannot be weighed.
        """
        if choice is not None and choice.edges == "influence":  # one forward pass serves both
            return self.read_edges(input_ids, attention_mask, layers, choice, progress=progress)[0]
        seen = attention_mask
        # Other inputs of the model would have to move with the tokens.
        same = bool(model_inputs) or is_in_front(seen)
        if not same:
            input_ids, attention_mask = text_first(input_ids, attention_mask)
        found = self.read_in_place(
            input_ids,
            attention_mask,
            layers,
            model_inputs=model_inputs,
            edges="attention" if choice is None else choice.edges,
            progress=progress,
        ).mean
        return found if same else put_back(found, seen)

    def read_in_place(
        self,
        input_ids: Int[Tensor, "batch query"],
        attention_mask: Bool[Tensor, "batch key"],
        layers: Sequence[int],
        *,
        model_inputs: Mapping[str, Any] | None = None,
        keep: bool = False,
        edges: str = "attention",
        sizes: Sequence[Float[Tensor, "batch _ _"]] = (),
        average: bool = True,
        progress: bool = False,
    ) -> Reading:
        """What `read` returns, with the padding left where it is when the model runs.

        With `keep`, the reading holds the calls, and the lengths of their values where `edges` are
        weighed by these; without `average`, no mean. `sizes` are the influence of each layer's
        heads and rows, without which no mean of `edges="influence"` can be made.

        Raises:
            UnsupportedArchitectureError: As `read`.
        """
        sites = self._chosen(layers)
        shape = (*input_ids.shape, attention_mask.shape[1])
        wanted = self._wanted(keep, edges, sizes, average)
        total = self._sum(sites, shape, input_ids.device, wanted)
        inputs = self._inputs(input_ids, attention_mask, model_inputs or {})
        self._run(inputs, sites, total.receive, progress)
        return total.reading(attention_mask)

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
        """The rows of what `read` returns, computed on demand, and the mask of their tokens.

        Both are as wide as the longest text, and all padding is behind the text. With `choice`,
        they are rows of the chosen edges. With `maps`, calls that hand over their probabilities
        instead of queries and keys are kept, not refused.

        Raises:
            UnsupportedArchitectureError: The model computes its probabilities itself, and does not
                hand over queries and keys; or its values cannot be weighed.
            ValueError: `choice` names heads that the layers do not have.
        """
        seen = attention_mask
        input_ids, attention_mask = text_first(input_ids, attention_mask)
        edges = "attention" if choice is None else choice.edges
        visible = sent(attention_mask, input_ids.device)
        choice = None if choice is None else choice.behind(seen, visible)
        kept = KeptCalls(
            self.model, self.adapter, maps=maps, projections=self._projections_for(edges)
        )
        sites = self._chosen(layers)
        sizes: Sequence[Float[Tensor, "batch _ _"]] = ()
        if choice is not None and choice.edges == "influence":
            with counted(kept.receive, sites, progress) as receive:
                sizes = self.influences(
                    input_ids, attention_mask, choice.decided, layers, receive=receive
                )
        else:
            inputs = self._inputs(input_ids, attention_mask, {})
            self._run(inputs, sites, kept.receive, progress)
        calls = kept.calls()
        check_causal(calls)
        return self.rows_of(calls, layers, kept.lengths, visible, choice, sizes), visible

    def read_edges(
        self,
        input_ids: Int[Tensor, "batch token"],
        attention_mask: Bool[Tensor, "batch token"],
        layers: Sequence[int],
        choice: EdgeChoice,
        *,
        progress: bool = False,
    ) -> tuple[Float[Tensor, "batch query key"], AttentionRows]:
        """What `read` returns for edges of some heads, and the rows that it was computed from.

        Raises:
            UnsupportedArchitectureError: As `read_rows`.
            ValueError: As `read_rows`.
        """
        rows, _ = self.read_rows(
            input_ids, attention_mask, layers, choice=choice, maps=True, progress=progress
        )
        found = rows.whole()
        same = is_in_front(attention_mask)
        return (found if same else put_back(found, attention_mask)), rows

    def rows_of(
        self,
        calls: Sequence[AttentionCall | AttentionWeights],
        layers: Sequence[int],
        lengths: Sequence[Float[Tensor, "batch _ _"]],
        visible: Bool[Tensor, "batch token"],
        choice: EdgeChoice | None,
        sizes: Sequence[Float[Tensor, "batch _ _"]] = (),
    ) -> AttentionRows:
        """Rows of the chosen edges, or of the plain mean, from calls of `layers` already read.

        Raises:
            UnsupportedArchitectureError: The model is tensor parallel: no process has all heads.
            ValueError: The layers do not have the chosen heads.
        """
        if choice is None:
            return AttentionRows(self.model, calls, visible, block=self.block)
        self._check_all_heads()
        numbers = [site.layer for site in self._chosen(layers)]
        return chosen_rows(
            self.model, calls, numbers, lengths, visible, choice, block=self.block, sizes=sizes
        )

    def influences(
        self,
        ids: Int[Tensor, "batch token"],
        visible: Bool[Tensor, "batch token"],
        decided: Bool[Tensor, "batch token"],
        layers: Sequence[int],
        *,
        batch_size: int | None = None,
        receive: Receive | None = None,
    ) -> tuple[Float[Tensor, "batch _ _"], ...]:
        """The influence of every head and row of these layers on the tokens that were `decided`.

        It takes a forward and a backward pass, of `batch_size` texts at a time. Each forward pass
        hands its calls to `receive`.

        Raises:
            UnsupportedArchitectureError: As `influence.influences`, or as `projections`.
        """
        check_backward(self.model)
        sites = self._chosen(layers)
        chosen = [self.projections[site] for site in sites]
        heads = [self._known_heads[site] for site in sites]
        size = batch_size or len(ids)

        def read(run: Callable[[], Tensor]) -> Tensor:
            return run() if receive is None else self.backend.listen(run, sites, receive, runs=1)

        with self.turn():
            parts = [
                influences(self.model, chosen, heads, ids[rows], visible[rows], decided[rows], read)
                for rows in (slice(start, start + size) for start in range(0, len(ids), size))
            ]
        return tuple(torch.cat(layer) for layer in zip(*parts, strict=True))

    def outputs(self, layers: Sequence[int]) -> Outputs:
        """Takes the same influence from the graph of a forward pass that somebody else makes."""
        sites = self._chosen(layers)
        chosen = [self.projections[site] for site in sites]
        return Outputs(self.model, chosen, [self._known_heads[site] for site in sites])

    @property
    def keeps_graph(self) -> bool:
        """Whether influence may be taken from the graph of a forward pass that trains.

        Raises:
            UnsupportedArchitectureError: As `influences`.
        """
        check_backward(self.model)
        if self._known_keeping is None:
            every = [self.projections[site] for site in self.sites]
            with self.turn():
                self._known_keeping = keeps_graph(self.model, every, *self.check_text(0))
        return self._known_keeping

    def why_no_influence(self) -> str | None:
        """Why the influence of heads and rows cannot be found, or None; tried on a short text."""
        ids, visible = self.check_text(0)
        try:
            self.influences(ids, visible, visible, [site.layer for site in self.sites])
        except UnsupportedArchitectureError as error:
            return str(error)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - a model may fail in any way on this text
            said = str(error).strip().splitlines()
            name = type(error).__name__
            return f"its forward or backward pass fails ({name}{': ' + said[0] if said else ''})"
        return None

    def graph_bytes(self, layers: Sequence[int]) -> tuple[int, int]:
        """What the graph of `influences` keeps on a short text: see `influence.graph_bytes`.

        Raises:
            UnsupportedArchitectureError: As `influences`.
        """
        check_backward(self.model)
        chosen = [self.projections[site] for site in self._chosen(layers)]
        with self.turn():
            return graph_bytes(self.model, chosen, *self.check_text(0))

    def _check_all_heads(self) -> None:
        if tensor_parallel_group(self.model) is not None:
            raise UnsupportedArchitectureError(
                "heads are chosen among all, or weighed, and a tensor parallel model has only some "
                "of them in each process; use heads='all' and edges='attention'"
            )

    def _projections_for(self, edges: str) -> Projections | None:
        if edges == "influence":  # the gradient before the projection says what it does
            return dict.fromkeys(self.sites)
        return self.projections if edges == "value" else None

    @property
    def projections(self) -> Projections:
        """The linear layer that takes each site's attention output; found by one run of the model.

        Raises:
            UnsupportedArchitectureError: No linear layer takes some site's output unchanged.
        """
        if self._known_projections is None:
            inputs = self._inputs(*self.check_text(0), {})

            def run(receive: Receive) -> None:
                with self._running():
                    self.backend.listen(lambda: self.model(**inputs), self.sites, receive, runs=1)

            heads: dict[AttentionSite, int] = {}

            def read(site: AttentionSite, args: Any, kwargs: Any) -> Any:
                call = self._read(site, args, kwargs)
                heads[site] = query_tensor(call).shape[1]
                return call

            self._known_projections = find_projections(run, read, self.model, self.sites)
            self._known_heads = heads
        return self._known_projections

    def listen(
        self,
        call: Callable[[], Result],
        attention_mask: Bool[Tensor, "batch token"],
        layers: Sequence[int],
        take: Callable[[slice, Reading], None],
        *,
        batch_size: int | None = None,
        keep: bool = False,
        edges: str = "attention",
        sizes: Sequence[Float[Tensor, "batch _ _"]] = (),
        average: bool = True,
    ) -> Result:
        """What `call` returns; it runs the model, whose attention goes to `take`.

        The model runs as `call` runs it: with gradients, dropout and autocast, if it has them, and
        to the end. `call` runs it once on each `batch_size` rows of `attention_mask`, in order.
        When the last of `layers` has been read, `take` gets the slice of rows and their attention,
        as `read_in_place` returns it. Errors in reading are raised when `call` has returned.
        """
        sites, rows = self._chosen(layers), len(attention_mask)
        wanted = self._wanted(keep, edges, sizes, average)
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
                current = part, self._sum(sites, shape, mask.device, wanted.rows(part))
            part, total = current
            total.receive(site, args, kwargs, output)
            if total.complete:
                current = None  # frees the map as soon as `take` is done with it
                try:
                    take(part, total.reading(attention_mask[part]))
                except Exception as error:  # noqa: BLE001 - the caller's forward pass must go on
                    errors.append(error)

        with nullcontext() if self.backend.threads else self._lock:
            returned = self.backend.listen(call, sites, receive, runs=len(parts))
        if errors:
            raise errors[0]
        return returned

    def _wanted(
        self, keep: bool, edges: str, sizes: Sequence[Float[Tensor, "batch _ _"]], average: bool
    ) -> Wanted:
        if edges != "attention":
            self._check_all_heads()
        assert edges != "influence" or sizes or not average, "the mean needs sizes"
        projections = self._projections_for(edges)
        return Wanted(keep=keep, projections=projections, sizes=sizes, average=average)

    def _sum(self, sites: Sites, shape: Sequence[int], device: Any, wanted: Wanted) -> ReadingSum:
        return ReadingSum(
            self.model,
            self.adapter,
            shape,
            device,
            sites=len(sites),
            block=self.block,
            wanted=wanted,
        )

    def verify(self, more: More | None = None) -> None:
        """Check once, on a short input, that the attention read is what the model computes.

        At every site, the probabilities times the values must give the attention output that the
        model itself went on with, whichever implementation computed it; no token may attend to
        later ones; and a forward pass that is read must give the logits of a plain one. `more`
        returns further inputs of the model, given the ids.

        Raises:
            AdapterMismatchError: The attention outputs or the logits differ.
            UnsupportedArchitectureError: Tokens attend to later tokens.
        """
        if not self.verified:
            for report in self.inspect(more):
                check_report(report, self.adapter.name)
            self.verified = True
            logger.debug("adapter %r reads what the model computes", self.adapter.name)

    def inspect(self, more: More | None = None) -> tuple[SiteReport, ...]:
        """What the self-check finds at each site, on texts without and with padding.

        Raises:
            AdapterMismatchError: Reading changes the logits, or the adapter lists more or fewer
                runs of an attention module than the model makes.
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
        self, sites: Sites, receive: Receive, *, padding: int, more: More | None = None
    ) -> None:
        """Run the self-check's text: pass on the calls of `sites`, and check the whole model.

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
