"""The contract between the tracer and an architecture: where a model attends, and how to read it.

An adapter describes; it never runs the model. `reader` runs it and hands the arguments of each
attention call to the adapter, and `head_mean` turns what comes back into numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from itertools import chain
from typing import Any, ClassVar

from jaxtyping import Bool, Float
from torch import Tensor, nn

ENTRY_POINT_GROUP = "flowtracer.adapters"
"""Distributions offer adapters under this group: each entry point names a sequence of them."""

DISTRIBUTION = "flowtracer-plugin"
"""This one. Its adapters give way to those of others, which somebody chose to install."""


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
        """The attention call that `module` is about to make with these arguments.

        Queries and keys behind the end of the text, with which some models pad it, are left out.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterEntry:
    """An adapter that somebody offers, and where it comes from.

    Attributes:
        name: The adapter's, or the entry point's where there is no adapter.
        adapter: `None` if what is offered is none.
        distribution: What was installed; `None` for an adapter that this process made itself.
        version: Of the distribution.
        entry_point: What the distribution names, such as `"package.module:ADAPTERS"`.
        skipped: Why no model is shown to it, and what to do; `None` for an adapter in use.
    """

    name: str
    adapter: AttentionAdapter | None = None
    distribution: str | None = None
    version: str | None = None
    entry_point: str | None = None
    skipped: str | None = None

    @property
    def source(self) -> str:
        """Where it comes from, in words."""
        if self.distribution is None:
            return "this process"
        return " ".join(filter(None, (self.distribution, self.version)))


_registered: list[AttentionAdapter] = []


def register_adapter(adapter: AttentionAdapter) -> None:
    """Make `adapter` known to this process, ahead of every installed one.

    Registering another adapter of the same name replaces the first.

    Raises:
        TypeError: It is no adapter, or the class of one.
    """
    _given(adapter)
    _registered[:] = [adapter, *(known for known in _registered if known.name != adapter.name)]


def adapter_entries() -> tuple[AdapterEntry, ...]:
    """Every adapter that is registered or installed, in the order in which models are shown to it.

    Registered ones come first, then those of other distributions by their names, then those that
    come with FlowTracer; generic ones come last, in the same order. Of several adapters of one
    name the first counts, and hides the others. What a distribution offers in vain is listed with
    the reason, and does no harm.
    """
    points = sorted(entry_points(group=ENTRY_POINT_GROUP), key=_place)
    offered = chain(map(_given, _registered), *map(_offered, points))
    first: dict[str, AdapterEntry] = {}
    found = []
    for entry in sorted(offered, key=lambda entry: bool(entry.adapter and entry.adapter.generic)):
        winner = first.setdefault(entry.name, entry) if entry.adapter else entry
        hidden = f"the one of this name from {winner.source} goes before it; rename one of them"
        found.append(entry if winner is entry else replace(entry, skipped=hidden))
    return tuple(found)


def known_adapters() -> tuple[AttentionAdapter, ...]:
    """The adapters in use: registered ones, then installed ones, then the generic ones."""
    return tuple(e.adapter for e in adapter_entries() if e.adapter and not e.skipped)


def find_adapter(
    model: nn.Module, adapters: Iterable[AttentionAdapter] | None = None
) -> AttentionAdapter:
    """The first adapter that matches `model`.

    Raises:
        TypeError: What was passed is no adapter, or the class of one.
        UnsupportedArchitectureError: None does.
    """
    entries = adapter_entries() if adapters is None else tuple(map(_given, adapters))
    skipped = [entry for entry in entries if entry.skipped]
    for entry in entries:
        try:
            if entry.adapter and not entry.skipped and entry.adapter.matches(model):
                return entry.adapter
        except Exception as error:  # somebody else's adapter must not stand in every model's way
            if entry.distribution in {None, DISTRIBUTION} or isinstance(error, NoAttentionError):
                raise
            reason = f"its matches() fails ({_in_words(error)}); {_remedy(entry)}"
            skipped.append(replace(entry, skipped=reason))
    tried = ", ".join(entry.name for entry in entries if not entry.skipped) or "none"
    reasons = "".join(f"Skipped {e.name} from {e.source}: {e.skipped}. " for e in skipped)
    raise UnsupportedArchitectureError(
        f"no adapter knows where {type(model).__name__} attends; tried: {tried}. {reasons}"
        "To add one, follow adapters/README.md and pass it as wrap(model, adapter=...)"
    )


def _place(point: EntryPoint) -> tuple[bool, str, str]:
    name = point.dist.name if point.dist else ""
    return name == DISTRIBUTION, name.lower(), point.name


def _given(adapter: Any) -> AdapterEntry:
    """The entry of an adapter that this process made itself.

    Raises:
        TypeError: It is none.
    """
    if fault := _fault(adapter):
        raise TypeError(f"wanted an AttentionAdapter, found {fault}")
    return AdapterEntry(name=adapter.name, adapter=adapter)


def _offered(point: EntryPoint) -> Iterator[AdapterEntry]:
    """The adapters that an entry point names, or why there are none."""
    entry = AdapterEntry(
        name=point.name,
        distribution=point.dist.name if point.dist else "an unknown distribution",
        version=point.dist.version if point.dist else None,
        entry_point=point.value,
    )
    try:
        offered = point.load()
    except Exception as error:  # noqa: BLE001 - somebody else's import, which can fail in any way
        reason = f"{point.value} cannot be loaded ({_in_words(error)}); {_remedy(entry)}"
        yield replace(entry, skipped=reason)
        return
    found = offered if isinstance(offered, list | tuple) else [offered]
    for adapter in found:
        fault = _fault(adapter)
        if found is not offered:
            fault = f"{fault or f'a {type(adapter).__name__}'}, not in a tuple"
        if fault:
            wanted = f"{point.value} should name a tuple of AttentionAdapter instances, and holds"
            yield replace(entry, skipped=f"{wanted} {fault}; {_remedy(entry)}")
        else:
            yield replace(entry, name=adapter.name, adapter=adapter)


def _fault(adapter: object) -> str | None:
    """What a thing is that is no adapter."""
    if isinstance(adapter, type):
        return f"the class {adapter.__name__}, which must be called: {adapter.__name__}()"
    if not isinstance(adapter, AttentionAdapter):
        return f"a {type(adapter).__name__}"
    named = isinstance(getattr(adapter, "name", None), str)
    return None if named else f"a {type(adapter).__name__} without a name"


def _remedy(entry: AdapterEntry) -> str:
    return f"mend, update or uninstall {entry.distribution}"


def _in_words(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]
