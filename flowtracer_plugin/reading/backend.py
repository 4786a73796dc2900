"""What a backend must do: run a model, and hand over its attention calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from torch import nn

from flowtracer_plugin.attention.adapter import AttentionAdapter, AttentionSite

Result = TypeVar("Result")

Inputs = Mapping[str, Any]
"""The arguments of a model's `forward`, by name."""

Sites = Sequence[AttentionSite]

Receive = Callable[[AttentionSite, Sequence[Any], Mapping[str, Any], Any], None]
"""Takes a site, the positional and keyword arguments of its call, and what the call returned, or
None where that is not known."""


class Backend(ABC):
    """Runs one model and hands over the attention calls that it makes.

    Attributes:
        name: The name by which users select the backend.
        threads: Whether several threads may read one model at the same time.
    """

    name: ClassVar[str]
    threads: ClassVar[bool]

    def __init__(self, model: nn.Module, adapter: AttentionAdapter, sites: Sites) -> None:
        self._model, self._adapter, self._sites = model, adapter, sites

    @abstractmethod
    def run(self, inputs: Inputs, sites: Sites, receive: Receive, *, whole: bool) -> Any:
        """Run the model on `inputs` and pass each site's call to `receive`, in their order.

        If `whole`, calls come with what they returned, and the model's output is returned; else
        the forward pass ends after the last site.

        Raises:
            AdapterMismatchError: The model does not make a call that a site names.
            UnsupportedArchitectureError: The backend needs source code that is not available.
        """

    @abstractmethod
    def listen(
        self, call: Callable[[], Result], sites: Sites, receive: Receive, *, runs: int
    ) -> Result:
        """Let `call` run the model `runs` times, and pass each site's call on in every run.

        The forward passes go to their end, with gradients if they have any.

        Raises:
            AdapterMismatchError: The model does not make a call that a site names in every run.
            UnsupportedArchitectureError: As `run`.
        """
