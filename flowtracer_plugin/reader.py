"""Read the attention of a model: which layers, on which inputs, checked on first use."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from flowtracer_plugin.attention import (
    AdapterMismatchError,
    AttentionAdapter,
    AttentionCall,
    AttentionSite,
    AttentionWeights,
    NoAttentionError,
    find_adapter,
)
from flowtracer_plugin.attention_rows import AttentionRows, KeptCalls
from flowtracer_plugin.backends import Backend, Receive, Result
from flowtracer_plugin.capture import NnsightBackend
from flowtracer_plugin.causal_lm import (
    accepted_inputs,
    check_positions,
    context_length,
    evaluating,
    first_output,
    input_device,
    unwrapped,
    vocabulary_size,
)
from flowtracer_plugin.interception import InterfaceBackend
from flowtracer_plugin.padding import put_back, text_first
from flowtracer_plugin.parallel import check_backend, may_stop, uncompiled
from flowtracer_plugin.reading import Reading, ReadingSum
from flowtracer_plugin.self_check import (
    SiteReport,
    check_report,
    difference,
    report_site,
    rounding,
    worst,
)
from flowtracer_plugin.sites import check_runs, check_sites, counted_runs

BACKENDS = {backend.name: backend for backend in (NnsightBackend, InterfaceBackend)}

CHECK_TOKENS = 17
"""Length of the self-check's input: hardly a model has as many heads, so that axes that are mixed
up do not fit."""

CHECK_PADDING = (0, 5)
"""Padding of the self-check's inputs: without it, many models pass no mask at all."""

_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
"""However many readers share a model, and however it is wrapped, one lock by its first site."""

More = Callable[[Int[Tensor, "1 token"]], Mapping[str, Any]]


class AttentionReader:
    """Reads the head-averaged attention of one model.

    The model keeps its weights, configuration and attention implementation.
    """

    def __init__(
        self,
        model: nn.Module | Any,
        adapter: AttentionAdapter | None = None,
        *,
        backend: str = "nnsight",
        block: int = 64,
    ) -> None:
        if block < 1:
            raise ValueError(f"block must be at least 1 query row, got {block!r}")
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        model = unwrapped(model)
        check_positions(model)
        check_backend(model, backend)
        self.model = model
        self.block = block
        self.verified = False
        with uncompiled(model):
            self.adapter = find_adapter(model, None if adapter is None else [adapter])
            self.sites = self.adapter.sites(model)
            if not self.sites:
                raise NoAttentionError(f"{type(model).__name__} has no attention to read")
            check_sites(self.model, self.adapter, self.sites)
            self.backend: Backend = BACKENDS[backend](model, self.adapter, self.sites)
        self._lock = _locks.setdefault(model.get_submodule(self.sites[0].module), RLock())
        self._accepted = accepted_inputs(model)

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
        ).attention
        return found if torch.equal(attention_mask, seen) else put_back(found, seen)

    def read_rows(
        self,
        input_ids: Int[Tensor, "batch token"],
        attention_mask: Bool[Tensor, "batch token"],
        layers: Sequence[int],
        *,
        progress: bool = False,
    ) -> tuple[AttentionRows, Bool[Tensor, "batch most"]]:
        """What `read` returns, row by row when it is asked for, with all padding behind the text.

        As wide as the longest text; the mask of that comes too.

        Raises:
            UnsupportedArchitectureError: The model computes its probabilities itself, and does not
                hand over queries and keys.
        """
        input_ids, attention_mask = text_first(input_ids, attention_mask)
        kept, sites = KeptCalls(self.model, self.adapter), self._chosen(layers)
        inputs = self._inputs(input_ids, attention_mask, {})
        self._run(inputs, sites, kept.receive, progress)
        visible = attention_mask.to(input_ids.device)
        return AttentionRows(self.model, kept.calls(), visible, block=self.block), visible

    def read_in_place(
        self,
        input_ids: Int[Tensor, "batch query"],
        attention_mask: Bool[Tensor, "batch key"],
        layers: Sequence[int],
        *,
        heads: Mapping[int, Int[Tensor, " chosen"]] | None = None,
        model_inputs: Mapping[str, Any] | None = None,
        keep: bool = False,
        progress: bool = False,
    ) -> Reading:
        """`read` with the padding where it is, as whoever passes it to the model sees it.

        With `keep`, the calls come too.
        """
        sites = self._chosen(layers)
        shape = (*input_ids.shape, attention_mask.shape[1])
        total = self._sum(sites, shape, input_ids.device, heads=heads, keep=keep)
        inputs = self._inputs(input_ids, attention_mask, model_inputs or {})
        self._run(inputs, sites, total.receive, progress)
        return total.reading(attention_mask)

    def _run(
        self,
        inputs: Mapping[str, Any],
        sites: Sequence[AttentionSite],
        receive: Receive,
        progress: bool,
    ) -> None:
        """Run the model to the last of the sites; a bar shows up where that takes over a second."""
        bar = tqdm(total=len(sites), desc="reading", unit="layer", delay=1, disable=not progress)

        def counted(*call: Any) -> None:
            receive(*call)
            bar.update()

        with bar, self._running():
            self.backend.run(inputs, sites, counted, whole=not may_stop(self.model))

    def listen(
        self,
        call: Callable[[], Result],
        attention_mask: Bool[Tensor, "batch token"],
        layers: Sequence[int],
        take: Callable[[slice, Reading], None],
        *,
        batch_size: int | None = None,
        keep: bool = False,
    ) -> Result:
        """Let `call` run the model, and pass on what it attended to.

        The model runs as `call` runs it: with gradients, dropout and autocast, if it has them, and
        to the end. It is run once on each `batch_size` rows of `attention_mask`, in their order.
        As soon as the last of `layers` has been read, `take` gets the rows and their attention, as
        `read_in_place` returns it. What goes wrong with that is raised when `call` has returned.
        """
        sites, rows = self._chosen(layers), len(attention_mask)
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
                current = part, self._sum(sites, shape, mask.device, keep=keep)
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

    def _chosen(self, layers: Sequence[int]) -> list[AttentionSite]:
        return [site for site in self.sites if site.layer in set(layers)]

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
            call = self.adapter.read(self.model.get_submodule(site.module), args, kwargs)
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

    @property
    def check_padding(self) -> tuple[int, ...]:
        """Padding of the self-check's texts: none if the model takes no mask."""
        return CHECK_PADDING if "attention_mask" in self._accepted else CHECK_PADDING[:1]

    def check_text(self, padding: int) -> tuple[Int[Tensor, "1 token"], Bool[Tensor, "1 token"]]:
        """The self-check's input: tokens, and which of them are visible."""
        length = min(CHECK_TOKENS, context_length(self.model))
        token = torch.arange(length, device=input_device(self.model))[None]
        return token % vocabulary_size(self.model), token >= padding

    def check_calls(self, layers: Sequence[int]) -> tuple[AttentionCall | AttentionWeights, ...]:
        """The calls of some layers on the self-check's text."""
        return self.read_in_place(*self.check_text(0), layers, keep=True).calls

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """The model in evaluation mode, while other readers of it wait."""
        with self._lock, evaluating(self.model):
            yield

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Everything that a run needs around it."""
        turn = evaluating(self.model) if self.backend.threads else self.exclusive()
        with turn, torch.no_grad(), uncompiled(self.model):
            yield

    def _inputs(
        self,
        input_ids: Int[Tensor, "batch query"],
        attention_mask: Bool[Tensor, "batch key"],
        model_inputs: Mapping[str, Any],
    ) -> dict[str, Any]:
        device = input_device(self.model)
        input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask.long(), **model_inputs}
        if "attention_mask" not in self._accepted:
            if not bool(attention_mask.all()):
                raise ValueError(
                    f"{type(self.model).__name__} takes no attention_mask, so it cannot be given "
                    "padding; pass one text at a time"
                )
            del inputs["attention_mask"]
        if "use_cache" in self._accepted:
            inputs["use_cache"] = False
        if "past_key_values" in model_inputs:  # the forward pass will add to it
            inputs["past_key_values"] = copy.deepcopy(model_inputs["past_key_values"])
        if "position_ids" in self._accepted and set(model_inputs) == {"past_key_values"}:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)
            inputs["position_ids"] = positions[:, -input_ids.shape[1] :]
        return inputs
