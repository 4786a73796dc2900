"""Run a model up to its last wanted layer, and leave it unchanged."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from tqdm import tqdm

from flowtracer_plugin.attention.adapter import (
    AttentionAdapter,
    AttentionCall,
    AttentionSite,
    AttentionWeights,
    NoAttentionError,
    find_adapter,
)
from flowtracer_plugin.flow.torch_arrays import sent
from flowtracer_plugin.model.causal_lm import (
    accepted_inputs,
    check_positions,
    context_length,
    evaluating,
    input_device,
    unwrapped,
    vocabulary_size,
)
from flowtracer_plugin.model.parallel import check_backend, may_stop, uncompiled
from flowtracer_plugin.reading.backend import Backend, Inputs, Receive, Sites
from flowtracer_plugin.reading.interface_backend import InterfaceBackend
from flowtracer_plugin.reading.nnsight_backend import NnsightBackend
from flowtracer_plugin.reading.site_check import check_sites

BACKENDS = {backend.name: backend for backend in (NnsightBackend, InterfaceBackend)}

CHECK_TOKENS = 17
"""Length of the self-check's input. Hardly any model has 17 heads, so confused axes do not fit."""

CHECK_PADDING = (0, 5)
"""Padding of the self-check's inputs. Without padding, many models pass no mask at all."""

_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
"""The lock of each model, by its first attention module: readers of one model and of its wrappers
share it."""


class ModelRunner:
    """Runs one model, and passes its attention calls on.

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

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """The model in evaluation mode, while other readers of it wait."""
        with self._lock, evaluating(self.model):
            yield

    def turn(self) -> AbstractContextManager[Any]:
        """The context of a pass that no backend reads: readers that run no threads wait for it."""
        return nullcontext() if self.backend.threads else self._lock

    @contextmanager
    def _running(self) -> Iterator[None]:
        """The model ready to run: in evaluation mode, without gradients and compilation."""
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
        input_ids, attention_mask = sent(input_ids, device), sent(attention_mask, device)
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

    def _run(self, inputs: Inputs, sites: Sites, receive: Receive, progress: bool) -> None:
        """Run the model to the last of the sites."""
        with counted(receive, sites, progress) as counting, self._running():
            self.backend.run(inputs, sites, counting, whole=not may_stop(self.model))

    def _chosen(self, layers: Sequence[int]) -> list[AttentionSite]:
        return [site for site in self.sites if site.layer in set(layers)]

    def _read(
        self, site: AttentionSite, args: Any, kwargs: Any
    ) -> AttentionCall | AttentionWeights:
        return self.adapter.read(self.model.get_submodule(site.module), args, kwargs)

    @property
    def check_padding(self) -> tuple[int, ...]:
        """Padding tokens in each of the self-check's texts; only 0 if the model takes no mask."""
        return CHECK_PADDING if "attention_mask" in self._accepted else CHECK_PADDING[:1]

    def check_text(self, padding: int) -> tuple[Int[Tensor, "1 token"], Bool[Tensor, "1 token"]]:
        """The self-check's input: token ids, and their mask."""
        length = min(CHECK_TOKENS, context_length(self.model))
        token = torch.arange(length, device=input_device(self.model))[None]
        return token % vocabulary_size(self.model), token >= padding


@contextmanager
def counted(receive: Receive, sites: Sites, progress: bool) -> Iterator[Receive]:
    """`receive`, and with `progress` a bar of the layers read, which appears after one second."""
    bar = tqdm(
        total=len(sites),
        desc="reading",
        unit="layer",
        delay=1,
        leave=None,
        disable=not progress,
    )

    def counting(*call: Any) -> None:
        receive(*call)
        bar.update()

    with bar:
        yield counting
