"""The contract between the tracer and an architecture: where a model attends, and how to read it.

An adapter describes a model and never runs it. `reading.reader` runs the model and passes the
arguments of each attention call to the adapter, and `head_mean` computes the probabilities.
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
"""The entry point group of adapters; each entry point names a sequence of them."""

DISTRIBUTION = "flowtracer-plugin"
"""The name of this distribution, whose adapters come after those of all other distributions."""


class UnsupportedArchitectureError(LookupError):
    """No adapter knows where this model attends."""


class NoAttentionError(ValueError):
    """The model has no attention between tokens, so there is no flow to trace."""


class AdapterMismatchError(RuntimeError):
    """The attention that an adapter read differs from the attention that the model computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSite:
    """One place where a model attends.

    Attributes:
        layer: The decoder layer's number, counted from 0 as the model counts it.
        module: Dotted path of the attention module below the model.
        function: The function that the module's `forward` calls to attend, as written there. A
            slash leads into a method that it calls: `"self._attn/torch.matmul"`.
        occurrence: Which call, if `forward` calls the function several times; the calls are counted
            from 0 in the order written, and -1 is the last.
        visit: Which run, if the module runs several times in one forward pass; counted from 0.
    """

    layer: int
    module: str
    function: str
    occurrence: int = -1
    visit: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionCall:
    """The inputs of one attention call, from which its probabilities can be computed again.

    The probabilities are `softmax([softcap(q kᵀ · scaling) + bias + mask | sinks])` without the
    column of the sinks, so the rows of a model with sinks sum to less than 1.

    Attributes:
        query: After positional rotation; `head` counts query heads.
        key: `group` divides `head`: consecutive query heads share a key head.
        value: One for each key; the adapter's self-check and value-weighted edges need it.
        mask: `True` where a query sees a key, or numbers that are added to the scores. If `None`,
            queries see the keys up to their own position if `causal`, and all keys otherwise.
        scaling: Factor of the scores.
        softcap: If given, scores become `softcap · tanh(score / softcap)`.
        bias: Numbers that are added to the scores, such as relative position biases.
        sinks: A learned score per head, or per head and query, that takes part in the softmax and
            is then dropped.
        causal: Whether a missing mask means that queries see the keys up to their own position.
        key_tokens: If keys are not single tokens, the share of each token in each key. A key that
            stands for several tokens divides its probability among them.
        normalized: Whether the keys get the share of the sinks, so that rows sum to 1.
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
    """The probabilities of one call, for architectures whose models always compute them.

    Attributes:
        weights: The probabilities after the softmax, as the model multiplies them with the values.
        value: The values; needed for the adapter's self-check.
    """

    weights: Float[Tensor, "batch head query key"]
    value: Float[Tensor, "batch group key value_width"] | None = None


class AttentionAdapter(ABC):
    """A description of where one kind of model attends, and of how to read its attention calls.

    Subclasses are final and have no state. The guide is `adapters/README.md`.

    Attributes:
        name: The adapter's unique name, which is also shown to users.
        generic: Whether it searches a model for its sites. Such adapters come after those that
            know an architecture.
        interface: Whether its sites are calls of transformers' attention interface, whose first
            argument is the module. The backend "interface" reads only such sites.
    """

    name: ClassVar[str]
    generic: ClassVar[bool] = False
    interface: ClassVar[bool] = False

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """Whether this adapter is the one for `model`."""

    @abstractmethod
    def sites(self, model: nn.Module) -> tuple[AttentionSite, ...]:
        """All places where `model` attends from token to token, in the order of execution.

        Raises:
            NoAttentionError: The model is known to have no attention between tokens.
        """

    @abstractmethod
    def read(
        self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> AttentionCall | AttentionWeights:
        """The attention call that `module` is about to make with these arguments.

        Some models pad the text at its end; leave out the queries and keys of that padding.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterEntry:
    """An adapter that is registered or installed, and where it comes from.

    Attributes:
        name: The adapter's name, or the entry point's name if there is no adapter.
        adapter: The adapter; `None` if the entry point names something else.
        distribution: The installed distribution; `None` for an adapter made in this process.
        version: The distribution's version.
        entry_point: The value of the entry point, such as `"package.module:ADAPTERS"`.
        skipped: Why the adapter is not used, and what to do; `None` for an adapter in use.
    """

    name: str
    adapter: AttentionAdapter | None = None
    distribution: str | None = None
    version: str | None = None
    entry_point: str | None = None
    skipped: str | None = None

    @property
    def source(self) -> str:
        """The distribution with its version, or "this process"."""
        if self.distribution is None:
            return "this process"
        return " ".join(filter(None, (self.distribution, self.version)))


_registered: list[AttentionAdapter] = []


def register_adapter(adapter: AttentionAdapter) -> None:
    """Register `adapter` for this process, ahead of all installed adapters.

    It replaces a registered adapter of the same name.

    Raises:
        TypeError: `adapter` is not an adapter, or it is a class instead of an instance.
    """
    _made_here(adapter)
    _registered[:] = [adapter, *(known for known in _registered if known.name != adapter.name)]


def adapter_entries() -> tuple[AdapterEntry, ...]:
    """All registered and installed adapters, in the order in which `find_adapter` tries them.

    Registered adapters come first, then those of other distributions by the distribution's name,
    then those of FlowTracer; generic ones come last, in the same order. If several adapters share
    a name, only the first is used. Entries that cannot be used are listed with the reason.
    """
    points = sorted(entry_points(group=ENTRY_POINT_GROUP), key=_place)
    offered = chain(map(_made_here, _registered), *map(_offered, points))
    first: dict[str, AdapterEntry] = {}
    found = []
    for entry in sorted(offered, key=lambda entry: bool(entry.adapter and entry.adapter.generic)):
        winner = first.setdefault(entry.name, entry) if entry.adapter else entry
        hidden = f"an adapter of this name from {winner.source} comes first; rename one of them"
        found.append(entry if winner is entry else replace(entry, skipped=hidden))
    return tuple(found)


def known_adapters() -> tuple[AttentionAdapter, ...]:
    """The adapters in use, in the order in which `find_adapter` tries them."""
    return tuple(e.adapter for e in adapter_entries() if e.adapter and not e.skipped)


def find_adapter(
    model: nn.Module, adapters: Iterable[AttentionAdapter] | None = None
) -> AttentionAdapter:
    """The first adapter that matches `model`.

    Raises:
        TypeError: One of `adapters` is not an adapter, or it is a class instead of an instance.
        UnsupportedArchitectureError: No adapter matches.
    """
    entries = adapter_entries() if adapters is None else tuple(map(_made_here, adapters))
    failed = []
    for entry in entries:
        try:
            if entry.adapter and not entry.skipped and entry.adapter.matches(model):
                return entry.adapter
        except Exception as error:  # an installed adapter that fails must not affect other models
            if entry.distribution in {None, DISTRIBUTION} or isinstance(error, NoAttentionError):
                raise
            reason = f"its matches() fails ({_in_words(error)}); {_remedy(entry)}"
            failed.append(replace(entry, skipped=reason))
    raise _unsupported(model, entries, failed)


def _unsupported(
    model: nn.Module, entries: Sequence[AdapterEntry], failed: Sequence[AdapterEntry]
) -> UnsupportedArchitectureError:
    tried = ", ".join(entry.name for entry in entries if not entry.skipped) or "none"
    skipped = (entry for entry in (*entries, *failed) if entry.skipped)
    reasons = "".join(f"Skipped {e.name} from {e.source}: {e.skipped}. " for e in skipped)
    return UnsupportedArchitectureError(
        f"no adapter knows where {type(model).__name__} attends; tried: {tried}. {reasons}"
        "To add one, follow 'flowtracer docs adapters', and pass it as wrap(model, adapter=...)"
    )


def _place(point: EntryPoint) -> tuple[bool, str, str]:
    name = point.dist.name if point.dist else ""
    return name == DISTRIBUTION, name.lower(), point.name


def _made_here(adapter: Any) -> AdapterEntry:
    """The entry of an adapter that was made in this process."""
    if fault := _fault(adapter):
        raise TypeError(f"wanted an AttentionAdapter, found {fault}")
    return AdapterEntry(name=adapter.name, adapter=adapter)


def _offered(point: EntryPoint) -> Iterator[AdapterEntry]:
    """The adapters that an entry point names, or one entry that says why there are none."""
    entry = AdapterEntry(
        name=point.name,
        distribution=point.dist.name if point.dist else "an unknown distribution",
        version=point.dist.version if point.dist else None,
        entry_point=point.value,
    )
    try:
        offered = point.load()
    except Exception as error:  # noqa: BLE001 - a foreign import can fail in any way
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
    """A description of something that is not an adapter; None for an adapter."""
    if isinstance(adapter, type):
        return f"the class {adapter.__name__}, which must be called: {adapter.__name__}()"
    if not isinstance(adapter, AttentionAdapter):
        return f"a {type(adapter).__name__}"
    named = isinstance(getattr(adapter, "name", None), str)
    return None if named else f"a {type(adapter).__name__} without a name"


def _remedy(entry: AdapterEntry) -> str:
    return f"fix, update or uninstall {entry.distribution}"


def _in_words(error: Exception) -> str:
    """The type and the first line of an error."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]
