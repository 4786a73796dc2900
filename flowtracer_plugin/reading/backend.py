"""What a way of running a model and watching its attention must do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from flowtracer_plugin.attention.adapter import AttentionSite

Result = TypeVar("Result")

Receive = Callable[[AttentionSite, Sequence[Any], Mapping[str, Any], Any], None]
"""Takes a site, the arguments and options of its call, and what the call returned, if known."""


class Backend(ABC):
    """Runs one model and hands over the attention calls that it makes.

    Attributes:
        name: What users select it by.
        threads: Whether several threads may read one model at the same time.
    """

    name: ClassVar[str]
    threads: ClassVar[bool]

    @abstractmethod
    def run(
        self,
        inputs: Mapping[str, Any],
        sites: Sequence[AttentionSite],
        receive: Receive,
        *,
        whole: bool,
    ) -> Any:
        """Run the model on `inputs` and pass each site's call on, in the order of `sites`.

        If `whole`, calls come with what they returned, and the model's output is returned; else
        the forward pass ends after the last site.
        """

    @abstractmethod
    def listen(
        self,
        call: Callable[[], Result],
        sites: Sequence[AttentionSite],
        receive: Receive,
        *,
        runs: int,
    ) -> Result:
        """Let `call` run the model `runs` times, and pass each site's call on, in every run.

        The forward passes go to their end, with gradients if they have any.
        """
