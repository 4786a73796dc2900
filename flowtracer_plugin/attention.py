"""The contract between the tracer and an architecture: where a model attends, and how to read it.

An adapter describes; it never runs the model. `reader` runs it and hands the arguments of each
attention call to the adapter, and `head_mean` turns what comes back into numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar

from jaxtyping import Bool, Float
from torch import Tensor, nn

ENTRY_POINT_GROUP = "flowtracer.adapters"
"""Distributions offer adapters under this group: each entry point names a sequence of them."""


class UnsupportedArchitectureError(LookupError):
    """No adapter can say where this model attends."""


class NoAttentionError(ValueError):
    """The model has no attention between tokens, so there is no flow to trace."""


class AdapterMismatchError(RuntimeError):
    """What an adapter read is not the attention that the model computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSite:
    """One place where a model attends.

    Attributes:
        layer: The decoder layer's number, counted from 0 as the model counts it.
        module: Dotted path of the attention module below the model.
        function: What the module's `forward` calls to attend, as written there. A slash goes into
            a method that it calls: `"self._attn/torch.matmul"`.
        occurrence: Which of several calls of that function, in the order written; -1 is the last.
        visit: Which of several runs of the module in one forward pass, counted from 0.
    """

    layer: int
    module: str
    function: str
    occurrence: int = -1
    visit: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionCall:
    """The inputs of one attention call, enough to compute its probabilities again.

    The probabilities are `softmax([softcap(q kᵀ · scaling) + bias + mask | sinks])` without the
    sink column, so the rows of a model with sinks sum to less than 1.

    Attributes:
        query: After positional rotation; `head` counts query heads.
        key: `group` divides `head`: consecutive query heads share a key head.
        value: Like `key`; read by the adapter's self-check, and by value-weighted edges.
        mask: `True` where a query may look, or numbers that are added to the scores. `None` means
            causal if `causal`, else that every query sees every key.
        scaling: Factor on the scores.
        softcap: Scores are squashed to `softcap · tanh(score / softcap)`.
        bias: Added to the scores, such as relative position biases.
        sinks: A learned score per head, or per head and query, that takes part in the softmax and
            is then dropped.
        causal: Whether a missing mask means "each query sees the keys up to its own position".
        key_tokens: For keys that are not the tokens themselves: the share of each token in each
            key. A key that stands for several tokens divides its probability among them.
        normalized: Whether the share of the sinks is given back to the keys, so that rows sum to 1.
    """

    query: Float[Tensor, "batch head query width"]
    key: Float[Tensor, "batch group key width"]
    value: Float[Tensor, "batch group key value_width"] | None = None
    mask: (
        Bool[Tensor, "#batch #head #query more_keys"]
        | Float[Tensor, "#batch #head #query more_keys"]
        | None
    ) = None
    scaling: float
    softcap: float | None = None
    bias: Float[Tensor, "#batch #head #query key"] | None = None
    sinks: Float[Tensor, " head"] | Float[Tensor, "#batch head #query 1"] | None = None
    causal: bool = True
    key_tokens: Float[Tensor, "#batch key token"] | None = None
    normalized: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionWeights:
    """Probabilities that the model computed itself, for architectures that always do.

    Attributes:
        weights: After the softmax, as the model multiplies them with the values.
        value: What they are multiplied with; read by the adapter's self-check.
    """

    weights: Float[Tensor, "batch head query key"]
    value: Float[Tensor, "batch group key value_width"] | None = None


class AttentionAdapter(ABC):
    """Says where a kind of model attends, and how to read one of its attention calls.

    Subclasses are final and have no state. The guide is `adapters/README.md`.

    Attributes:
        name: Shown to users, and the name under which it is found.
        generic: Whether it discovers its sites by looking, and so gives way to adapters that know
            an architecture.
        interface: Whether its sites are calls of transformers' attention interface, which start
            with the module. The backend of that name can read these only.
    """

    name: ClassVar[str]
    generic: ClassVar[bool] = False
    interface: ClassVar[bool] = False

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """Whether this adapter is the one for `model`."""

    @abstractmethod
    def sites(self, model: nn.Module) -> tuple[AttentionSite, ...]:
        """Every place where `model` attends from token to token, in the order of execution.

        Raises:
            NoAttentionError: The model is known to have none.
        """

    @abstractmethod
    def read(
        self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> AttentionCall | AttentionWeights:
        """The attention call that `module` is about to make with these arguments."""


_registered: list[AttentionAdapter] = []


def register_adapter(adapter: AttentionAdapter) -> None:
    """Make `adapter` known to this process, ahead of every installed one.

    Registering another adapter of the same name replaces the first.
    """
    _registered[:] = [adapter, *(known for known in _registered if known.name != adapter.name)]


def known_adapters() -> tuple[AttentionAdapter, ...]:
    """Registered adapters, then installed ones, then the generic ones."""
    installed = [a for point in entry_points(group=ENTRY_POINT_GROUP) for a in point.load()]
    return tuple(sorted((*_registered, *installed), key=lambda adapter: adapter.generic))


def find_adapter(
    model: nn.Module, adapters: Iterable[AttentionAdapter] | None = None
) -> AttentionAdapter:
    """The first adapter that matches `model`.

    Raises:
        UnsupportedArchitectureError: None does.
    """
    tried = tuple(known_adapters() if adapters is None else adapters)
    for adapter in tried:
        if adapter.matches(model):
            return adapter
    names = ", ".join(adapter.name for adapter in tried) or "none"
    raise UnsupportedArchitectureError(
        f"no adapter knows where {type(model).__name__} attends; tried: {names}. "
        "To add one, follow adapters/README.md and pass it as wrap(model, adapter=...)"
    )
